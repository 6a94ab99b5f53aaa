"""A tiny vision-language model and random microbatches of the real shape, for tests that compile."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetjax.core.graph import Graph, Module, vlm
from hetjax.core.layout import Layout
from hetjax.core.optimizer import OptimizerConfig
from hetjax.core.remat import Remat
from hetjax.core.train_spec import TrainSpec
from hetjax.core.trainer import Trainer
from models.cross_attention import CrossAttention
from models.decoder import Decoder
from models.moe import Experts
from models.vit import ViT
from models.whisper import Whisper

VOCAB, SEQ, WIDTH = 64, 16, 16
EXPERTS = Experts(count=6, per_token=2, width=12, dense_layers=(1,))  # of the decoder's four layers


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one microbatch."""

    samples: int = 8
    groups: int = 8
    slots: int = 16
    microbatches: int = 4


def decoder(**changes: Any) -> Decoder:
    """Four layers, grouped-query attention with four key-value heads so that tp 4 divides."""
    sizes = dict(
        vocab_size=VOCAB,
        width=WIDTH,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        mlp_width=32,
        qk_norm=True,
        attention_bias=True,
    )
    return Decoder(**(sizes | changes))


def vit(**changes: Any) -> ViT:
    """Two layers on 8x8 pictures in four patches."""
    sizes = dict(image_size=8, patch_size=4, width=16, num_layers=2, num_heads=4, mlp_width=32, output_width=WIDTH)
    return ViT(**(sizes | changes))


def whisper(**changes: Any) -> Whisper:
    """Two layers on clips of up to 16 frames in four rows, which see nothing but their own."""
    sizes = dict(num_mels=5, width=16, num_layers=2, num_heads=4, mlp_width=32, output_width=WIDTH, num_positions=8)
    return Whisper(**(sizes | dict(variant="qwen2_audio") | changes))


def graph(
    llm: Layout,
    encoders: dict[str, Layout],
    dtype: Any,
    *,
    tied: bool = False,
    remat: Remat = Remat.FULL,
    feature_layer: int | tuple[int, ...] = -1,
    experts: Experts | None = None,
    unroll: bool = False,
    kv_heads: int = 4,
    vocab: int = VOCAB,
    seeing: Experts | None = None,
    deepstack: tuple[int, ...] = (),
    cross: tuple[int, ...] = (),
) -> Graph:
    """The tiny model under these layouts. An encoder called audio hears, all others see, with the experts `seeing`."""
    pictures = vit(feature_layer=feature_layer, deepstack=deepstack, experts=seeing)
    models = {name: whisper() if name == "audio" else pictures for name in encoders}
    how = dict(remat=remat, unroll=unroll)
    towers = tuple(Module(n, models[n].module(dtype, name=n), layout, **how) for n, layout in encoders.items())
    sizes = dict(tied=tied, experts=experts, num_kv_heads=kv_heads, vocab_size=vocab)
    attended = "audio" if deepstack else "vision"  # layers attend to an encoder without features of layers
    sizes |= {"cross_attention": CrossAttention(cross, attended, gate=0.5)} if cross else {}
    deep = {name: len(deepstack) for name in encoders if name != "audio"}
    language = decoder(**sizes).module(dtype, encoders=tuple(encoders), deepstack=deep)
    return vlm(towers, Module("llm", language, llm, **how))


def microbatches(
    shape: Shape,
    encoders: tuple[str, ...] = ("vision",),
    *,
    seed: int = 0,
    rows: int = 4,
    text_only: tuple[int, ...] = (),
    vocab: int = VOCAB,
) -> list:
    """Random microbatches: 0 to 2 pictures, or ragged clips, a sample, packed and padded rows, uneven targets."""
    rng = np.random.default_rng(seed)
    found = [_microbatch(rng, shape, encoders, rows, i in text_only) for i in range(shape.microbatches)]
    return [m | {name: m[name] % vocab for name in ("tokens", "targets")} for m in found]


def _microbatch(
    rng: np.random.Generator, shape: Shape, encoders: tuple[str, ...], rows: int, text_only: bool
) -> dict[str, np.ndarray]:
    b, s = shape.samples, SEQ
    tokens = rng.integers(0, VOCAB, (b, s)).astype(np.int32)
    lengths = rng.integers(s // 2, s + 1, b)
    second = rng.integers(4, s // 2, b)  # where a packed second document starts
    place = np.arange(s)
    packed = rng.random(b) < 0.5
    segments = np.where(packed[:, None] & (place >= second[:, None]), 2, 1) * (place < lengths[:, None])
    positions = np.where(segments == 2, place - second[:, None], place)
    batch = dict(
        tokens=tokens,
        positions=positions.astype(np.int32),
        segment_ids=segments.astype(np.int32),
        targets=np.roll(tokens, -1, 1),
        weights=((segments > 0) & (rng.random((b, s)) < 0.7)).astype(np.float32),
    )
    per_group, slots_per_group = b // shape.groups, shape.slots // shape.groups
    free = np.ones((b, s), bool)
    for name in encoders:
        index = np.full((b, s), -1, np.int32)
        for group in range(shape.groups):
            slots = list(range(group * slots_per_group, (group + 1) * slots_per_group))
            for sample in range(group * per_group, (group + 1) * per_group):
                for start in rng.permutation(s // rows)[: 0 if text_only else rng.integers(0, 3)] * rows:
                    if slots and free[sample, start : start + rows].all():
                        index[sample, start : start + rows] = slots.pop(0) * rows + np.arange(rows)
                        free[sample, start : start + rows] = False
        used = np.isin(np.arange(shape.slots), index[index >= 0] // rows)
        if name == "audio":
            batch |= _clips(rng, index, used)
            continue
        pixels = rng.normal(size=(shape.slots, 8, 8, 3)) * used[:, None, None, None]
        batch |= {
            f"{name}.index": index,
            f"{name}.pixels": pixels.astype(np.float32),
            f"{name}.used": used.astype(np.int32),
        }
    return batch


def _clips(rng: np.random.Generator, index: np.ndarray, used: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of clips that take the first rows of those in `index`, as many as their length asks for."""
    model = whisper()
    frames = rng.integers(3, model.context + 1, len(used)).astype(np.int32) * used
    rows = np.array([model.rows_of(int(n)) for n in frames])
    shown = (index >= 0) & (index % model.rows < rows[index // model.rows])
    mel = rng.normal(size=(len(used), model.frames, model.num_mels)) * used[:, None, None]
    arrays = {"index": np.where(shown, index, -1), "mel": mel.astype(np.float32), "frames": frames}
    return {f"audio.{name}": array for name, array in arrays.items()}


def trainer(
    graph: Graph, shape: Shape, config: OptimizerConfig, *, dtype: Any = jnp.float32, **options: Any
) -> Trainer:
    """A compiled trainer on the emulated devices."""
    example = microbatches(shape, tuple(e.name for e in graph.encoders))[0]
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in example.items()}
    spec = TrainSpec(
        graph=graph,
        devices=jax.devices(),
        batch=abstract,
        groups=shape.groups,
        num_microbatches=shape.microbatches,
        optimizer=config,
        param_dtype=dtype,
        **options,
    )
    built = Trainer(spec)
    built.compile()
    return built
