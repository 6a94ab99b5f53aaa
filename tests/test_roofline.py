"""The roofline counts what programs compute and move, and its checks see what they are there to see."""

import sys

import jax
import jax.numpy as jnp
import pytest
import runs
from jax import lax

sys.path.append(str(runs.ROOT / "benchmarks"))

import cost
import hlo
from gradients import narrowed, traffic

# A layer's gradient, from rows of 32 tokens, is added in place to a stack of four; so a backward looks for a GPU.
BACKWARD = """\
HloModule backward, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }, entry_computation_layout={}

%fused_update (acc.1: f32[4,8,16], g.1: f32[8,16], row.1: s32[]) -> f32[4,8,16] {
  %acc.1 = f32[4,8,16]{2,1,0} parameter(0)
  %g.1 = f32[8,16]{1,0} parameter(1)
  %row.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %old.1 = f32[1,8,16]{2,1,0} dynamic-slice(%acc.1, %row.1, %zero.1, %zero.1), dynamic_slice_sizes={1,8,16}
  %new.1 = f32[1,8,16]{2,1,0} bitcast(%g.1)
  %sum.1 = f32[1,8,16]{2,1,0} add(%old.1, %new.1)
  ROOT %update.1 = f32[4,8,16]{2,1,0} dynamic-update-slice(%acc.1, %sum.1, %row.1, %zero.1, /*index=4*/%zero.1)
}

%fused_weight (w.2: f32[4,8,16], row.2: s32[]) -> f32[8,16] {
  %w.2 = f32[4,8,16]{2,1,0} parameter(0)
  %row.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %slice.2 = f32[1,8,16]{2,1,0} dynamic-slice(%w.2, %row.2, %zero.2, %zero.2), dynamic_slice_sizes={1,8,16}
  ROOT %out.2 = f32[8,16]{1,0} bitcast(%slice.2)
}

%fused_zeros () -> f32[4,8,16] {
  %zero.3 = f32[] constant(0)
  ROOT %zeros.3 = f32[4,8,16]{2,1,0} broadcast(%zero.3), dimensions={}
}

%body (carry.4: (s32[], f32[4,8,16], bf16[32,8], bf16[32,16], f32[4,8,16])) -> (s32[], f32[4,8,16]) {
  %carry.4 = (s32[], f32[4,8,16]{2,1,0}, bf16[32,8]{1,0}, bf16[32,16]{1,0}, f32[4,8,16]{2,1,0}) parameter(0)
  %row.4 = s32[] get-tuple-element(%carry.4), index=0
  %acc.4 = f32[4,8,16]{2,1,0} get-tuple-element(%carry.4), index=1
  %x.4 = bf16[32,8]{1,0} get-tuple-element(%carry.4), index=2
  %gy.4 = bf16[32,16]{1,0} get-tuple-element(%carry.4), index=3
  %w.4 = f32[4,8,16]{2,1,0} get-tuple-element(%carry.4), index=4
  %weight.4 = f32[8,16]{1,0} fusion(%w.4, %row.4), kind=kLoop, calls=%fused_weight
  %g.4 = f32[8,16]{1,0} dot(%x.4, %gy.4), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %new.4 = f32[4,8,16]{2,1,0} fusion(%acc.4, %g.4, %row.4), kind=kLoop, calls=%fused_update
  ROOT %out.4 = (s32[], f32[4,8,16]{2,1,0}, bf16[32,8]{1,0}, bf16[32,16]{1,0}, f32[4,8,16]{2,1,0}) tuple(%row.4, %new.4, %x.4, %gy.4, %w.4)
}

%condition (carry.5: (s32[])) -> pred[] {
  %carry.5 = (s32[]) parameter(0)
  ROOT %more.5 = pred[] constant(true)
}

ENTRY %main (w: f32[4,8,16], acc: f32[4,8,16], x: bf16[32,8], gy: bf16[32,16]) -> (f32[4,8,16]) {
  %w = f32[4,8,16]{2,1,0} parameter(0), metadata={op_name="params[\\'w\\']"}
  %acc = f32[4,8,16]{2,1,0} parameter(1)
  %x = bf16[32,8]{1,0} parameter(2)
  %gy = bf16[32,16]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %zeros = f32[4,8,16]{2,1,0} fusion(), kind=kLoop, calls=%fused_zeros
  %init = (s32[], f32[4,8,16]{2,1,0}, bf16[32,8]{1,0}, bf16[32,16]{1,0}, f32[4,8,16]{2,1,0}) tuple(%zero, %acc, %x, %gy, %w)
  %loop = (s32[], f32[4,8,16]{2,1,0}, bf16[32,8]{1,0}, bf16[32,16]{1,0}, f32[4,8,16]{2,1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %done = f32[4,8,16]{2,1,0} get-tuple-element(%loop), index=1
  ROOT %out = (f32[4,8,16]{2,1,0}) tuple(%done)
}
"""  # noqa: E501
LAYER = 8 * 16


def test_flops_and_bytes_of_a_loop_are_those_of_its_slices() -> None:
    found = {c.operation.name: c for c in cost.costs(hlo.parse(BACKWARD))}
    product, update, weight = found["g.4"], found["new.4"], found["weight.4"]
    assert (product.times, product.flops, product.kind, product.wide) == (4, 2 * LAYER * 32, "products", False)
    assert product.bytes == 2 * 32 * (8 + 16) + 4 * LAYER
    assert update.bytes == 3 * 4 * LAYER + 4 and weight.bytes == 2 * 4 * LAYER + 4  # the row's number, too
    rates = cost.Rates(products=2.0 * LAYER * 32, attention=1, bandwidth=1e9)
    assert product.seconds(rates) == 4 and update.seconds(rates._replace(bandwidth=update.bytes)) == 4


def test_a_loop_of_unknown_length_goes_as_far_as_its_slices() -> None:
    program = hlo.parse(BACKWARD.replace('"known_trip_count"', '"something_else"'))
    assert {c.operation.name: c.times for c in cost.costs(program)}["g.4"] == 4


def test_gradients_in_place_move_sixteen_bytes_and_fill_nothing() -> None:
    found = traffic(hlo.parse(BACKWARD))
    assert (found.bytes_per_parameter, found.dearest, found.fills, found.seconds) == (16, "acc 16.0", [], [])


def test_an_accumulator_that_is_emptied_by_a_flag_is_no_second_one() -> None:
    text = BACKWARD.replace("  %init = ", "  %emptied = f32[4,8,16]{2,1,0} multiply(%acc, %acc)\n  %init = ")
    found = traffic(hlo.parse(text.replace("tuple(%zero, %acc,", "tuple(%zero, %emptied,")))
    assert (found.fills, found.seconds) == ([], [])
    assert found.bytes_per_parameter == 16 + 4 + 8  # the product reads it twice


def test_a_second_stack_filled_with_zeros_and_added_later_is_seen() -> None:
    text = BACKWARD.replace("tuple(%zero, %acc,", "tuple(%zero, %zeros,").replace(
        "  ROOT %out = (f32[4,8,16]{2,1,0}) tuple(%done)",
        "  %sum = f32[4,8,16]{2,1,0} add(%acc, %done)\n  ROOT %out = (f32[4,8,16]{2,1,0}) tuple(%sum)",
    )
    found = traffic(hlo.parse(text))
    assert found.fills == ["f32[4, 8, 16] by zeros"] and found.seconds == ["f32[4, 8, 16] of loop"]
    assert found.bytes_per_parameter == 16 + 4 + 12


def test_weights_made_narrow_in_a_loop_are_named() -> None:
    narrow = "  ROOT %out.2 = bf16[8,16]{1,0} convert(%slice.2)"
    text = BACKWARD.replace("  ROOT %out.2 = f32[8,16]{1,0} bitcast(%slice.2)", narrow)
    assert narrowed(hlo.parse(BACKWARD)) == [] and narrowed(hlo.parse(text)) == ["params[w]"]
    assert narrowed(hlo.parse(text.replace(narrow, narrow.replace("bf16", "f64")))) == []
    of_gradient = BACKWARD.replace("  %sum.1 =", "  %other.1 = bf16[8,16]{1,0} convert(%g.1)\n  %sum.1 =")
    assert narrowed(hlo.parse(of_gradient)) == []


@pytest.mark.parametrize("layers", [1, 5])
def test_flops_of_a_compiled_program_are_known(layers: int) -> None:
    def forward(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    compiled = jax.jit(forward).lower(jnp.zeros((layers, 32, 32)), jnp.zeros((64, 32))).compile()
    found = cost.costs(hlo.parse(compiled.as_text()))
    assert sum(c.times * c.flops for c in found) == layers * 2 * 64 * 32 * 32
    moved = sum(c.times * c.bytes for c in found)
    assert moved >= 4 * layers * (32 * 32 + 2 * 64 * 32)  # weights once, activations in and out
    assert moved <= 4 * (layers * 8 + 2) * 64 * 32


MOSAIC = 'custom_call_target="mosaic_gpu_v2"'
CUDNN = """custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type": "%s"}"""


@pytest.mark.parametrize(
    ("results", "operands", "attributes", "products"),
    [
        ("bf16[2,64,8,16]", "%q, %k, %k", CUDNN % "CAUSAL", 2 / 2),
        ("bf16[2,64,8,16]", "%q, %k, %k", CUDNN % "NO_MASK", 2),
        (
            "(bf16[2,64,8,16], f32[2,8,64], f32[2,8,64])",
            "%q, %k, %k, %i, %i, %i",
            MOSAIC,
            1,
        ),
        ("bf16[2,64,8,16]", "%q, %k, %k, %i, %i", MOSAIC, 3),
        ("(bf16[2,32,4,16], bf16[2,32,4,16])", "%q, %k, %k, %i, %i", MOSAIC, 4),
    ],
)
def test_attention_kernels_count_the_products_that_the_mask_leaves(
    results: str, operands: str, attributes: str, products: float
) -> None:
    program = hlo.parse(f"""\
HloModule attention, entry_computation_layout={{}}

ENTRY %main (q: bf16[2,64,8,16], k: bf16[2,32,4,16], i: s32[2,1,64]) -> bf16[2,64,8,16] {{
  %q = bf16[2,64,8,16]{{3,2,1,0}} parameter(0)
  %k = bf16[2,32,4,16]{{3,2,1,0}} parameter(1)
  %i = s32[2,1,64]{{2,1,0}} parameter(2)
  ROOT %y = {results} custom-call({operands}), {attributes}
}}
""")
    [found] = cost.costs(program)
    assert found.kind == "attention" and found.flops == products * 2 * 2 * 64 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("name", "result", "operands"),
    [
        ("ragged_dot_sm90", "bf16[64,32]", "%x, %w, %sizes, %sizes"),
        ("ragged_contracting_dim_dot_sm90", "f32[4,16,32]", "%sizes, %sizes, %xt, %g"),
    ],
)
def test_kernels_of_grouped_products_count_each_row_once(name: str, result: str, operands: str) -> None:
    program = hlo.parse(f"""\
HloModule grouped, entry_computation_layout={{}}

ENTRY %main (x: bf16[64,16], xt: bf16[16,64], g: bf16[64,32], w: bf16[4,16,32], sizes: s32[4]) -> {result} {{
  %x = bf16[64,16]{{1,0}} parameter(0)
  %xt = bf16[16,64]{{1,0}} parameter(1)
  %g = bf16[64,32]{{1,0}} parameter(2)
  %w = bf16[4,16,32]{{2,1,0}} parameter(3)
  %sizes = s32[4]{{0}} parameter(4)
  ROOT %y = {result} custom-call({operands}), {MOSAIC}, metadata={{op_name="jit(f)/{name}/mpmd_map"}}
}}
""")
    [found] = cost.costs(program)
    assert (found.kind, found.flops, found.wide) == ("products", 2 * 64 * 16 * 32, False)
