"""Finds collectives that a CPU may have under way at a time with others of their kind, whose values XLA then mixes up.

A CPU runs the operations of a program in the order of their text. A collective is over before the next operation; a
loop may not be, and only what uses its results waits for it.
"""

import sys
from collections.abc import Iterator
from typing import Any

import runs

sys.path.append(str(runs.ROOT / "benchmarks"))
import hlo

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute")


def in_trainer(trainer: Any) -> list[str]:
    """All of them in the programs of its stages."""
    return [
        f"{module}/{number} {name}: {found}"
        for (module, number), stage in trainer.pipeline.stages.items()
        for name, program in stage.programs.items()
        for found in in_program(program.as_text())
    ]


def in_program(text: str) -> Iterator[str]:
    """The loop, the kind of collective, and what does not wait for the loop."""
    computations = hlo.parse(text).computations
    inside: dict[str, set[str]] = {}

    def kinds(operation: Any) -> set[str]:
        name = operation.opcode.removesuffix("-start")
        called = [within(c) for c in operation.called] if operation.opcode in ("while", "call", "conditional") else []
        return set().union(*called) | ({name} & set(COLLECTIVES))

    def within(computation: str) -> set[str]:
        if computation not in inside:
            inside[computation] = set().union(*map(kinds, computations[computation].operations.values()))
        return inside[computation]

    for computation in computations.values():
        needs: dict[str, set[str]] = {}
        loops: list[tuple[str, set[str]]] = []
        for name, operation in computation.operations.items():
            needs[name] = {name}.union(*(needs.get(operand, set()) for operand in operation.operands))
            mine = kinds(operation)
            for loop, theirs in loops:
                if mine & theirs and loop not in needs[name]:
                    yield f"{loop}, {' and '.join(sorted(mine & theirs))}, {name}"
            if mine and operation.opcode == "while":
                loops.append((name, mine))
