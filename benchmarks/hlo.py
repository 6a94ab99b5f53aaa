"""Reads the text of a program that XLA has optimized: its computations, operations and arrays."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

WIDTHS = {"pred": 1, "token": 0, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}  # bytes
WIDTHS |= {f"{sign}{bits}": max(1, bits // 8) for sign in "su" for bits in (2, 4, 8, 16, 32, 64)}
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
COMMENT = re.compile(r"/\*.*?\*/")
CALLED = re.compile(r"(calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{[^}]*\}, (?:may|must)-alias\)")
SAME = ("bitcast", "reshape", "copy", "opt-barrier")  # one operand, whose values they yield


class Array(NamedTuple):
    """The type of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return self.size * WIDTHS.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]  # one, or the leaves of a tuple
    operands: tuple[str, ...]  # names of operations of the same computation
    inner: str  # what stands between the parentheses
    attributes: str  # what follows them

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls; the condition of a loop apart."""
        branches = BRANCHES.search(self.attributes)
        named = [name for _, name in CALLED.findall(self.attributes)]
        return (*named, *(re.findall(r"[\w.\-]+", branches[1]) if branches else ()))

    @property
    def index(self) -> int:
        """Which leaf of a tuple is taken."""
        return int(self.attributes.split("index=")[1].split(",")[0])

    @property
    def source(self) -> str:
        """Where it came from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute such as `lhs_contracting_dims={1}`, of a configuration `"lhs...": ["1"]` too."""
        found = re.search(rf'{attribute}"?\s*[=:]\s*[{{\[]([^}}\]]*)', self.attributes)
        return tuple(map(int, re.findall(r"\d+", found[1]))) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Operations by name, in order; the last one is the root."""

    name: str
    operations: dict[str, Operation]

    @property
    def root(self) -> Operation:
        """What it yields."""
        return self.operations[next(reversed(self.operations))]

    @functools.cached_property
    def parameters(self) -> tuple[Operation, ...]:
        """In the order of the caller's operands."""
        found = [op for op in self.operations.values() if op.opcode == "parameter"]
        return tuple(sorted(found, key=lambda op: int(op.inner)))

    @functools.cached_property
    def users(self) -> dict[str, list[Operation]]:
        """Name -> the operations that take it."""
        found: dict[str, list[Operation]] = {name: [] for name in self.operations}
        for op in self.operations.values():
            for name in dict.fromkeys(op.operands):
                found[name].append(op)
        return found

    def operand(self, op: Operation, index: int) -> Operation:
        """The operation behind an operand."""
        return self.operations[op.operands[index]]


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations, and the entry's outputs that take the place of a parameter: output -> parameter."""

    computations: dict[str, Computation]
    entry: Computation
    aliases: dict[int, int]

    def called(self, op: Operation) -> Computation:
        """The computation of a fusion, or the body of a loop."""
        return self.computations[op.called[0]]

    def trips(self, loop: Operation) -> int:
        """How often a loop runs; where XLA does not know, as often as the slices that it takes leave room for."""
        known = TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        most = 1
        for inside, op in self._within(self.called(loop)):
            if op.opcode == "dynamic-slice":
                most = max(most, inside.operand(op, 0).results[0].size // op.results[0].size)
        return most

    def _within(self, computation: Computation) -> Iterator[tuple[Computation, Operation]]:
        """All operations of a computation, those of its fusions too, not those of loops in it."""
        for op in computation.operations.values():
            yield computation, op
            if op.opcode == "fusion":
                yield from self._within(self.called(op))


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry, lines = "", iter(text.splitlines())
    aliases = {int(output or 0): int(given) for output, given in ALIAS.findall(next(lines).split("entry_comp")[0])}
    for line in lines:
        head = COMPUTATION.match(line)
        if head:
            computations[head[2]] = Computation(head[2], dict(_operations(lines)))
            entry = head[2] if head[1] else entry
    return Program(computations, computations[entry], aliases)


def _operations(lines: Iterator[str]) -> Iterator[tuple[str, Operation]]:
    """Up to the closing brace; the root last."""
    root = None
    for line in lines:
        if line.startswith("}"):
            break
        found = OPERATION.match(COMMENT.sub("", line))
        if found:
            op = _operation(found[2], found[3])
            if found[1]:
                root = op
            else:
                yield op.name, op
    if root is not None:
        yield root.name, root


def _operation(name: str, text: str) -> Operation:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    inner = rest[start + 1 : end - 1]
    opcode = rest[:start]
    operands = () if opcode in ("constant", "parameter", "iota") else tuple(re.findall(r"%([\w.\-]+)", inner))
    results = tuple(Array(d, tuple(map(int, filter(None, dims.split(","))))) for d, dims in ARRAY.findall(shape))
    return Operation(name, opcode, results, operands, inner, rest[end:])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed, and one on."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"a parenthesis is not closed: {text[:80]!r}")
