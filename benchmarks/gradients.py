"""What an optimized backward program does for its accumulators, and where a program makes narrow copies of weights.

`traffic` follows the accumulators from the program's outputs back to the products that their gradients come from, and
counts what is read and written on the way: the least is 16 bytes a parameter (a float32 gradient written and read, its
accumulator read and written), 12 where the product adds by itself.
"""

import dataclasses
from typing import NamedTuple

from cost import read, result, written
from hlo import SAME, Array, Computation, Operation, Program


@dataclasses.dataclass
class Traffic:
    """Of the gradients of one microbatch."""

    parameters: int  # that train: elements of the accumulators
    bytes: int = 0
    fills: list[str] = dataclasses.field(default_factory=list)  # arrays that are filled before anything is added
    seconds: list[str] = dataclasses.field(default_factory=list)  # arrays carried beside the accumulators

    @property
    def bytes_per_parameter(self) -> float:
        """Read and written."""
        return self.bytes / self.parameters


class Frame(NamedTuple):
    """A computation, and the loop that it is the body of."""

    computation: Computation
    times: int
    loop: Operation | None = None
    outer: "Frame | None" = None


def traffic(program: Program) -> Traffic:
    """Of the outputs that take the place of a parameter; `program` donates its accumulators and nothing else."""
    entry = program.entry
    found = Traffic(sum(entry.parameters[given].results[0].size for given in program.aliases.values()))
    seen: set[tuple[str, str, int]] = set()
    for output in program.aliases:
        _follow(program, Frame(entry, 1), entry.root, output, found, seen)
    return found


def _follow(
    program: Program, frame: Frame, op: Operation, index: int, found: Traffic, seen: set[tuple[str, str, int]]
) -> None:
    """Counts what makes result `index` of `op`, a gradient or a sum of them, and what stands behind it."""
    inside, again = frame.computation, (frame.computation.name, op.name, index)
    if again in seen or op.opcode == "parameter":
        return
    seen.add(again)
    if op.opcode == "get-tuple-element":
        _follow(program, frame, inside.operand(op, 0), op.index, found, seen)
    elif op.opcode == "tuple":
        _follow(program, frame, inside.operand(op, index), 0, found, seen)
    elif op.opcode == "while":
        body = program.called(op)
        if origin(Frame(inside, 1), inside.operand(op, 0), index) is None:
            found.seconds.append(f"{_shown(op.results[index])} of {op.name}")
        _follow(program, frame, inside.operand(op, 0), index, found, seen)
        _follow(program, Frame(body, frame.times * program.trips(op), op, frame), body.root, index, found, seen)
    elif op.opcode in SAME and op.opcode != "copy":
        _follow(program, frame, inside.operand(op, 0), index, found, seen)
    else:
        _count(program, frame, op, index, found, seen)


def _count(
    program: Program, frame: Frame, op: Operation, index: int, found: Traffic, seen: set[tuple[str, str, int]]
) -> None:
    """An operation that makes new values: what it writes, and reads of arrays of the same number of float32."""
    inside = frame.computation
    fused = program.called(op) if op.opcode == "fusion" else None
    wrote = written(fused, index) if fused else op.results[index].bytes
    found.bytes += frame.times * wrote
    if not op.operands:
        found.fills.append(f"{_shown(op.results[index])} by {op.name}")
    for place, name in enumerate(op.operands):
        operand = inside.operations[name]
        if len(operand.results) != 1 or operand.results[0].dtype != "f32":
            continue
        size = read(fused, fused.parameters[place]) if fused else operand.results[0].bytes
        target = fused is not None and _is_target(fused, fused.parameters[place], index)
        if size == wrote or target:
            found.bytes += frame.times * size
            _follow(program, frame, operand, 0, found, seen)


def _is_target(fused: Computation, parameter: Operation, index: int) -> bool:
    """Whether a result is this parameter, updated in place."""
    op = result(fused, index)
    while op.opcode in (*SAME, "dynamic-update-slice", "scatter"):
        op = fused.operand(op, 0)
    return op.name == parameter.name


def origin(frame: Frame, op: Operation, index: int) -> Operation | None:
    """The program's parameter that result `index` of `op` is, or is a slice of; None if it is computed."""
    while True:
        inside = frame.computation
        if op.opcode == "get-tuple-element":
            op, index = inside.operand(op, 0), op.index
        elif op.opcode == "tuple":
            op, index = inside.operand(op, index), 0
        elif op.opcode in (*SAME, "dynamic-slice", "slice", "transpose"):
            op = inside.operand(op, 0)
        elif op.opcode == "parameter" and frame.outer is not None and frame.loop is not None:
            if not _stays(inside, index):
                return None
            op, frame = frame.outer.computation.operand(frame.loop, 0), frame.outer
        else:
            return op if op.opcode == "parameter" else None


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
    return [(behind.source or behind.name).replace("\\'", "")]


def _shown(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"
