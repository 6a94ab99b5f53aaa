"""What each operation of an optimized program computes and moves: its FLOPs, and the bytes it reads and writes.

FLOPs are those of products, two per multiply-add, and of attention kernels, by their shapes; elementwise work counts by
its bytes. A fusion reads of an operand what its slices take, and an update in place writes no more than the update. A
loop counts as often as it runs, of branches the dearest. XLA's own analysis is not used: it counts a loop's body once
and whole arrays where a slice is taken, and there is none for a program of a device that is only described.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from hlo import SAME, Computation, Operation, Program

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id")
SLICES = ("dynamic-slice", "slice", "gather")
BALANCE = 200  # FLOPs in the time of a byte: near enough to tell which branch is dearer
# Products in an attention kernel: logits and weighted sum; the backward computes the logits again, and three gradients
# beside that of the weights.
ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
MOSAIC = {3: 2, 1: 3, 2: 4}  # of those of tokamax, by their results: forward; gradients of queries; of keys and values


class Rates(NamedTuple):
    """What a device reaches."""

    products: float  # FLOP/s in bfloat16; half of it in float32, which goes by tf32
    attention: float  # FLOP/s of what the mask leaves
    bandwidth: float  # bytes/s


# Assumed; with those of the H200 the runs of 2026-11-27 were predicted within 10% (benchmarks/README.md).
H100 = Rates(products=700e12, attention=450e12, bandwidth=0.9 * 3.35e12)
H200 = H100._replace(bandwidth=0.9 * 4.8e12)


@dataclasses.dataclass(frozen=True)
class Cost:
    """One operation, in all its calls."""

    operation: Operation
    kind: str  # products, attention or memory
    wide: bool  # a product of float32
    times: int
    flops: float  # of one call
    bytes: float  # of one call

    def seconds(self, rates: Rates) -> float:
        """Of all calls: as long as what is slower, to compute or to move."""
        rate = rates.attention if self.kind == "attention" else rates.products / (2 if self.wide else 1)
        return self.times * max(self.flops / rate, self.bytes / rates.bandwidth)


def costs(program: Program) -> list[Cost]:
    """Every operation that takes time."""
    return list(_costs(program, program.entry, 1))


def _costs(program: Program, computation: Computation, times: int) -> Iterator[Cost]:
    for op in computation.operations.values():
        if op.opcode in ("while", "call", "async-start"):
            trips = program.trips(op) if op.opcode == "while" else 1
            yield from _costs(program, program.called(op), times * trips)
        elif op.opcode == "conditional":
            branches = [list(_costs(program, program.computations[c], times)) for c in op.called]
            yield from max(branches, key=lambda found: sum(c.times * max(c.bytes, c.flops / BALANCE) for c in found))
        elif op.opcode not in FREE and not op.opcode.endswith(("-start", "-done")):
            flops, wide = products(program, computation, op)
            kind = "attention" if _attends(program, op) else "products" if flops else "memory"
            yield Cost(op, kind, wide, times, flops, moved(program, computation, op))


def products(program: Program, computation: Computation, op: Operation) -> tuple[float, bool]:
    """FLOPs of one call of an operation, and whether its operands are float32."""
    if op.opcode == "fusion":
        inner = program.called(op)
        found = [products(program, inner, o) for o in inner.operations.values()]
        return sum(flops for flops, _ in found), any(wide for flops, wide in found if flops)
    target = _target(op)
    if target in ATTENTION:
        half = '"CAUSAL"' in op.attributes
        return ATTENTION[target] * _attention(computation, op, half), False
    if _grouped(op):  # rows [n, a], or [a, n] of the weights' gradient, times what has the last dim of the result
        operands = (computation.operand(op, i).results[0] for i in range(len(op.operands)))
        rows = next(a for a in operands if len(a.dims) == 2)
        return 2.0 * rows.size * op.results[0].dims[-1], False
    if target.startswith("mosaic"):  # without the ends of ranges, each query's last key is itself
        half = sum(computation.operations[name].results[0].dtype == "s32" for name in op.operands) in (1, 3)
        return MOSAIC[len(op.results)] * _attention(computation, op, half), False
    left = computation.operand(op, 0).results[0] if op.operands else None
    if op.opcode == "dot" or "gemm" in target or "matmul" in target:
        contracted = math.prod(left.dims[i] for i in op.numbers("lhs_contracting_dim(?:ension)?s"))
        return 2.0 * op.results[0].size * contracted, left.dtype == "f32"
    if op.opcode == "convolution" or target.startswith("__cudnn$conv"):
        right = computation.operand(op, 1).results[0]
        kernel = op.attributes.split("dim_labels=")[1].split("_")[1].split("->")[0]
        return 2.0 * op.results[0].size * right.size / right.dims[kernel.index("o")], left.dtype == "f32"
    return 0.0, False


def _attends(program: Program, op: Operation) -> bool:
    """Whether this is an attention kernel, or one whose operands are sliced within the operation."""
    if op.opcode == "fusion":
        return any(_attends(program, inner) for inner in program.called(op).operations.values())
    return _target(op) in ATTENTION or (_target(op).startswith("mosaic") and not _grouped(op))


def _grouped(op: Operation) -> bool:
    """Whether this is a kernel of grouped products; they visit each row once, but for parts of tiles."""
    return _target(op).startswith("mosaic") and any(word in op.source for word in ("ragged", "grouped"))


def _attention(computation: Computation, op: Operation, half: bool) -> float:
    """FLOPs of one of the products of queries and keys [b, s, h, d], as far as the mask goes."""
    q, k = (computation.operand(op, i).results[0].dims for i in (0, 1))
    return 2.0 * math.prod(q) * k[1] * (0.5 if half else 1.0)


def _target(op: Operation) -> str:
    """Of a custom call, the library's kernel."""
    if op.opcode != "custom-call":
        return ""
    return op.attributes.split('custom_call_target="')[1].split('"')[0]


def moved(program: Program, computation: Computation, op: Operation) -> int:
    """Bytes that one call reads and writes."""
    if op.opcode == "fusion":
        inner = program.called(op)
        return sum(read(inner, p) for p in inner.parameters) + sum(written(inner, i) for i in range(len(op.results)))
    operands = [computation.operations[name].results[0].bytes for name in op.operands]
    workspace = op.opcode == "custom-call" and len(op.results) > 1
    whole = sum(a.bytes for a in op.results if not (workspace and a.dtype in ("s8", "u8")))
    if op.opcode in SLICES:
        return 2 * whole
    if op.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if op.opcode == "scatter":
        return 3 * operands[-1]
    return sum(operands) + whole


def read(inner: Computation, value: Operation) -> int:
    """Bytes of `value` that a fused computation looks at."""
    found = 0
    for user in inner.users[value.name]:
        first = user.operands[0] == value.name
        if user.opcode in ("bitcast", "reshape"):
            found += read(inner, user)
        elif user.opcode in SLICES and first:
            found += user.results[0].bytes
        elif user.opcode == "scatter" and first:
            found += inner.operand(user, -1).results[0].bytes
        elif not (user.opcode in ("dynamic-update-slice", "tuple") and first):
            found += value.results[0].bytes
    return min(found, value.results[0].bytes)


def written(inner: Computation, index: int) -> int:
    """Bytes of one result of a fused computation."""
    op = result(inner, index)
    if op.opcode in ("dynamic-update-slice", "scatter"):
        return inner.operand(op, 1 if op.opcode == "dynamic-update-slice" else -1).results[0].bytes
    return op.results[0].bytes


def result(inner: Computation, index: int) -> Operation:
    """The operation that makes one result."""
    op = inner.operand(inner.root, index) if inner.root.opcode == "tuple" else inner.root
    while op.opcode in SAME:
        op = inner.operand(op, 0)
    return op
