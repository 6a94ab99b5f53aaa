"""A shrunk model has the same kinds of layers, in sizes that its layout divides."""

import dataclasses

import pytest

from hetjax.core.layout import Layout
from hetjax.run.shrink import _smaller
from models.decoder import Decoder
from models.moe import Experts

MIXTRAL = Decoder(
    vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_width=14336,
    experts=Experts(64, 6, 1408, renormalise=False),
)  # fmt: skip


@pytest.mark.parametrize(
    ("dense", "kinds"),
    [
        ((), ("moe", "moe", "moe")),
        ((0,), ("mlp", "moe", "moe")),
        ((7, 31), ("mlp", "moe", "moe")),
        (tuple(range(31)), ("mlp", "mlp", "moe")),
    ],
)
def test_experts_become_fewer_and_narrower_beside_dense_layers(dense: tuple[int, ...], kinds: tuple[str, ...]) -> None:
    assert MIXTRAL.experts is not None
    large = dataclasses.replace(MIXTRAL, experts=dataclasses.replace(MIXTRAL.experts, dense_layers=dense))
    small = _smaller(large, Layout(tp=4, pp=3), {})
    assert small.kinds == kinds and not small.experts.renormalise
    assert small.experts.count == 4 and small.experts.per_token == 4 and small.experts.width % 4 == 0


def test_heads_stay_as_many_as_an_exchange_of_them_needs() -> None:
    large = Decoder(vocab_size=32, width=512, num_layers=4, num_heads=64, num_kv_heads=64, mlp_width=64)
    assert _smaller(large, Layout(tp=2, cp=4, context="heads"), {}).num_heads == 8
    assert _smaller(large, Layout(tp=2, cp=4), {}).num_heads == 2
