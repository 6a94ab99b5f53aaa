"""How much a model computes, and how much a device can: the one source of FLOPs.

Counted are a model's FLOPs, not a device's: those of matrix products, two per multiply-add, on the whole row whether
packed or padded. What a layout repeats (copies, rematerialised layers) is not counted; nor are lookups, norms and
activations. A backward costs two forwards, so a trained parameter costs 6 FLOPs per token it meets (arXiv:2001.08361).

Of attention there are two figures: with every query on every key, as some papers report it and as a kernel without
masks computes it, and with the half that a causal mask leaves. `total` has the causal one.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from models.decoder import Decoder
from models.moe import Experts
from models.vit import ViT
from models.whisper import Whisper

# Dense bf16 FLOP/s by the start of `jax.Device.device_kind`, from the vendors' data sheets. NVIDIA prints them with
# sparsity, twice as much. TPUs whose chip is two devices are left out.
PEAK_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by what they are spent on."""

    matmul: float = 0  # products with parameters
    attention: float = 0  # scores and weighted sums, every query on every key
    causal_attention: float = 0  # the part of `attention` that the mask leaves; all of it where there is none

    @property
    def total(self) -> float:
        """With attention as the mask leaves it."""
        return self.matmul + self.causal_attention

    @property
    def total_non_causal(self) -> float:
        """With attention of every query on every key."""
        return self.matmul + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.causal_attention + other.causal_attention,
        )

    def __mul__(self, count: float) -> "Flops":
        return Flops(self.matmul * count, self.attention * count, self.causal_attention * count)


Parts = dict[str, Flops]  # of a module's first, layers and last


def decoder_parts(config: Decoder, seq_len: int, *, attended: float = 0) -> Parts:
    """A token's share of the forward on rows of `seq_len` tokens; logits are the last part's. `attended`: rows of an
    encoder for each token, which layers attend to; counted as if every token saw those of its row.

    A sliding window of w counts as w keys per query, and under the mask as the w (1 - w / 2 seq_len) that it averages.
    """
    d, heads = config.width, config.num_heads * config.head_features
    kv_heads = config.num_kv_heads * config.head_features
    attention_products = d * heads + 2 * d * kv_heads + heads * d
    mlp = 3 * d * config.mlp_width
    of_kind = {
        "mlp": attention_products + mlp,
        "cross": 2 * d * heads + 2 * d * kv_heads * attended + mlp,
        "moe": attention_products + _mixture(config.experts, d),
    }
    layers, crossed = sum(of_kind[kind] for kind in config.kinds), config.kinds.count("cross")
    keys = min(seq_len, config.sliding_window or seq_len)
    own = 4 * heads * keys * (config.num_layers - crossed)
    cross = 4 * heads * attended * seq_len * crossed
    return {
        "first": Flops(),
        "layers": Flops(2 * layers, own + cross, own * (1 - keys / (2 * seq_len)) + cross),
        "last": Flops(matmul=2 * d * config.vocab_size),
    }


def _mixture(experts: Experts | None, width: int) -> int:
    """Multiply-adds of a token: the router, those experts that it goes to, and the shared one with its gate."""
    if experts is None:
        return 0
    hidden = experts.per_token * experts.width + experts.shared_width
    return width * (experts.count + 3 * hidden + experts.shared_gate)


def vit_parts(config: ViT) -> Parts:
    """The forward of one picture through the layers that are built and the projector."""
    d, tokens = config.width, config.num_tokens
    behind = {"mlp": 2 * d * config.mlp_width, "moe": _mixture(config.experts, d)}
    layers, features = sum(4 * d * d + behind[kind] for kind in config.kinds), d * len(config.depths)
    patches = config.num_patches * 3 * config.patch_size**2 * d
    deep = len(config.deep) * (d + config.output_width) * config.hidden
    projector = config.rows * ((features + config.output_width) * config.hidden + deep)
    attention = 4 * tokens * tokens * d * config.num_built
    return {
        "first": Flops(matmul=2 * patches),
        "layers": Flops(2 * tokens * layers, attention, attention),
        "last": Flops(matmul=2 * projector),
    }


def whisper_parts(config: Whisper) -> Parts:
    """The forward of one slot: its whole context, however long the clip."""
    d, n = config.width, config.positions
    convolutions = 3 * config.num_mels * d * config.context + 3 * d * d * n
    out = config.output_width
    projector = d * out if config.hidden is None else (d + out) * config.hidden
    attention = 4 * n * n * d * config.num_layers
    return {
        "first": Flops(matmul=2 * convolutions),
        "layers": Flops(2 * n * (4 * d * d + 2 * d * config.mlp_width) * config.num_layers, attention, attention),
        "last": Flops(matmul=2 * config.rows * projector),
    }


def decoder_forward(config: Decoder, seq_len: int) -> Flops:
    """All parts of `decoder_parts`."""
    return total(decoder_parts(config, seq_len))


def vit_forward(config: ViT) -> Flops:
    """All parts of `vit_parts`."""
    return total(vit_parts(config))


def total(parts: Parts) -> Flops:
    """The parts together."""
    return sum(parts.values(), Flops())


def forward(config: Any, *, rows: int, seq_len: int, items: int, attended: int = 0) -> Parts | None:
    """The forward of a microbatch of `rows` rows and `items` pictures or clips; None for an unknown kind of model.
    `attended`: rows of all items that layers of a decoder attend to."""
    if isinstance(config, Decoder):
        count = rows * seq_len
        parts = decoder_parts(config, seq_len, attended=attended / count)
    elif isinstance(config, (ViT, Whisper)):
        parts, count = whisper_parts(config) if isinstance(config, Whisper) else vit_parts(config), items
    else:
        return None
    return {name: flops * count for name, flops in parts.items()}


def training(forward: Flops, *, trainable: bool = True, backward: bool = True) -> Flops:
    """Forward and backward. What is frozen skips the gradients of its parameters, and where nothing before it trains
    (`backward` false) the backward altogether."""
    if not backward:
        return forward
    return Flops(forward.matmul * (3 if trainable else 2), forward.attention * 3, forward.causal_attention * 3)


def module_training(parts: Parts, *, trainable: Collection[str], upstream: bool) -> Flops:
    """Forward and backward of a module of which the parts `trainable` train; `upstream`: so does a module before it."""
    found, backward = Flops(), upstream
    for name, flops in parts.items():
        backward = backward or name in trainable
        found += training(flops, trainable=name in trainable, backward=backward)
    return found


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device, None where they are not known. `device_kind` as jax names it."""
    known = [name for name in PEAK_BF16 if f"{device_kind} ".startswith((f"{name} ", f"{name}-"))]
    return PEAK_BF16[max(known, key=len)] if known else None
