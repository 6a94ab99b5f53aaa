"""The grouped product against its definition, row by row, in blocks and by a stand-in for the kernels of GPUs."""

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from models import grouped, grouped_gradients, grouped_kernels, hopper
from models.group_blocks import Blocks, Form
from models.grouped import BLOCKS, grouped_dot, pick
from models.grouped_kernels import refusal

ROWS, GROUPS, WIDTH, COLUMNS, BLOCK = 37, 6, 5, 7, 8
ALL_TO_ONE = [[ROWS, 0, 0, 0, 0, 0], [0, 0, ROWS, 0, 0, 0], [0, 0, 0, 0, 0, ROWS]]
FEW = [[1] * GROUPS, [0] * GROUPS, [0, 0, 1, 0, 0, 0], [8, 16, 0, 8, 0, 0], [0, 7, 9, 0, 1, 3], [9, 9, 9, 9, 0, 0]]
RNG = np.random.default_rng(0)
DRAWN = [RNG.multinomial(n, RNG.dirichlet(np.full(GROUPS, 0.5))).tolist() for n in (ROWS, ROWS, ROWS, 30, 12)]
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(params=[False, True], ids=["as many turns as blocks", "a fixed number"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Form:
    """Small blocks, with the loop of a CPU and that of a GPU."""
    chosen = Form(BLOCK, request.param)
    monkeypatch.setattr(grouped, "pick", lambda x, w: chosen)
    return chosen


@pytest.fixture
def given() -> Arrays:
    """x, w and the gradient of the result."""
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=s) for s in ((ROWS, WIDTH), (GROUPS, WIDTH, COLUMNS), (ROWS, COLUMNS)))


def outputs(x: Any, w: Any, g: Any, sizes: Any) -> tuple[Any, Any, Any]:
    """The product, and the gradients of x and w."""
    y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)
    return y, *pull(g)


def program() -> Callable[..., tuple[Any, Any, Any]]:
    """`outputs`, compiled once for all sizes."""
    compiled = jax.jit(lambda *given: outputs(*given))
    return lambda x, w, g, sizes: jax.tree.map(np.asarray, compiled(x, w, g, np.array(sizes, np.int32)))


def definition(x: np.ndarray, w: np.ndarray, g: np.ndarray, sizes: list[int]) -> Arrays:
    """Row by row; what is behind the last group is 0 and in no gradient."""
    y, g_x, g_w = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row], g_x[row] = x[row] @ w[group], w[group] @ g[row]
        g_w[group] += np.outer(x[row], g[row])
    return y, g_x, g_w


def test_values_and_gradients_are_those_of_the_definition(form: Form, given: Arrays, x64: None) -> None:
    run = program()
    for sizes in (*ALL_TO_ONE, *FEW, *DRAWN):
        for found, expected in zip(run(*given, sizes), definition(*given, sizes), strict=True):
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11, err_msg=str(sizes))


def test_what_is_no_number_stays_in_its_group(form: Form, given: Arrays, x64: None) -> None:
    """And behind the last group it goes nowhere."""
    sizes, bad, behind = [7, 9, 0, 11, 3, 0], slice(16, 27), slice(30, None)
    x, w, g = (a.copy() for a in given)
    x[bad] = g[bad] = x[behind] = g[behind] = np.nan
    w[[2, 5]] = np.nan  # those without rows
    y, g_x, g_w = program()(x, w, g, sizes)
    expected = definition(*given, sizes)
    for found, wanted in ((y, expected[0]), (g_x, expected[1])):
        assert np.isnan(found[bad]).all()
        np.testing.assert_allclose(np.delete(found, bad, 0), np.delete(wanted, bad, 0), rtol=1e-11, atol=1e-11)
    assert np.isnan(g_w[3]).all()
    np.testing.assert_allclose(np.delete(g_w, 3, 0), np.delete(expected[2], 3, 0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 5, BLOCK, ROWS])
def test_a_loop_turns_once_for_each_block_and_a_fixed_one_as_often_as_the_worst_sizes_need(rows: int) -> None:
    turns = lambda sizes: int(Blocks(Form(rows, False), ROWS, jnp.array(sizes, jnp.int32)).count)
    fixed = Blocks(Form(rows, True), ROWS, jnp.zeros(GROUPS, jnp.int32)).count
    for sizes in (*ALL_TO_ONE, *FEW, *DRAWN):
        assert turns(sizes) == sum(-(-size // rows) for size in sizes) <= fixed
    full = (ROWS - GROUPS) // rows * rows  # and a row in each of the others
    assert fixed - 1 <= turns([full + 1, *[1] * (GROUPS - 1)]) and fixed <= -(-ROWS // rows) + GROUPS


def test_a_program_of_more_experts_has_no_larger_workspace() -> None:
    """Nor a copy of all weights in the precision of the rows."""

    def workspace(groups: int) -> int:
        x, w, g = (256, 32), (groups, 32, 64), (256, 64)
        given = (x, jnp.bfloat16), (w, jnp.float32), (g, jnp.bfloat16), ((groups,), jnp.int32)
        compiled = jax.jit(outputs).lower(*(jax.ShapeDtypeStruct(*of) for of in given)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert workspace(64) < 1.3 * workspace(8)


def test_a_platform_has_its_form(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def form(platform: str, kind: str, rows: int, groups: int) -> Form | None:
        monkeypatch.setattr(grouped, "program_device", lambda: SimpleNamespace(platform=platform, device_kind=kind))
        return pick(jnp.zeros((rows, 128), jnp.bfloat16), jnp.zeros((groups, 128, 256), jnp.bfloat16))

    least, most = BLOCKS["gpu"]
    hopper.say.cache_clear()
    assert form("cpu", "cpu", 1024, 8) == Form(BLOCKS["cpu"][0], False) and form("cpu", "cpu", 3, 8) == Form(3, False)
    assert not caplog.records
    assert form("gpu", "NVIDIA A100", 4096, 8) == Form(256, True)
    assert form("gpu", "NVIDIA A100", 128, 64) == Form(least, True)
    assert form("gpu", "NVIDIA A100", 65536, 8) == Form(most, True)
    assert [r.getMessage().split(", not ")[1] for r in caplog.records] == ["NVIDIA A100"]
    monkeypatch.setattr(hopper, "missing", lambda modules: None)
    assert form("gpu", "NVIDIA H100", 4096, 8) is None and form("gpu", "NVIDIA H100", 4000, 8) == Form(128, True)


def test_what_the_kernels_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "missing", lambda modules: None)
    assert refusal("NVIDIA H100 80GB HBM3", jnp.bfloat16, 256, 128, 768) is None
    assert "not float32" in refusal("NVIDIA H100 80GB HBM3", jnp.float32, 256, 128, 768)
    assert "256 rows of 96 and 128 features" in refusal("NVIDIA H200", jnp.bfloat16, 256, 96, 128)
    monkeypatch.setattr(hopper, "missing", lambda modules: str(modules))
    assert "ragged_dot" in refusal("NVIDIA H200", jnp.bfloat16, 256, 128, 128)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of the kernels, plain products that leave NaN behind the last group, as theirs do; what they were asked
    for."""
    asked: list[str] = []

    def product(x: Any, w: Any, sizes: Any, dtype: Any, config: Any) -> jax.Array:
        asked.append("product")
        assert x.dtype == w.dtype
        behind = jnp.arange(len(x))[:, None] >= sizes.sum()
        return jnp.where(behind, jnp.nan, lax.ragged_dot(x, w, sizes)).astype(dtype)

    def gradient(x: Any, g: Any, sizes: Any, dtype: Any) -> jax.Array:
        asked.append("gradient")
        blocks = Blocks(grouped_gradients.BLOCK, len(x), sizes)
        of_group = jnp.repeat(jax.nn.one_hot(blocks.group, len(sizes), dtype=dtype), blocks.rows, 0)
        return jnp.einsum("ng,na,nb->gab", of_group, *(blocks.apart(a).astype(dtype) for a in (x, g)))

    def rows(g: Any, w: Any, sizes: Any) -> jax.Array:
        asked.append("rows")
        assert g.dtype == w.dtype
        behind = jnp.arange(len(g))[:, None] >= sizes.sum()
        return jnp.where(behind, 0, lax.ragged_dot(jnp.where(behind, 0, g), w.swapaxes(1, 2), sizes))

    monkeypatch.setattr(grouped_gradients, "weight_gradient", gradient)
    monkeypatch.setattr(grouped_gradients, "row_gradient", rows)
    fake = SimpleNamespace(ragged_dot_kernel=product)
    names = SimpleNamespace(Config=dict, MatmulDimension=SimpleNamespace(M=0))
    for name, module in zip(grouped_kernels.KERNELS, (fake, names), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(grouped, "pick", lambda x, w: None)
    return asked


def test_kernels_give_what_blocks_do(stand_in: list[str], given: Arrays) -> None:
    """In the kernels' 16 bits; weights of 32 bits have gradients of 32 bits."""
    x, w, g = (jnp.asarray(a, t) for a, t in zip(given, (jnp.bfloat16, jnp.float32, jnp.bfloat16), strict=True))
    sizes, behind = [7, 9, 0, 11, 3, 0], slice(30, None)
    expected = definition(*(np.asarray(a, np.float64) for a in (x, w.astype(jnp.bfloat16), g)), sizes)
    x, g = x.at[behind].set(jnp.nan), g.at[behind].set(jnp.nan)
    y, g_x, g_w = jax.jit(functools.partial(outputs))(x, w, g, jnp.array(sizes, jnp.int32))
    assert stand_in == ["product", "rows", "gradient"]
    assert (y.dtype, g_x.dtype, g_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for found, wanted, near in zip((y, g_x, g_w), expected, (1e-2, 1e-2, 1e-6), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=near, atol=near)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax before 0.11 does not simulate transposed operands")
@pytest.mark.parametrize("sizes", [[5, 0, 64, 100, 1, 77, 3], [0, 256, 0, 0, 0, 0, 0], [0] * 7])
def test_the_gradient_kernel_in_simulation(sizes: list[int]) -> None:
    """By jax's simulation of Hopper's shared memory, threads and barriers, which looks for races."""
    from jax.experimental.pallas import mosaic_gpu

    rng = np.random.default_rng(2)
    x, g = (jnp.asarray(rng.normal(size=(256, width)), jnp.bfloat16) for width in (128, 256))
    behind = slice(sum(sizes), None)
    wanted = definition(np.float64(x), np.zeros((len(sizes), 128, 256)), np.float64(g), sizes)[2]
    found = grouped_gradients.weight_gradient(
        x.at[behind].set(jnp.nan),
        g.at[behind].set(jnp.nan),
        jnp.array(sizes, jnp.int32),
        jnp.float32,
        interpret=mosaic_gpu.InterpretGPUParams(detect_races=True),
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax before 0.11 does not simulate transposed operands")
@pytest.mark.parametrize("sizes", [[5, 0, 64, 100, 1, 77, 3], [0, 256, 0, 0, 0, 0, 0], [0] * 7])
def test_the_row_kernel_in_simulation(sizes: list[int]) -> None:
    from jax.experimental.pallas import mosaic_gpu

    rng = np.random.default_rng(3)
    g = jnp.asarray(rng.normal(size=(256, 256)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(len(sizes), 128, 256)), jnp.bfloat16)
    wanted = definition(np.zeros((256, 128)), np.float64(w), np.float64(g), sizes)[1]
    found = grouped_gradients.row_gradient(
        g.at[sum(sizes) :].set(jnp.nan),
        w,
        jnp.array(sizes, jnp.int32),
        interpret=mosaic_gpu.InterpretGPUParams(detect_races=True),
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(found), wanted, rtol=1e-2, atol=1e-2)
