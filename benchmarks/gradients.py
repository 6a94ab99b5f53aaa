"""What an optimized backward program does for its accumulators, and where a program makes narrow copies of weights.

`traffic` follows the accumulators from the program's outputs back to the products that their gradients come from, and
counts what is read and written on the way: the least is 16 bytes a parameter (a float32 gradient written and read, its
accumulator read and written), 12 where the product adds by itself.
"""

import dataclasses
from collections import Counter
from typing import NamedTuple

from cost import read, result, written
from hlo import SAME, Computation, Operation, Program


@dataclasses.dataclass
class Traffic:
    """Of the gradients of one microbatch."""

    accumulators: dict[str, Operation]  # the program's parameters, by name
    bytes: Counter[str] = dataclasses.field(default_factory=Counter)  # accumulator -> read and written
    fills: list[str] = dataclasses.field(default_factory=list)  # arrays that are filled before anything is added
    seconds: list[str] = dataclasses.field(default_factory=list)  # arrays carried beside the accumulators

    @property
    def bytes_per_parameter(self) -> float:
        """Of all that train."""
        return sum(self.bytes.values()) / sum(op.results[0].size for op in self.accumulators.values())

    @property
    def dearest(self) -> str:
        """The array that adds most above 16 bytes a parameter."""
        per = {name: self.bytes[name] / op.results[0].size for name, op in self.accumulators.items()}
        name = max(per, key=lambda name: (per[name] - 16) * self.accumulators[name].results[0].size)
        return f"{shown(self.accumulators[name])} {per[name]:.1f}"


class Frame(NamedTuple):
    """A computation, and the loop that it is the body of."""

    computation: Computation
    times: int
    loop: Operation | None = None
    outer: "Frame | None" = None


def traffic(program: Program) -> Traffic:
    """Of the outputs that take the place of a parameter; `program` donates its accumulators and nothing else."""
    entry = program.entry
    accumulators = [entry.parameters[given] for given in program.aliases.values()]
    found = Traffic({op.name: op for op in accumulators})
    seen: set[tuple[str, str, int]] = set()  # what two accumulators have of one product counts once
    for output, given in zip(program.aliases, accumulators, strict=True):
        _Walk(program, found, given.name, seen).follow(Frame(entry, 1), entry.root, output)
    return found


class _Walk(NamedTuple):
    """From one accumulator to the products behind it."""

    program: Program
    found: Traffic
    name: str
    seen: set[tuple[str, str, int]]

    def follow(self, frame: Frame, op: Operation, index: int) -> None:
        """Counts what makes result `index` of `op`, a gradient or a sum of them, and what stands behind it."""
        inside, again = frame.computation, (frame.computation.name, op.name, index)
        if again in self.seen or op.opcode == "parameter":
            return
        self.seen.add(again)
        if op.opcode == "get-tuple-element":
            self.follow(frame, inside.operand(op, 0), op.index)
        elif op.opcode == "tuple":
            self.follow(frame, inside.operand(op, index), 0)
        elif op.opcode == "while":
            body, init = self.program.called(op), inside.operand(op, 0)
            if not self.is_own(frame, init, index):
                self.found.seconds.append(f"{op.results[index].dtype}{list(op.results[index].dims)} of {op.name}")
            self.follow(frame, init, index)
            self.follow(Frame(body, frame.times * self.program.trips(op), op, frame), body.root, index)
        elif op.opcode in SAME and op.opcode != "copy":
            self.follow(frame, inside.operand(op, 0), index)
        else:
            self.count(frame, op, index)

    def count(self, frame: Frame, op: Operation, index: int) -> None:
        """An operation that makes new values: what it writes, and reads of arrays of the same number of float32."""
        inside = frame.computation
        fused = self.program.called(op) if op.opcode == "fusion" else None
        wrote = written(fused, index) if fused else op.results[index].bytes
        self.found.bytes[self.name] += frame.times * wrote
        if not op.operands:
            self.found.fills.append(f"{op.results[index].dtype}{list(op.results[index].dims)} by {op.name}")
        for place, name in enumerate(op.operands):
            operand = inside.operations[name]
            if len(operand.results) != 1 or operand.results[0].dtype != "f32":
                continue
            size = read(fused, fused.parameters[place]) if fused else operand.results[0].bytes
            if size == wrote or (fused and _is_target(fused, fused.parameters[place], index)):
                self.found.bytes[self.name] += frame.times * size
                self.follow(frame, operand, 0)

    def is_own(self, frame: Frame, op: Operation, index: int) -> bool:
        """Whether a loop's carry begins as what came in, or as the accumulator, emptied or not."""
        within, behind = source(Frame(frame.computation, 1), op, index)
        if behind.opcode == "parameter":
            return True
        operands = (within.computation.operations[name] for name in behind.operands)
        return any(getattr(origin(frame, o, 0), "name", "") in self.found.accumulators for o in operands)


def _is_target(fused: Computation, parameter: Operation, index: int) -> bool:
    """Whether a result is this parameter, updated in place."""
    op = result(fused, index)
    while op.opcode in (*SAME, "dynamic-update-slice", "scatter"):
        op = fused.operand(op, 0)
    return op.name == parameter.name


def origin(frame: Frame, op: Operation, index: int) -> Operation | None:
    """The program's parameter that result `index` of `op` is, or is a slice of; None if it is computed."""
    frame, op = source(frame, op, index)
    return op if op.opcode == "parameter" and frame.outer is None else None


def source(frame: Frame, op: Operation, index: int) -> tuple[Frame, Operation]:
    """The operation that makes what result `index` of `op` is, or is a slice of, and where it stands."""
    while True:
        inside = frame.computation
        if op.opcode == "get-tuple-element":
            op, index = inside.operand(op, 0), op.index
        elif op.opcode == "tuple":
            op, index = inside.operand(op, index), 0
        elif op.opcode in (*SAME, "dynamic-slice", "slice", "transpose"):
            op = inside.operand(op, 0)
        elif op.opcode == "parameter" and frame.outer is not None and frame.loop is not None and _stays(inside, index):
            op, frame = frame.outer.computation.operand(frame.loop, 0), frame.outer
        else:
            return frame, op


def _stays(body: Computation, index: int) -> bool:
    """Whether a loop hands a value on as it got it."""
    op = body.operand(body.root, index)
    taken = op.opcode == "get-tuple-element" and body.operand(op, 0).opcode == "parameter"
    return taken and op.index == index


def narrowed(program: Program) -> list[str]:
    """The float32 inputs of which loops make copies in fewer bits each time around, once for each copy: weights, since
    nothing else enters in float32 and leaves narrower."""
    found: list[str] = []
    _narrowed(program, Frame(program.entry, 1), found)
    return found


def _narrowed(program: Program, frame: Frame, found: list[str]) -> None:
    inside = frame.computation
    for op in inside.operations.values():
        if op.opcode == "while":
            _narrowed(program, Frame(program.called(op), 1, op, frame), found)
        elif op.opcode == "convert" and frame.loop is not None:
            found += _weight(frame, op, inside.operand(op, 0))
        elif op.opcode == "fusion" and frame.loop is not None:
            fused = program.called(op)
            for convert in (o for o in fused.operations.values() if o.opcode == "convert"):
                behind = origin(Frame(fused, 1), convert, 0) or origin(Frame(fused, 1), fused.operand(convert, 0), 0)
                if behind is not None:
                    found += _weight(frame, convert, inside.operand(op, int(behind.inner)))


def _weight(frame: Frame, convert: Operation, operand: Operation) -> list[str]:
    """The name of what is converted, if that is an input that gets narrower."""
    behind = origin(frame, operand, 0)
    if behind is None or behind.results[0].dtype != "f32" or convert.results[0].dtype not in ("bf16", "f16"):
        return []
    return [shown(behind)]


def shown(parameter: Operation) -> str:
    """Its name as JAX has it."""
    return (parameter.source or parameter.name).replace("\\'", "")
