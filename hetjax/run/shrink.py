"""A run in another's place: a small model of the same layouts, vocabulary and pictures; other precision."""

import dataclasses
import math
from typing import Any

from hetjax.core.layout import Layout
from hetjax.run.experiment import Experiment
from models.context import HEADS
from models.decoder import Decoder
from models.moe import Experts
from models.vit import ViT
from models.whisper import Whisper

HEAD_DIM = 8


def shrunk(experiment: Experiment) -> Experiment:
    """The experiment with every module cut down to sizes that its layout still divides."""
    llm = experiment.llm
    model = _smaller(llm.model, llm.layout, {})
    encoders = tuple(
        dataclasses.replace(e, model=_smaller(e.model, e.layout, {"output_width": model.width}), layout=_even(e.layout))
        for e in experiment.encoders
    )
    return dataclasses.replace(
        experiment, llm=dataclasses.replace(llm, model=model, layout=_even(llm.layout)), encoders=encoders
    )


def in_precision(experiment: Experiment, dtype: str) -> Experiment:
    """The experiment with activations of every module in `dtype`, and parameters too if it is as precise as float32."""
    return dataclasses.replace(
        experiment,
        llm=dataclasses.replace(experiment.llm, compute_dtype=dtype),
        encoders=tuple(dataclasses.replace(e, compute_dtype=dtype) for e in experiment.encoders),
        param_dtype="float32" if dtype == "bfloat16" else dtype,
    )


def _even(layout: Layout) -> Layout:
    """The layout, with its layers cut evenly: their number is another now."""
    return dataclasses.replace(layout, layers=None)


def _smaller(model: Any, layout: Layout, more: dict[str, int]) -> Any:
    """A model config of as many layers as stages (at least 2), and heads of `HEAD_DIM` in the same ratio."""
    if not isinstance(model, Decoder | ViT | Whisper):
        kind = type(model).__name__
        raise ValueError(f"--shrink knows the sizes of Decoder, ViT and Whisper, not of {kind}; leave it out")
    fields = {f.name for f in dataclasses.fields(model)}
    kv_heads = getattr(model, "num_kv_heads", model.num_heads)
    ratio = model.num_heads // kv_heads
    cuts = layout.tp * (layout.cp if layout.context == HEADS else 1)  # of the heads
    kv_heads = min(kv_heads, math.lcm(2, cuts))
    heads = kv_heads * ratio
    sizes: dict[str, Any] = more | {
        "num_layers": min(model.num_layers, max(2, layout.num_stages)),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "width": heads * HEAD_DIM,
        "head_dim": HEAD_DIM,
        "mlp_width": 4 * HEAD_DIM * layout.tp,
        "projector_width": 4 * HEAD_DIM * layout.tp,
    }
    built = sizes["num_layers"]
    if isinstance(model, ViT):  # as many features, as far apart as the layers allow
        behind = [min(model.num_built - depth, sizes["num_layers"]) for depth in model.depths]
        sizes |= {"feature_layer": tuple(-1 - n for n in behind)}
        built = max(1, built - min(behind))
    if isinstance(model, Decoder | ViT) and model.experts is not None:
        sizes["experts"] = _fewer(model.experts, built, 2 * HEAD_DIM * layout.tp)
    if isinstance(model, Whisper) and model.hidden is None:
        del sizes["projector_width"]
    return dataclasses.replace(model, **{name: size for name, size in sizes.items() if name in fields})


def _fewer(experts: Experts, num_layers: int, width: int) -> Experts:
    """Fewer and narrower experts, in the last layer at least, beside dense layers where there were some."""
    count = min(experts.count, 4)
    dense = tuple(i for i in experts.dense_layers if i < num_layers - 1)
    if experts.dense_layers and num_layers > 1:
        dense = dense or (0,)
    per_token = min(experts.per_token, count)
    groups = min(experts.groups, max(1, count // 2))
    return dataclasses.replace(
        experts,
        count=count,
        per_token=per_token,
        width=width,
        dense_layers=dense,
        groups=groups,
        chosen_groups=max(min(experts.chosen_groups, groups), -(-per_token * groups // count)),
        shared_width=width if experts.shared_width else 0,
    )
