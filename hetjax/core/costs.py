"""How much each stage computes of a microbatch, for the simulation of a step: FLOPs on each of its devices."""

from collections.abc import Mapping
from typing import Any

from hetjax.core import flops
from hetjax.core.flops import Flops, Parts
from hetjax.core.graph import Graph
from hetjax.core.remat import Remat
from hetjax.core.stage import Abstract, Stage
from hetjax.core.tasks import Cost, StageKey


def num_items(definition: Any, batch: Abstract) -> int:
    """Item slots of a module's microbatch; 0 for the language model."""
    return next((batch[k].shape[0] for k, dims in definition.reads.items() if dims[0] == "items"), 0)


def forwards(graph: Graph, batch: Abstract) -> dict[str, Parts]:
    """The forward of a microbatch by module; modules of unknown kind are left out."""
    (rows, seq_len), attention = batch["tokens"].shape, getattr(graph.sink.definition.config, "cross_attention", None)
    items = {module.name: num_items(module.definition, batch) for module in graph.modules}
    attended = 0
    if attention is not None:
        attended = items[attention.encoder] * graph.module(attention.encoder).definition.config.rows
    found = {}
    for module in graph.modules:
        shape = dict(rows=rows, seq_len=seq_len, items=items[module.name], attended=attended)
        parts = flops.forward(module.definition.config, **shape)
        if parts is not None:
            found[module.name] = parts
    return found


def costs(graph: Graph, stages: Mapping[StageKey, Stage], batch: Abstract) -> dict[StageKey, Cost]:
    """Of every stage; all alike where the FLOPs of one are not known."""
    known = forwards(graph, batch)
    if len(known) < len(graph.modules):
        return {key: Cost(weights=int(stage.splits)) for key, stage in stages.items()}
    return {key: _of_stage(stage, known[key[0]]) for key, stage in stages.items()}


def _of_stage(stage: Stage, parts: Parts) -> Cost:
    """Layers count alike. What `remat` computes again is part of a backward, and so is the loss."""
    plan, layout = stage.plan, stage.module.layout
    layers = parts["layers"] * ((plan.hi - plan.lo) / stage.module.definition.num_layers)
    mine = ({"first": parts["first"]} if plan.first else {}) | {"layers": layers}
    mine |= {"last": parts["last"]} if plan.last else {}
    forward, backward, moves = 0.0, 0.0, bool(stage.x_wanted)
    for name, of_part in mine.items():
        trains = name in stage.parameters.trainable
        moves = moves or trains
        in_backward = name == "last" and stage.ends_in_loss
        forward += 0 if in_backward else of_part.total
        both = flops.training(of_part, trainable=trains, backward=moves).total
        backward += both if in_backward else both - of_part.total
        backward += _again(of_part, stage.module.remat) if moves and not in_backward else 0
    devices = layout.dp * layout.cp * layout.tp
    forward, backward = (max(round(n / devices), 1) for n in (forward, backward))
    # the products of a forward once more: what little else of a layer trains, and is not left for later, counts too
    later = round(mine["layers"].matmul / devices) if stage.splits else 0
    return Cost(forward, backward, later)


def _again(forward: Flops, remat: Remat) -> float:
    """What is computed a second time; what `auto` chooses is not known yet."""
    return {Remat.FULL: forward.total, Remat.DOTS: forward.causal_attention}.get(remat, 0.0)
