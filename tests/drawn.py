"""Runs drawn with a fixed seed from all that layouts allow, so that every pair of kinds of parallelism meets.

Kinds are what a layout or a run can have (dp of the language model, sp of an encoder, frozen parts, ...). Cases are
drawn at random; of those, the ones that bring pairs together which have not met yet come first.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tiny
from test_parity import FROZEN_LLM, FROZEN_VISION, PROJECTOR, Case

from hetjax.core.layout import Layout, check_batch
from hetjax.core.plan import plan_stages
from hetjax.core.remat import Remat
from hetjax.core.tasks import OFFLOADS
from models.context import CONTEXTS, GATHER
from models.contract import ModuleDef

SHAPE, SHARED = tiny.Shape(microbatches=2), tiny.Shape(microbatches=3)
EXPERTS = dataclasses.replace(tiny.EXPERTS, count=8, balance_loss=0.5, z_loss=0.1)
BIASED = dataclasses.replace(
    tiny.EXPERTS,
    count=8,
    scores="sigmoid",
    selection_bias=True,
    bias_rate=0.05,
    groups=4,
    chosen_groups=2,
    shared_width=8,
)
SEEING = dataclasses.replace(EXPERTS, dense_layers=(0,), selection_bias=True, bias_rate=0.05)
MODELS: list[dict[str, Any]] = [
    dict(),
    dict(experts=EXPERTS),
    dict(experts=BIASED),
    dict(seeing=SEEING),
    dict(tied=True, kv_heads=2, vocab=61),
    dict(tied=True, kv_heads=1),
    dict(deepstack=(1, 0, -1)),
    dict(cross=(1, 3)),
]
Draw = Callable[[random.Random], Case | None]
Kinds = Callable[[Case], set[str]]
TRAINED = {
    (): "all trained",
    FROZEN_LLM: "frozen llm",
    FROZEN_VISION: "frozen vision",
    PROJECTOR: "projector alone",
}
SIZES = dict(dp=(1, 2, 4), cp=(1, 2), tp=(1, 2, 4), pp=(1, 2), copies=(1, 1, 2), ep=(1, 2, 4))


def draw(rng: random.Random) -> Case | None:
    """A run, or None where what was drawn is not legal."""
    number = rng.randrange(len(MODELS))
    names = ("vision", "audio") if rng.random() < 0.25 else ("vision",)
    try:
        layouts = {name: layout(rng, most=4 if name == "audio" else 8) for name in ("llm", *names)}
        layouts["vision"] = replicated(rng, layouts["vision"])
        placed = place(rng, layouts)
        check(placed, number, SHAPE)
    except ValueError:
        return None
    changes = rng.choice([(), (), FROZEN_LLM, FROZEN_VISION, PROJECTOR])
    how = dict(remat=rng.choice(list(Remat)[:3]), schedule=rng.choice(["1f1b", "gpipe", "zerobubble"]))
    audio, shape = placed.get("audio"), SHAPE if placed["vision"].replicas == 1 else SHARED
    return Case(placed["llm"], placed["vision"], audio, shape=shape, changes=changes, **how, **MODELS[number])


def check(placed: dict[str, Layout], number: int, shape: tiny.Shape) -> None:
    """Raises ValueError for layouts that are not legal with MODELS[number]."""
    for name, mine in placed.items():
        plan_stages(name, definition(name, number), mine, jax.devices())
        check_batch(name, mine, is_sink=name == "llm", groups=shape.groups, items=shape.slots, seq=tiny.SEQ)


@functools.cache
def definition(name: str, number: int) -> ModuleDef:
    """A module of the run with MODELS[number]."""
    if name != "llm":
        return (tiny.whisper() if name == "audio" else tiny.vit(experts=MODELS[number].get("seeing"))).module(
            jnp.float64
        )
    return tiny.graph(Layout(), {"vision": Layout()}, jnp.float64, **MODELS[number]).sink.definition


def layout(rng: random.Random, most: int) -> Layout:
    """A layout of at most `most` devices. Raises ValueError where what was drawn does not go together."""
    while True:
        sizes = {name: rng.choice(options) for name, options in SIZES.items()}
        if sizes["dp"] * sizes["cp"] * sizes["tp"] * sizes["pp"] * sizes["copies"] <= most:
            break
    sizes["vpp"] = rng.choice((1, 1, 2)) if sizes["pp"] > 1 else 1
    context = rng.choice(CONTEXTS) if sizes["cp"] > 1 else GATHER
    share = rng.choice([None, None, 1, 2])
    cut = dict(sp=rng.random() < 0.4, zero=rng.choice([1, 1, 2, 3]), zero_size=share, context=context)
    return Layout(**sizes, **cut, offload=tuple(kind for kind in OFFLOADS if rng.random() < 0.3))


def replicated(rng: random.Random, encoder: Layout) -> Layout:
    """The layout, or one of two replicas."""
    can = encoder.pp == 1 and encoder.num_devices <= 4
    return dataclasses.replace(encoder, replicas=2) if can and rng.random() < 0.4 else encoder


def place(rng: random.Random, layouts: dict[str, Layout]) -> dict[str, Layout]:
    """The layouts on devices: side by side, on the same ones or anywhere, in order or shuffled."""
    order = rng.sample(range(8), 8) if rng.random() < 0.5 else list(range(8))
    beside, next_free, found = rng.random() < 0.4, 0, {}
    for name, mine in layouts.items():
        start = next_free if beside else 0 if rng.random() < 0.6 else rng.randrange(9 - mine.num_devices)
        ids = order[start : start + mine.num_devices]
        next_free = start + mine.num_devices
        found[name] = dataclasses.replace(mine, devices=tuple(ids))
    return found


def kinds(case: Case) -> set[str]:
    """What comes together in a run."""
    found = {case.remat.value and f"remat {case.remat.value}", case.schedule}
    found.add("repeated heads" if case.kv_heads < case.llm.tp else "heads of their own")
    routers = {EXPERTS: "experts", BIASED: "experts with a bias", None: "dense"}
    found |= {routers[case.experts]} | ({"seeing experts"} if case.seeing else set())
    found.add(TRAINED[case.changes])
    found |= {"two encoders"} if case.audio else set()
    found |= {name for name, given in (("deepstack", case.deepstack), ("cross-attention", case.cross)) if given}
    found |= {"padded vocabulary"} if case.vocab % case.llm.tp else set()
    for side, mine in (("llm", case.llm), ("vision", case.vision)):
        found |= {f"{side} {name}" for name in (*SIZES, "vpp", "replicas") if getattr(mine, name) > 1}
        found |= {f"{side} sp"} if mine.sp else set()
        found |= {f"{side} zero {mine.zero}"} if mine.zero > 1 else set()
        found |= {f"{side} shards over a part"} if mine.zero_size not in (None, mine.dp) else set()
        found |= {f"{side} {mine.context}"} if mine.cp > 1 else set()
        found |= {f"{side} offloads {kind}" for kind in mine.offload}
        ids = mine.device_ids
        found |= {"shuffled"} if list(ids) != sorted(ids) else set()
    return found | {placement(case)}


def placement(case: Case) -> str:
    """Where the encoder of pictures stands."""
    llm, vision = set(case.llm.device_ids), set(case.vision.device_ids)
    return "disjoint" if not llm & vision else "colocated" if llm == vision else "overlapping"


def cases(count: int, of: Draw, kinds: Kinds, *, seed: int = 0, tries: int = 25000, size: int = 2) -> list[Case]:
    """`count` distinct runs: first those in which most kinds meet, `size` at a time, that have not yet, then any."""
    left = {case: meetings(case, kinds, size) for case in several(of, seed, tries)}
    found, met = [], set()
    while len(found) < count:
        case = max(left, key=lambda case: len(left[case] - met))  # of equal ones the first
        met |= left.pop(case)
        found.append(case)
    return found


def several(of: Draw, seed: int, tries: int) -> dict[Case, None]:
    """The distinct legal runs of so many drawn ones."""
    rng = random.Random(seed)
    return dict.fromkeys(filter(None, (of(rng) for _ in range(tries))))


def meetings(case: Case, kinds: Kinds, size: int = 2) -> set[tuple[str, ...]]:
    """The kinds that meet in a run, `size` at a time."""
    return set(itertools.combinations(sorted(kinds(case)), size))


def missed(found: list[Case], of: Draw, kinds: Kinds, *, tries: int = 10000, size: int = 2) -> set[tuple[str, ...]]:
    """What meets in any legal run of a great many and in none of these."""
    possible = (meetings(case, kinds, size) for case in several(of, 1, tries))
    return set().union(*possible) - set().union(*(meetings(case, kinds, size) for case in found))
