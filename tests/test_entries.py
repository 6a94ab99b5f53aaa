"""What enters a language model at several layers, under any layout of either side: DeepStack and cross-attention.

The reference gives each layer what it takes, and lets jax add the cotangents. (`drawn.py` draws more such runs.)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_generate import params_of, row_batch
from test_parity import FROZEN_LLM, FROZEN_VISION, MOMENTUM, Case, run

from hetjax.core.graph import Module, deepstack, vlm
from hetjax.core.layout import Layout
from hetjax.core.parameters import Parameters
from hetjax.core.plan import plan_stages
from hetjax.core.remat import Remat
from hetjax.core.stage import Stage
from hetjax.generate import cached
from hetjax.judge.reference import apply_module
from models.axes import ONE_DEVICE
from models.cross_attention import CrossAttention, media, who_sees

DEEP = dict(deepstack=(1, 0, -1))  # of the encoder's two layers, behind the first three of the decoder's four
CROSS = dict(cross=(1, 3))
PROJECTORS = (("frozen", ("llm/*", "vision/first/*", "vision/layers/*")),)
KINDS = {
    "both, llm pp 4, encoders pp 2": Case(
        Layout(pp=4), Layout(pp=2, dp=2, devices="0-3"), Layout(pp=2, devices="6-7"), **DEEP, cross=(0, 2, 3)
    ),
    "deepstack, one device, unrolled": Case(**DEEP, unroll=True),
    "deepstack, llm pp 2 tp 2, encoder pp 2 tp 2": Case(
        Layout(pp=2, tp=2, devices="0-3"), Layout(pp=2, tp=2, devices="4-7"), **DEEP, remat=Remat.NONE
    ),
    "deepstack, llm cp 2 tp 2 sp pp 2, colocated, encoder cp 2": Case(
        Layout(cp=2, tp=2, pp=2, sp=True), Layout(cp=2, dp=2, devices="0-3"), **DEEP, encoder_window=2
    ),
    "deepstack, llm ring pp 4, overlapping, gpipe": Case(
        Layout(cp=2, pp=2, context="ring", devices="0-3"), Layout(dp=4, devices="2-5"), **DEEP, schedule="gpipe"
    ),
    "deepstack, experts, ep 2 zero 3; encoder zero 3": Case(
        Layout(dp=2, tp=2, pp=2, ep=2, zero=3), Layout(dp=4, zero=3, devices="4-7"), **DEEP, experts=tiny.EXPERTS
    ),
    "deepstack, projectors alone": Case(
        Layout(pp=2, dp=2, devices="0-3"), Layout(dp=2, devices="4-5"), **DEEP, changes=PROJECTORS
    ),
    "deepstack, frozen encoder": Case(
        Layout(pp=2, dp=2, devices="0-3"), Layout(dp=2, devices="4-5"), **DEEP, changes=FROZEN_VISION
    ),
    "cross, one device": Case(**CROSS),
    "cross, llm pp 4, colocated": Case(Layout(pp=4, dp=2), Layout(dp=8), **CROSS, encoder_window=2),
    "cross, llm cp 2 tp 2 sp": Case(Layout(cp=2, tp=2, sp=True, devices="0-3"), Layout(dp=2, devices="4-5"), **CROSS),
    "cross, llm by heads pp 2, encoder cp 2, products kept": Case(
        Layout(cp=2, pp=2, context="heads", devices="0-3"), Layout(cp=2, devices="4-5"), **CROSS, remat=Remat.DOTS
    ),
    "cross in turn, ring, encoder pp 2, blocks": Case(
        Layout(cp=2, dp=2, context="ring", devices="0-3"), Layout(pp=2, devices="4-5"), cross=(0, 2), blocks=(3, 1)
    ),
    "cross, experts, ep 2 zero 3, nothing again": Case(
        Layout(dp=2, tp=2, pp=2, ep=2, zero=3),
        Layout(dp=2, tp=2, devices="0-3"),
        **CROSS,
        experts=tiny.EXPERTS,
        remat=Remat.NONE,
    ),
    "cross, frozen llm, pp 4": Case(
        Layout(pp=4, devices="0-3"), Layout(dp=2, devices="4-5"), cross=(2,), changes=FROZEN_LLM
    ),
    "cross, one trained layer, zero 2": Case(
        Layout(pp=2, dp=2, zero=2, devices="0-3"),
        Layout(dp=2, zero=2, devices="4-5"),
        **CROSS,
        changes=(("frozen", ("*",)), ("trainable", ("llm/layers/cross/*",))),
    ),
    "cross, text alone in some microbatches, audio merged": Case(
        Layout(pp=2, devices="0-1"), Layout(dp=2, devices="2-3"), Layout(devices="4"), **CROSS, text_only=(0, 2)
    ),
}
DIMS = ("items", None, None)
DEFAULT = ["both, llm pp 4, encoders pp 2"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_a_run_is_the_references(name: str) -> None:
    (report,) = run(KINDS[name], MOMENTUM, jnp.float64, 1)
    assert report.within(loss=1e-12, leaves=1e-11, params=1e-11), report


# -- who sees what -----------------------------------------------------------------------------------------------------

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
ONE_PLACE = np.array([[-1, 0, -1, -1, 6, -1, -1, -1], [-1, -1, -1, -1, 9, -1, 3, -1]])  # of four items of three rows
TOLD = (POSITIONS, SEGMENTS)
A_PLACE_EACH = np.array([[0, 1, 2, -1, 6, 7, 8, -1], [-1, -1, 9, 10, 11, 3, 4, 5]])


def seen(index: np.ndarray, items: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """(items that each token sees, whether it sees any)."""
    found = media(*(jnp.asarray(a, jnp.int32) for a in (index, *TOLD, *TOLD)), ONE_DEVICE)
    sight, sees = who_sees(found, items, 3, jnp.float32, ONE_DEVICE)
    by_row = np.asarray(sight.mask()).reshape(*index.shape, items, 3)
    assert (by_row == by_row[..., :1]).all(), "all rows of an item, or none"
    return by_row[..., 0], np.asarray(sees).reshape(index.shape)


def test_tokens_see_the_items_that_stand_before_them_in_their_document() -> None:
    items, any_ = seen(ONE_PLACE)
    expected = np.zeros((2, 8, 4), bool)
    expected[0, 1:3, 0], expected[0, 4:7, 2], expected[1, 4:, 3], expected[1, 6:, 1] = True, True, True, True
    np.testing.assert_array_equal(items, expected)
    np.testing.assert_array_equal(any_, expected.any(-1))


def test_an_item_with_a_place_for_each_row_stands_at_the_first() -> None:
    items, _ = seen(A_PLACE_EACH)
    expected = np.zeros((2, 8, 4), bool)
    expected[0, :3, 0], expected[0, 4:7, 2], expected[1, 2:, 3], expected[1, 5:, 1] = True, True, True, True
    np.testing.assert_array_equal(items, expected)


def test_items_of_other_devices_are_nan() -> None:
    assert np.isnan(seen(ONE_PLACE, items=3)[1]).all()


def test_where_nothing_is_seen_a_layer_leaves_the_tokens_as_they_are() -> None:
    config = tiny.decoder(cross_attention=CrossAttention((1,), gate=0.5))
    definition = config.module(jnp.float32, encoders=("vision",))
    layer, rng = definition.layers[1], np.random.default_rng(0)
    batch = {"vision.index": ONE_PLACE, "positions": POSITIONS, "segment_ids": SEGMENTS}
    given = definition.prepare({k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}, ONE_DEVICE)
    x, rows = (jnp.asarray(rng.normal(size=(*shape, tiny.WIDTH)), jnp.float32) for shape in ((2, 8), (4, 3)))
    y = layer.apply(layer.init(jax.random.key(0)), {"x": x, "vision": rows}, given, ONE_DEVICE)
    assert y.keys() == {"x"}
    changed = np.asarray((y["x"] != x).any(-1))
    np.testing.assert_array_equal(changed, seen(ONE_PLACE)[1] > 0)


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attends", [False, True], ids=["deepstack", "cross"])
def test_every_step_of_the_cache_gives_the_logits_of_the_whole_sequence(attends: bool, x64: None) -> None:
    model = tiny.decoder(num_layers=3, cross_attention=CrossAttention((1,), gate=0.5) if attends else None)
    told = dict(encoders=("vision",), deepstack={"vision": 0 if attends else 2})
    definition = model.module(jnp.float64, **told)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params_of(model, jnp.float64))
    lengths, new, rng = np.array([7, 9], np.int32), 2, np.random.default_rng(0)
    tokens = rng.integers(0, tiny.VOCAB, (2, 9 + new)).astype(np.int32)
    index = np.full(tokens.shape, -1, np.int32)
    index[0, 1:4], index[1, 2:5], index[1, 6:9] = 3 + np.arange(3), np.arange(3), 6 + np.arange(3)
    rows = {n: jnp.asarray(rng.normal(size=(3, 3, tiny.WIDTH))) for n in sorted(definition.takes(0, 3))}

    prompts = {k: jnp.asarray(v) for k, v in row_batch(tokens[:, :9], lengths).items()}
    prompts |= {"vision.index": jnp.asarray(index[:, :9])}
    logits, memory = cached.prefill(definition, params, rows, prompts, ONE_DEVICE, new)
    alone = dataclasses.replace(definition, first=model.module(jnp.float64).first)
    got = [logits]
    for n in range(new):
        token = jnp.asarray(tokens[np.arange(2), lengths + n])
        logits, memory = cached.step(
            alone, params, memory, token, jnp.asarray(lengths + n), jnp.int32(9 + n), ONE_DEVICE
        )
        got.append(logits)

    everything = {k: jnp.asarray(v) for k, v in row_batch(tokens, lengths + new).items()}
    y = apply_module(definition, params, rows, everything | {"vision.index": jnp.asarray(index)})
    whole = np.asarray(y["x"] @ y["head"])
    for n, logits in enumerate(got):
        np.testing.assert_allclose(logits, whole[np.arange(2), lengths - 1 + n], rtol=0, atol=1e-11)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [dict(deepstack=(1, 0)), dict(cross=(0, 1, 2))], ids=["deepstack", "cross"])
def test_no_layer_keeps_what_enters_it(model: dict) -> None:
    """It is an input of the stage, which the backward is given again."""
    rows = 48  # no other array has as many
    graph = tiny.graph(Layout(), {"vision": Layout()}, jnp.float32, **model)
    module = graph.sink
    plan = plan_stages("llm", module.definition, Layout(), jax.devices())[0]
    batch = {name: jax.ShapeDtypeStruct((2, tiny.SEQ), jnp.int32) for name in module.definition.reads}
    taken = module.definition.takes(0, 4)
    x = {n: jax.ShapeDtypeStruct((3, rows, tiny.WIDTH), jnp.float32, sharding=plan.grid.sharding(DIMS)) for n in taken}
    parameters = Parameters(module, plan, MOMENTUM, seed=0, dtype=jnp.float32)
    stage = Stage(module, plan, parameters, is_sink=True, x=x, x_wanted=taken, batch=batch)
    stage.thunks(evaluate=False)
    assert stage.kept and not [a.shape for a in stage.kept if rows in a.shape]


# -- what is refused ---------------------------------------------------------------------------------------------------


def graph_of(vision: dict, llm: dict, *, told: int | None = None, name: str = "vision") -> None:
    """A graph whose decoder is `told` of so many features."""
    tower = Module(name, tiny.vit(**vision).module(jnp.float32, name=name), Layout())
    count = deepstack([tower])[name] if told is None else told
    definition = tiny.decoder(**llm).module(jnp.float32, encoders=(name,), deepstack={name: count})
    vlm((tower,), Module("llm", definition, Layout()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.vit(deepstack=(3,)), r"ViT.deepstack=\(3,\); it must be a number from -3 to 2, or a list"),
        (lambda: tiny.vit(deepstack=(1.5,)), r"ViT.deepstack=\(1.5,\); it must be a number"),
        (lambda: graph_of(dict(deepstack=(0, 1, 2, 2, 1)), {}), "num_layers=4, but vision gives features for 5 layers"),
        (lambda: graph_of(dict(deepstack=(1,)), {}, told=0), "vision gives 'vision.deep0', which no part of llm takes"),
        (lambda: graph_of(dict(), {}, told=1), "llm takes 'vision.deep0', which no module gives"),
        (lambda: CrossAttention(()), r"CrossAttention.layers=\(\); it must be a list of different layers"),
        (lambda: CrossAttention((1, 1)), r"CrossAttention.layers=\(1, 1\); it must be a list of different"),
        (lambda: CrossAttention((0,), gate=float("nan")), "CrossAttention.gate=nan; it must be a finite number"),
        (lambda: tiny.decoder(cross_attention=CrossAttention((4,))), "names layer 4; with Decoder.num_layers=4"),
        (lambda: tiny.decoder(cross_attention=CrossAttention((0, 1, 2, 3))), "names all 4 layers"),
        (
            lambda: tiny.decoder(
                cross_attention=CrossAttention((0, 2, 3)), experts=dataclasses.replace(tiny.EXPERTS, dense_layers=(1,))
            ),
            "Experts.dense_layers and CrossAttention.layers together name all layers",
        ),
        (lambda: graph_of({}, dict(cross_attention=CrossAttention((1,), "sight"))), "'sight'; the encoders are"),
        (
            lambda: graph_of(dict(deepstack=(1,)), dict(cross_attention=CrossAttention((1,)))),
            "'vision' gives features to add at its places",
        ),
        (
            lambda: graph_of({}, dict(cross_attention=CrossAttention((1,), "x")), name="x"),
            "layers hand each other 'x', so no encoder can have that name",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_compiles(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
