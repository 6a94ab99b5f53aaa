"""`remat="auto"` recomputes the least that the devices' memory allows, and what it says of memory is so."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import COMPILES

from hetjax.core import memory
from hetjax.core.budget import SHARE, Budget
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Keep, Product, Remat, recorder
from hetjax.core.trainer import Trainer
from hetjax.run import recompute
from models.grouped import grouped_dot

pytest_plugins = ["one_trainer"]
SGD = OptimizerConfig(name="sgd", learning_rate=0.1)
SHAPE = tiny.Shape(samples=8, groups=2, slots=8, microbatches=2)
VISION, LLM = ("vision", 0), ("llm", 0)
MARGIN = 0.2  # of what a tiny model takes; of larger ones it was within 1%


def trainer_of(vision: str = "0", llm: str = "0", *, remat: Remat = Remat.AUTO) -> Trainer:
    """Of the tiny model on these devices; nothing is compiled."""
    layouts = dict(llm=Layout(devices=llm), encoders={"vision": Layout(devices=vision)})
    graph = tiny.graph(**layouts, dtype=jnp.float32, remat=remat)
    with mock.patch.object(Trainer, "compile"):
        return tiny.trainer(graph, SHAPE, SGD)


@pytest.fixture(scope="module")
def apart() -> Budget:
    """Of modules that are alone on their devices."""
    return Budget(trainer_of("0", "1"))


@pytest.fixture(scope="module")
def together() -> Budget:
    return Budget(trainer_of())


def total(budget: Budget, device: int, places: Mapping[Any, int]) -> int:
    """Bytes on a device of the choices at these places, and of the first of other stages."""
    kept = {key: choices[places.get(key, 0)].kept for key, choices in budget.choices.items()}
    return budget.estimate(kept)[device].total


def test_choices_go_from_all_to_nothing_and_each_frees_memory(apart: Budget) -> None:
    for choices in apart.choices.values():
        kept = [choice.kept for choice in choices]
        assert kept == sorted(set(kept), reverse=True) and len(choices) > 3
        assert [choices[0].keep, choices[1].keep] == [Keep(Remat.NONE), Keep(Remat.DOTS)]
        assert choices[-1].keep == Keep(Remat.FULL) and all(choice.keep.least for choice in choices[2:-1])


def test_smaller_budgets_give_up_more_and_no_more_than_they_must(apart: Budget) -> None:
    for key, device in ((VISION, 0), (LLM, 1)):
        for place, choice in enumerate(apart.choices[key]):
            found = apart.choose({device: int(total(apart, device, {key: place}) / SHARE) + 1})
            assert found == {VISION: Keep(Remat.NONE), LLM: Keep(Remat.NONE)} | {key: choice.keep}
        assert apart.choose({device: 1})[key] == Keep(Remat.FULL)


def test_where_no_limit_is_known_everything_is_kept_and_what_a_setting_says_stays(apart: Budget) -> None:
    assert set(apart.choose({}).values()) == {Keep(Remat.NONE)}
    assert set(Budget(trainer_of(remat=Remat.DOTS)).choose({0: 1}).values()) == {Keep(Remat.DOTS)}


def test_modules_on_one_device_give_up_what_is_cheapest_for_its_bytes(together: Budget) -> None:
    most, least = (total(together, 0, dict.fromkeys((VISION, LLM), place)) for place in (0, -1))
    order: list[float] = []
    found = dict.fromkeys(together.choices, 0)
    for size in np.linspace(most, least, 60):
        chosen = together.choose({0: int(size / SHARE) + 1})
        for key, choices in together.choices.items():
            place = [choice.keep for choice in choices].index(chosen[key])
            order += [choice.cost for choice in choices[found[key] + 1 : place + 1]]
            assert place >= found[key]
            found[key] = place
    assert len(order) > 5 and order == sorted(order) and len(set(order)) > 2


def gradients(keep: Mapping[Any, Keep]) -> list[np.ndarray]:
    trainer = trainer_of()
    for key, stage in trainer.pipeline.stages.items():
        stage.set_keep(keep[key])
    trainer.compile()
    done = trainer.gradients(trainer.init(), tiny.microbatches(SHAPE))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((done.grads, done.scores))]


def test_what_is_computed_again_changes_no_number(together: Budget) -> None:
    """Of choices between all products and none; tests/test_parity.py has the others."""
    middle = {key: choices[len(choices) // 2].keep for key, choices in together.choices.items()}
    assert all(keep.least is not None for keep in middle.values())
    whole = gradients(dict.fromkeys(middle, Keep(Remat.NONE)))
    top = max(np.abs(leaf).max() for leaf in whole)
    for mine, theirs in zip(gradients(middle), whole, strict=True):
        size = max(np.abs(theirs).max(), 1e-2 * top)  # a key's bias has a gradient of 0 but for rounding
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * size)


@pytest.mark.slow
def test_a_run_that_resumes_keeps_what_was_chosen_unless_the_devices_or_the_layout_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], apart: Budget
) -> None:
    size = {device: int(total(apart, device, {VISION: 2, LLM: 3}) / SHARE) + 1 for device in (0, 1)}
    wanted = {VISION: apart.choices[VISION][2].keep, LLM: apart.choices[LLM][3].keep}

    def settle(trainer: Trainer, available: Mapping[int, int], phase: int = 0) -> tuple[dict[Any, Keep], str]:
        recompute.settle(trainer, tmp_path, phase, available)
        return {key: stage.keep for key, stage in trainer.pipeline.stages.items()}, capsys.readouterr().out

    chosen, said = settle(trainer_of("0", "1"), size)
    assert chosen == wanted and said.startswith("remat, chosen: vision/0 products of ")
    with mock.patch.object(Budget, "choose", side_effect=AssertionError("chosen again")):
        again, said = settle(trainer_of("0", "1"), size)
        assert again == wanted and f"as {tmp_path / recompute.FILE} has it: vision/0 products of " in said
    assert settle(trainer_of("0", "1"), size, phase=1)[1].startswith("remat, chosen: ")
    more, said = settle(trainer_of("0", "1"), {n: 100 * bytes for n, bytes in size.items()})
    assert set(more.values()) == {Keep(Remat.NONE)} and "chosen anew, for other devices than in" in said
    said = settle(trainer_of("2", "1"), size)[1]
    assert "chosen anew, for other devices and layouts, models or settings of memory than in" in said
    file = tmp_path / recompute.FILE
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"phase 1": found["phase 1"] | {"keep": {}}}))
    assert settle(trainer_of("2", "1"), size)[1].startswith("remat, chosen: ")
    assert not settle(trainer_of(remat=Remat.DOTS), size)[1]
    wrong = [json.dumps({"phase 1": {"basis": {}, "keep": {"llm/0": [what, None]}}}) for what in ("all", "auto")]
    for broken in ("{", "[1]", *wrong):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"remat.json is not what a run writes .*; remove it, and the run chooses"):
            settle(trainer_of("0", "1"), size)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="is not what a run writes"):
        settle(trainer_of("0", "1"), size)


def test_the_cost_of_a_product_is_its_flops_for_each_byte_of_its_result() -> None:
    products: set[Product] = set()

    def program(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, w[0], 1)
        return y + grouped_dot(x, w, sizes)

    x, w, sizes = jnp.ones((6, 4), jnp.bfloat16), jnp.ones((2, 4, 10), jnp.bfloat16), jnp.array([2, 4])
    jax.vjp(jax.checkpoint(lambda x, w: jnp.sin(program(x, w, sizes)), policy=recorder(products)), x, w)
    assert products == {Product(2 * 4 / 2, 6 * 10 * 2)}
    keep = Keep(Remat.DOTS, Product(8.0, 100))
    assert Keep.from_json(json.loads(json.dumps(keep.to_json()))) == keep


@pytest.mark.parametrize("place", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)), -1])
def test_estimates_are_near_what_the_compiled_programs_take(apart: Budget, place: int) -> None:
    trainer = trainer_of("0", "1")
    for key, stage in trainer.pipeline.stages.items():
        stage.set_keep(apart.choices[key][place].keep)
        thunks = stage.thunks(evaluate=False)
        thunks["forward"](), thunks["backward"]()
        assert memory.local_bytes(stage.kept) == apart.choices[key][place].kept
    expected = {device: total(apart, device, dict.fromkeys((VISION, LLM), place)) for device in (0, 1)}
    assert {device: taken.total for device, taken in memory.estimate(trainer).items()} == pytest.approx(
        expected, rel=MARGIN
    )


def test_a_run_settles_it_before_it_compiles(
    once: None, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle(trainer: Trainer, workdir: Path, phase: int, available: dict[int, int]) -> None:
        print(f"settled in {workdir.name}, phase {phase}, {len(available)} devices")

    monkeypatch.setattr(recompute, "settle", settle)
    status, said = call(tmp_path / "run", steps=1)
    assert status == 0 and 0 < said.index("settled in run, phase 0, 8 devices") < said.index(COMPILES)
