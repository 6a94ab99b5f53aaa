"""Layers of several kinds: each leaf is stacked over those that have it, and runs of a kind are cut out of it."""

import numpy as np

from hetjax.core import stacks
from models.contract import ModuleDef, Part


def kind(**logical: object) -> Part:
    return Part(lambda key: {}, lambda params, x, batch, axes: x, dict(logical))


DENSE, SPARSE = kind(norm=(None,), mlp={"up": (None,)}), kind(norm=(None,), moe={"up": (None,), "router": (None,)})
LAYERS = (DENSE, DENSE, SPARSE, DENSE, SPARSE, SPARSE)
MODULE = ModuleDef(first=DENSE, layers=LAYERS, last=DENSE, reads={}, carry={}, output={}, config=None)
ROWS = lambda *layers: np.array([[10.0 * layer] for layer in layers])
STACKED = {
    "norm": ROWS(0, 1, 2, 3, 4, 5),
    "mlp": {"up": ROWS(0, 1, 3)},
    "moe": {"up": ROWS(2, 4, 5), "router": ROWS(2, 4, 5)},
}


def test_runs_are_consecutive_layers_of_one_part() -> None:
    assert stacks.runs(LAYERS) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert stacks.runs((DENSE,) * 3) == [(0, 3)] and stacks.runs(()) == []


def test_a_leaf_holds_the_layers_that_have_it() -> None:
    assert stacks.holders(MODULE, ["norm"], 1, 5) == [1, 2, 3, 4]
    assert stacks.holders(MODULE, ["mlp", "up"], 1, 5) == [1, 3]
    assert stacks.holders(MODULE, ["moe", "router"], 3, 6) == [4, 5]
    assert stacks.holders(MODULE, ["moe", "gate"], 0, 6) == []


def test_runs_are_cut_out_and_joined_again() -> None:
    runs = stacks.cut(STACKED, LAYERS)
    for number, layers in enumerate([(0, 1), (2,), (3,), (4, 5)]):
        block = "mlp" if number in (0, 2) else "moe"
        assert runs[number].keys() == {"norm", block}
        np.testing.assert_array_equal(runs[number]["norm"], ROWS(*layers))
        np.testing.assert_array_equal(runs[number][block]["up"], ROWS(*layers))
    joined = stacks.join(list(runs.values()), np.concatenate)
    assert joined.keys() == STACKED.keys() and joined["moe"].keys() == STACKED["moe"].keys()
    np.testing.assert_array_equal(joined["norm"], STACKED["norm"])
    np.testing.assert_array_equal(joined["moe"]["router"], STACKED["moe"]["router"])


def test_some_of_the_leaves_are_cut_as_all_are_and_a_run_may_have_none() -> None:
    runs = stacks.cut({"moe": {"router": STACKED["moe"]["router"]}}, LAYERS)
    assert runs[0] == {} and runs[2] == {}
    np.testing.assert_array_equal(runs[3]["moe"]["router"], ROWS(4, 5))


def test_what_lies_in_one_run_is_not_copied() -> None:
    layers = (DENSE, DENSE, SPARSE)
    stacked = {"norm": ROWS(0, 1, 2), "mlp": {"up": ROWS(0, 1)}, "moe": {"up": ROWS(2), "router": ROWS(2)}}
    runs = stacks.cut(stacked, layers)
    assert runs[0]["mlp"]["up"] is stacked["mlp"]["up"] and runs[1]["moe"]["router"] is stacked["moe"]["router"]
    assert stacks.cut({"norm": stacked["norm"]}, (DENSE,) * 3)[0]["norm"] is stacked["norm"]
