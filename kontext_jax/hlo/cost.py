"""What a compiled program costs on a chip that is not here: `python -m kontext_jax.hlo_cost FILE`.

TPU programs carry the compiler's own cycles for nearly every operation (`estimated_cycles`). They
are summed over loops, as often as those run, and by what the operations do. What has no such figure
is computed here, and never mixed in unseen:

    Pallas attention   its products at the chip's peak, a lower bound
    collectives        bytes that leave the chip / the nominal bandwidth of its links; one that runs
                       beside computation costs what is left of it when its result is needed
    everything else    is listed by kind, with its bytes ("without an estimate")

GPU programs carry no cycles. Each kernel is then counted at the roofline, the longer of its
products at the peak and its bytes at the bandwidth of device memory: what the program cannot do
without, not what it takes.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from kontext_jax.hlo.collectives import Collective, collectives_of
from kontext_jax.hlo.kernels import attention_call, bytes_moved, is_gemm, product_flops
from kontext_jax.hlo.text import Instruction, Program, array_text, arrays, num_bytes
from kontext_jax.runtime.chips import CHIPS, Chip

CATEGORIES = ("matmul", "attention", "reduction", "elementwise", "data movement")

# Operations that do nothing by themselves when a program runs.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "while", "call", "conditional", "opt-barrier", "domain", "add-dependency",
    "get-dimension-size",
}  # fmt: skip
_MOVES = {
    "copy", "copy-start", "slice", "dynamic-slice", "dynamic-update-slice", "transpose", "reshape",
    "broadcast", "pad", "concatenate", "gather",
}  # fmt: skip
# Beside moves, what a fusion that only moves data may hold: padding and selecting of what moves.
_MOVES_WITHIN = _FREE | _MOVES | {"convert", "iota", "select", "maximum", "compare", "fusion"}
# Custom calls of TPU programs that set something up.
_BOOKKEEPING = ("AllocateBuffer", "PrepareAsyncCallStart", "PrepareAsyncCallDone")


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation of a program, all its executions together.

    Attributes:
      category: one of `CATEGORIES`.
      source: JAX operation that it comes from.
      count: executions.
      estimated: whether the time is the compiler's; otherwise it is analytic.
    """

    name: str
    shape: str
    category: str
    source: str
    count: int
    seconds: float
    flops: float = 0
    estimated: bool = True


@dataclasses.dataclass
class CollectiveCost:
    """Collectives of one kind and dtype.

    Attributes:
      count: executions; `count_async` of them beside computation.
      full_bytes, link_bytes: see `hlo.Collective`.
      link_s: time on the links alone.
      exposed_s: time in which the chip waits for them.
    """

    kind: str
    dtype: str
    count: int = 0
    count_async: int = 0
    full_bytes: float = 0
    link_bytes: float = 0
    link_s: float = 0
    exposed_s: float = 0


@dataclasses.dataclass
class Uncounted:
    """Executed operations of one kind that have no estimate."""

    kind: str
    count: int = 0
    bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: `times` iterations each time it is entered; `exact` False: the caller's number."""

    name: str
    times: int
    entered: int
    exact: bool


@dataclasses.dataclass
class Estimate:
    """What one execution of a program costs on one chip.

    Attributes:
      analytic: no cycles of a compiler are in it (GPUs).
      seconds_by_category: see `CATEGORIES`; attention's kernels at the chip's peak.
      ops: costliest first.
      collectives: most bytes first.
      attention_flops: operations of attention's kernels.
      bytes: bytes that kernels read and write; only where `analytic`.
    """

    chip: str
    analytic: bool
    seconds_by_category: dict[str, float]
    ops: list[Op]
    collectives: list[CollectiveCost]
    uncounted: list[Uncounted]
    loops: list[Loop]
    attention_flops: float
    bytes: float = 0

    @property
    def compute_s(self) -> float:
        """Without collectives: the compiler's estimate and attention at peak."""
        return sum(self.seconds_by_category.values())

    @property
    def exposed_s(self) -> float:
        """In which the chip waits for collectives."""
        return sum(row.exposed_s for row in self.collectives)

    @property
    def link_s(self) -> float:
        """Of collectives, if nothing ran beside them."""
        return sum(row.link_s for row in self.collectives)

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s

    def to_json(self, num_ops: int = 20) -> dict[str, Any]:
        """In JSON's types, the costliest operations alone."""
        found = dataclasses.asdict(self)
        found["ops"] = found["ops"][:num_ops]
        keys = ("compute_s", "exposed_s", "link_s", "total_s")
        return found | {key: getattr(self, key) for key in keys}


def estimate(text: str, chip: Chip | str, unknown_trips: int = 1, slice_size: int = 0) -> Estimate:
    """The cost of a program from its text, `Compiled.as_text()`.

    Args:
      chip: the chip that it is compiled for, or its name.
      unknown_trips: iterations of loops whose number the text does not say, such as those over
        sampling steps.
      slice_size: devices of a slice or node; collectives whose groups go beyond go at the pace of
        the network between them. 0: there is but one.
    """
    chip = CHIPS[chip] if isinstance(chip, str) else chip
    return _Estimator(Program(text), chip, unknown_trips, slice_size).run()


class _Estimator:
    """Walks a program once, in the order in which it runs."""

    def __init__(self, program: Program, chip: Chip, unknown_trips: int, slice_size: int):
        self._program, self._chip = program, chip
        self._unknown_trips, self._slice_size = unknown_trips, slice_size
        self._analytic = chip.clock_hz is None
        self._ops: dict[tuple, Op] = {}
        self._collectives: dict[tuple[str, str], CollectiveCost] = {}
        self._uncounted: dict[str, Uncounted] = {}
        self._loops: list[Loop] = []
        self._bytes = self._attention_flops = 0.0

    def run(self) -> Estimate:
        self._visit(self._program.entry, 1, ())
        seconds = dict.fromkeys(CATEGORIES, 0.0)
        for op in self._ops.values():
            seconds[op.category] += op.seconds
        return Estimate(
            self._chip.name,
            self._analytic,
            {name: s for name, s in seconds.items() if s},
            sorted(self._ops.values(), key=lambda op: -op.seconds),
            sorted(self._collectives.values(), key=lambda row: -row.link_bytes),
            sorted(self._uncounted.values(), key=lambda row: -row.bytes),
            self._loops,
            self._attention_flops,
            self._bytes,
        )

    def _visit(self, name: str, times: int, arguments: tuple) -> float:
        """Counts a computation that runs `times` times; seconds of one run, waiting included."""
        now = links_free = 0.0
        running: dict[str, float] = {}  # collective → when it will be done
        for instruction in self._program.computations[name].values():
            for call in self._program.calls(name, instruction, arguments):
                trips = self._unknown_trips if call.times is None else call.times
                if instruction.op == "while":
                    self._loops.append(
                        Loop(instruction.name, trips, times, exact=call.times is not None)
                    )
                now += trips * self._visit(call.name, times * trips, call.arguments)
            now += self._compute(name, instruction, times)
            for collective in collectives_of(self._program, name, instruction):
                row, link_s = self._row(collective), self._link_s(collective)
                if collective.role == "done":
                    waited = max(running.pop(collective.key, now) - now, 0.0)
                else:
                    row.count += times
                    row.count_async += times * (collective.role == "start")
                    row.full_bytes += times * collective.full_bytes
                    row.link_bytes += times * collective.link_bytes
                    row.link_s += times * link_s
                    links_free = max(links_free, now) + link_s
                    if collective.role == "start":
                        running[collective.key] = links_free
                        continue
                    waited = links_free - now
                row.exposed_s += times * waited
                now += waited
        return now

    def _row(self, collective: Collective) -> CollectiveCost:
        key = collective.kind, collective.dtype
        return self._collectives.setdefault(key, CollectiveCost(*key))

    def _link_s(self, collective: Collective) -> float:
        size = self._slice_size
        beyond = size and len({device // size for device in collective.group}) > 1
        bandwidth = self._chip.dcn_bytes_per_s if beyond else self._chip.link_bytes_per_s
        return collective.link_bytes / (bandwidth or self._chip.dcn_bytes_per_s)

    def _compute(self, where: str, instruction: Instruction, times: int) -> float:
        """Counts an instruction's own work; seconds of one execution."""
        if instruction.op in _FREE or instruction.op.endswith("-done"):
            return 0.0
        if instruction.target in _BOOKKEEPING:
            return 0.0
        if instruction.op == "fusion-start":
            instruction = self._as_fusion(instruction)
        if call := attention_call(self._program, where, instruction):
            self._attention_flops += times * call.flops
            seconds = call.flops / self._chip.bf16_flops
            self._add(instruction, "attention", times, seconds, call.flops, attention=call)
            return seconds
        if self._analytic:
            return self._roofline(where, instruction, times)
        cycles, clock_hz = instruction.cycles, self._chip.clock_hz
        if cycles and clock_hz:
            seconds = cycles / clock_hz
            self._add(instruction, self._category(instruction), times, seconds)
            return seconds
        if cycles is None and not collectives_of(self._program, where, instruction):
            self._add_uncounted(instruction, times)
        return 0.0

    def _as_fusion(self, instruction: Instruction) -> Instruction:
        """The fusion that starts here: its own shape is (operands, results, context)."""
        steps = self._program.computations[instruction.called[0]].values()
        shape = next(step.shape for step in steps if step.is_root)
        return dataclasses.replace(instruction, op="fusion", shape=shape)

    def _roofline(self, where: str, instruction: Instruction, times: int) -> float:
        if collectives_of(self._program, where, instruction):
            return 0.0
        moved = bytes_moved(self._program, where, instruction)
        flops = product_flops(self._program, where, instruction)
        self._bytes += times * moved
        seconds = max(flops / self._chip.bf16_flops, moved / self._chip.hbm_bytes_per_s)
        category = self._category(instruction)
        if instruction.op == "custom-call" and not flops:
            self._add_uncounted(instruction, times)
        self._add(instruction, category, times, seconds, flops)
        return seconds

    def _add(self, instruction, category, times, seconds, flops=0.0, *, attention=None):
        if attention:
            shape = f"{attention.kind}, q {list(attention.q)}, k {list(attention.k)}"
        else:
            shape = ", ".join(array_text(*array) for array in arrays(instruction.shape)[:3])
        source = re.sub(r"(layers?|blocks?)([_/]?)\d+", r"\1\2N", instruction.source)
        key = (shape, source, category)
        had = self._ops.get(key)
        self._ops[key] = Op(
            had.name if had else instruction.name,
            shape,
            category,
            source,
            times + (had.count if had else 0),
            times * seconds + (had.seconds if had else 0),
            times * flops + (had.flops if had else 0),
            estimated=not (self._analytic or attention),
        )

    def _add_uncounted(self, instruction: Instruction, times: int) -> None:
        kind = instruction.op
        size = num_bytes(instruction.shape)
        if kind == "custom-call":
            kind += f" {instruction.target}"
        elif kind.endswith("-start"):  # (destination, source, context)
            size = sum(num_bytes(array_text(*array)) for array in arrays(instruction.shape)[:1])
        row = self._uncounted.setdefault(kind, Uncounted(kind))
        row.count += times
        row.bytes += times * size

    def _category(self, instruction: Instruction) -> str:
        ops = frozenset({instruction.op})
        for name in instruction.called if instruction.op == "fusion" else ():
            ops |= self._program.ops_within(name)
        if ops & {"dot", "convolution"} or is_gemm(instruction):
            return "matmul"
        if any(op.startswith("reduce") for op in ops):
            return "reduction"
        if instruction.op == "fusion":
            return "data movement" if ops <= _MOVES_WITHIN else "elementwise"
        return "data movement" if instruction.op in _MOVES else "elementwise"


def lines(found: Estimate, num_ops: int = 12) -> list[str]:
    """The estimate for people, a line each."""
    ms = 1e3
    kind = "roofline of each kernel" if found.analytic else "compiler's cycles, attention at peak"
    out = [f"{found.compute_s * ms:,.1f} ms on one {found.chip} ({kind})"]
    for name, seconds in sorted(found.seconds_by_category.items(), key=lambda item: -item[1]):
        share = 100 * seconds / found.compute_s
        out.append(f"  {name:14} {seconds * ms:10,.2f} ms {share:5.1f} %")
    if found.collectives:
        out.append(
            f"collectives: {found.link_s * ms:,.1f} ms on nominal links, of which the chip waits "
            f"{found.exposed_s * ms:,.1f} ms; with them {found.total_s * ms:,.1f} ms"
        )
    for row in found.collectives:
        out.append(
            f"  {row.kind:18} {row.dtype:5} ×{row.count} ({row.count_async} beside computation) "
            f"{row.full_bytes / 2**30:,.2f} GiB, {row.link_bytes / 2**30:,.2f} over the links, "
            f"{row.link_s * ms:,.1f} ms, exposed {row.exposed_s * ms:,.1f} ms"
        )
    out.append("costliest operations:")
    for op in found.ops[:num_ops]:
        out.append(
            f"  {op.seconds * ms:9,.2f} ms ×{op.count:<5} {op.category:13} {op.name} {op.shape} "
            f"{op.source[-90:]}"
        )
    if found.uncounted:
        out.append("without an estimate:")
    for rest in found.uncounted[:num_ops]:
        out.append(f"  ×{rest.count} {rest.kind}: {rest.bytes / 2**30:,.3f} GiB")
    for loop in found.loops:
        assumed = "" if loop.exact else " (assumed: the text does not say)"
        out.append(f"loop {loop.name}: {loop.times} times, entered {loop.entered}{assumed}")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kontext_jax.hlo_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="text of a program, `Compiled.as_text()`")
    parser.add_argument("--chip", choices=CHIPS, default="v5p")
    parser.add_argument(
        "--trips", type=int, default=1, help="iterations of loops of unknown length (default 1)"
    )
    parser.add_argument("--top", type=int, default=12, help="operations to list (default 12)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    args = parser.parse_args(argv)
    found = estimate(args.file.read_text(), args.chip, args.trips)
    print(json.dumps(found.to_json(args.top)) if args.json else "\n".join(lines(found, args.top)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
