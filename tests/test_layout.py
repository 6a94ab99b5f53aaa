"""Layouts become stage meshes; impossible ones are refused with numbers and a way out."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hetjax.core.layout import AXES, Layout, check_batch, like, zigzag
from hetjax.core.mesh import Spread, fold, innermost
from hetjax.core.plan import picture, plan_stages
from models.contract import ModuleDef, Part

EMPTY = Part(lambda key: {}, lambda params, x, batch, axes: x, {})


def module(**changes: Any) -> ModuleDef:
    base = ModuleDef(
        first=EMPTY,
        layers=(EMPTY,) * 5,
        last=EMPTY,
        reads={},
        carry={},
        output={},
        config=None,
        divisible={"tp": {"heads": 8, "kv_heads": 4}},
        axes=frozenset({"dp", "copies", "cp", "tp", "pp"}),
    )
    return dataclasses.replace(base, **changes)


def ids(mesh: Mesh) -> list:
    return np.vectorize(lambda d: d.id)(mesh.devices).tolist()


def test_stages_take_consecutive_devices_and_the_first_layers_are_more() -> None:
    plans = plan_stages("llm", module(), Layout(dp=2, tp=2, pp=2), jax.devices())
    assert [(p.lo, p.hi, p.first, p.last) for p in plans] == [(0, 3, True, False), (3, 5, False, True)]
    assert ids(plans[0].mesh) == [[[[0, 1]]], [[[2, 3]]]]
    assert plans[1].device_ids == (4, 5, 6, 7)
    assert plans[0].mesh.axis_names == AXES


def test_layers_may_be_cut_unevenly() -> None:
    plans = plan_stages("llm", module(), Layout(pp=3, layers=(1, 3, 1)), jax.devices())
    assert [(p.lo, p.hi) for p in plans] == [(0, 1), (1, 4), (4, 5)]


@pytest.mark.parametrize(("text", "expected"), [("4-7", (4, 5, 6, 7)), ("0-1, 6", (0, 1, 6)), ("3", (3,))])
def test_devices_may_be_ranges(text: str, expected: tuple[int, ...]) -> None:
    assert Layout(devices=text).device_ids == expected


def test_like_repeats_the_encoder_over_the_consumers_context() -> None:
    llm = Layout(dp=2, cp=2, tp=2, devices="0-7")
    encoder = like(llm)
    assert encoder == Layout(dp=2, tp=2, copies=2, devices=tuple(range(8)))
    one, other = (plan_stages("m", module(), x, jax.devices())[0].mesh for x in (encoder, llm))
    assert one.devices.reshape(-1).tolist() == other.devices.reshape(-1).tolist()
    assert like(Layout(tp=2, pp=2)).device_ids == (0, 1)


def test_a_module_is_told_how_its_attention_reaches_over_cp() -> None:
    layout = Layout(dp=2, cp=4, context="ring")
    (plan,) = plan_stages("m", module(heads=8), layout, jax.devices())
    assert plan.axes.context == "ring" and str(layout) == "dp=2 x cp=4, context=ring"
    assert like(layout).context == "gather"


def test_picture_shows_every_device() -> None:
    plans = plan_stages("vision", module(), Layout(dp=2, devices="1,3"), jax.devices())
    plans += plan_stages("llm", module(), Layout(tp=2, pp=2), jax.devices())
    assert picture(plans, 5).splitlines() == [
        "device  vision          llm",
        "0       -               layers 0-2 tp0",
        "1       layers 0-4 dp0  layers 0-2 tp1",
        "2       -               layers 3-4 tp0",
        "3       layers 0-4 dp1  layers 3-4 tp1",
        "4       -               -",
    ]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_zigzag_is_a_permutation_with_equal_causal_work(cp: int) -> None:
    order = zigzag(16, cp)
    assert sorted(order) == list(range(16))
    work = (order + 1).reshape(cp, -1).sum(1)
    assert (work == work[0]).all()


def test_zero_1_cuts_the_first_dim_whose_shard_divides() -> None:
    grid = plan_stages("m", module(), Layout(dp=2, cp=2, tp=2), jax.devices())[0].grid
    replicas, last = ("dp", "cp"), P(None, "tp")
    assert grid.spread((3, 8, 6), P(None, None, "tp")).cut == P(None, replicas, "tp")
    assert grid.spread((3, 8), last) == Spread(last, replicas, 4, P(None, ("tp", *replicas)), 1, replicas)
    assert grid.spread((3, 6), last) == Spread(last, replicas, 4, last, None)
    assert grid.spread((8, 3), P(), stacked=True).dim is None
    alone = plan_stages("m", module(), Layout(tp=2), jax.devices())[0].grid
    assert alone.spread((3, 8), last) == Spread(last, replicas, 1, last, None)


def test_a_parameter_is_no_replica_along_axes_that_cut_it() -> None:
    grid = plan_stages("m", module(), Layout(dp=2, cp=2), jax.devices())[0].grid
    spread = grid.spread((4, 8), P("cp"))
    assert spread == Spread(P("cp"), ("dp",), 2, P(("cp", "dp"), None), 0, ("dp",))
    assert spread.accumulator == P(("dp",), "cp")


def test_zero_cuts_over_the_inner_part_of_dp_and_repeats_over_the_rest() -> None:
    plan = plan_stages("m", module(), Layout(dp=4, cp=2, zero=2, zero_size=2), jax.devices())[0]
    grid, inside = plan.grid, ("dp1", "cp")
    assert dict(grid.mesh.shape) == {"dp0": 2, "dp1": 2, "copies": 1, "cp": 2, "tp": 1}
    assert grid.spec(("batch", "seq")) == P(("dp0", "dp1"), "cp")
    weight = grid.spread((8, 3), P(None, "tp"), multiplies=True)
    assert weight.cut == P(inside, "tp") and weight.outside == ("dp0",) and weight.count == 2
    assert weight.accumulator == P(("dp0",), inside, "tp"), "one for each set of shards, in shards"
    norm = grid.spread((8,), P())
    assert norm.cut == P(inside) and not norm.early and norm.accumulator == P(("dp0", *inside)) and norm.count == 8
    assert "dp3 cp1" in picture([plan], 8)


@pytest.mark.parametrize(("zero", "early"), [(1, False), (2, True), (3, True)])
def test_only_zero_2_and_3_scatter_each_microbatchs_gradient(zero: int, early: bool) -> None:
    grid = plan_stages("m", module(), Layout(dp=2, zero=zero), jax.devices())[0].grid
    assert grid.spread((8, 3), P(), multiplies=True).early is early
    assert not grid.spread((7, 3), P(), multiplies=True).early, "no dim divides: it is nowhere in shards"


def test_without_shards_every_replica_keeps_all() -> None:
    grid = plan_stages("m", module(), Layout(dp=4, zero_size=1), jax.devices())[0].grid
    assert grid.spread((8, 4), P()) == Spread(P(), ("dp", "cp"), 4, P(), None)


def test_axes_fold_into_parts_that_nest() -> None:
    assert fold("dp", 8, []) == fold("dp", 8, [1, 8]) == {"dp": 8}
    folded = fold("dp", 8, [4, 2])
    assert folded == {"dp0": 2, "dp1": 2, "dp2": 2}
    assert [innermost(folded, size) for size in (1, 2, 4)] == [(), ("dp2",), ("dp1", "dp2")]
    with pytest.raises(ValueError, match="inner parts of dp=12 of 4 and of 6 devices do not nest"):
        fold("dp", 12, [4, 6])


REFUSED = [
    (Layout(tp=3), module(), "m: tp=3 does not divide heads=8; use tp of 1, 2, 4, 8"),
    (Layout(tp=8), module(), "m: tp=8 does not divide kv_heads=4; use tp of 1, 2, 4"),
    (
        Layout(dp=16),
        module(),
        "m: dp=16 stands on device 8, but there are 8 (0 to 7); use fewer devices, or emulate more",
    ),
    (
        Layout(dp=2, devices="0-2"),
        module(),
        "m: dp=2 needs 2 devices, Layout.devices names 3; name 2, or change the layout",
    ),
    (Layout(dp=2, devices=(1, 1)), module(), "m: Layout.devices names device 1 2 times; name each device once"),
    (Layout(devices=(-1,)), module(), "m: dp=1 stands on device -1, but there are 8"),
    (Layout(pp=6), module(), "m: pp=6 stages for 5 layers; use pp of at most 5"),
    (Layout(pp=3, vpp=2), module(), "m: pp=3 x vpp=2 = 6 stages for 5 layers; use pp x vpp of at most 5"),
    (
        Layout(pp=2, vpp=2, layers=(3, 2)),
        module(),
        "m: Layout.layers=[3, 2] must be pp=2 x vpp=2 = 4 counts of at least 1 that add up to 5",
    ),
    (
        Layout(pp=2, layers=(4, 2)),
        module(),
        "m: Layout.layers=[4, 2] must be pp=2 counts of at least 1 that add up to 5",
    ),
    (
        Layout(pp=2, layers=(5, 0)),
        module(),
        "m: Layout.layers=[5, 0] must be pp=2 counts of at least 1 that add up to 5",
    ),
    (Layout(pp=2, layers=(5,)), module(), "m: Layout.layers=[5] must be pp=2 counts of at least 1"),
    (
        Layout(cp=4, tp=2, context="heads"),
        module(heads=12),
        "m: context='heads' cuts heads over cp, and cp=4 does not divide the 6 of heads=12 that tp=2 leaves a device; "
        "use cp of 1, 2, 3, 6, or context='ring'",
    ),
    (
        Layout(cp=2, context="ring"),
        module(),
        "m: context='ring', but the model's code reaches over cp in its own way; leave context out",
    ),
    (Layout(cp=2), module(axes=frozenset({"dp"})), "m: cp=2, but the model's code does not handle cp (it handles dp)"),
]


@pytest.mark.parametrize(("layout", "definition", "message"), REFUSED)
def test_impossible_layouts_are_refused(layout: Layout, definition: ModuleDef, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_stages("m", definition, layout, jax.devices())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dp=0), "Layout.dp=0; it must be a whole number of at least 1"),
        (dict(tp=1.5), "Layout.tp=1.5; it must be a whole number of at least 1"),
        (
            dict(vpp=2),
            "Layout.vpp=2 deals stages to the devices of pp, and with pp=1 to the same ones each time; set vpp=1, or",
        ),
        (dict(pp=2, vpp=0), "Layout.vpp=0; it must be a whole number of at least 1"),
        (dict(pp=True), "Layout.pp=True; it must be a whole number of at least 1"),
        (dict(cp=2, context="rings"), "Layout.context='rings'; it must be one of gather, ring, heads"),
        (
            dict(context="ring"),
            "Layout.context='ring' with cp=1, where no sequence is cut; set cp, or leave context out",
        ),
        (dict(devices="0-x"), "Layout.devices='0-x': '0-x' is neither a number nor a range; write '0-3,6'"),
        (
            dict(offload="residuals"),
            "Layout.offload='residuals'; it must be a list, such as ['parameters', 'optimizer', 'residuals', 'bound",
        ),
        (
            dict(offload=["weights"]),
            "Layout.offload has 'weights'; it may have parameters, optimizer, residuals, boundaries",
        ),
        (
            dict(offload=("optimizer", "optimizer")),
            "Layout.offload has 'optimizer' 2 times; name it once",
        ),
        (dict(zero=4), "Layout.zero=4; it must be 1, 2 or 3, a stage of ZeRO"),
        (dict(zero=True), "Layout.zero=True; it must be 1, 2 or 3"),
        (dict(dp=6, zero_size=4), "Layout.zero_size=4 is no part of dp=6; use 1, 2, 3, 6, or None for all of dp"),
        (dict(dp=2, zero_size=0), "Layout.zero_size=0 is no part of dp=2; use 1, 2, or None"),
        (
            dict(zero=2, tp=4),
            "Layout.zero=2 cuts over the data replicas, of which there is one (dp=1, zero_size=None, cp=1)",
        ),
        (dict(dp=2, zero=3, zero_size=1), "there is one (dp=2, zero_size=1, cp=1); set zero=1, or more of them"),
        (dict(devices="5-2"), "Layout.devices='5-2': the range '5-2' runs backwards; write '2-5'"),
    ],
)
def test_malformed_layouts_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout(**settings)


@pytest.mark.parametrize(
    ("layout", "is_sink", "message"),
    [
        (
            Layout(dp=3),
            True,
            "m: dp=3 does not divide the microbatch's groups=4; set groups to a multiple of 3, or dp to a divisor of 4",
        ),
        (Layout(dp=5), False, "m: dp=5 does not divide the microbatch's 8 item slots (groups x slots_per_group)"),
        (
            Layout(cp=4),
            True,
            "m: cp=4 cuts the sequence into 8 chunks (zig-zag), which do not divide seq_len=12; make",
        ),
    ],
)
def test_layouts_that_do_not_divide_the_microbatch_are_refused(layout: Layout, is_sink: bool, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_batch("m", layout, is_sink=is_sink, groups=4, items=8, seq=12)
