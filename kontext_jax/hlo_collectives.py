"""The collectives of a compiled program: kinds, dtypes, bytes, and what runs beside them.

TPU programs have forms of their own. A reduce-scatter may be written as a fusion around an
all-reduce. A collective that runs beside computation appears in three fusions or more, all with one
channel: its start, those it runs beside, and its end. Each is counted once, as what it is.
"""

import collections
import dataclasses
import math
import re
from typing import Literal

from kontext_jax.hlo import ITEM_BYTES, Instruction, Program, arrays

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of `KINDS`.
      dtype: of its arrays; the one with most bytes.
      full_bytes: of the gathered arrays, or of those before they are reduced.
      link_bytes: what has to leave the device: (n − 1)/n of those in a group of n, twice for an
        all-reduce.
      role: "sync" stops the device until it is done; a "start" runs beside what follows until its
        "done".
      key: the same for a start and its done.
      group: the devices of its first group, where the text lists them.
    """

    kind: str
    dtype: str
    full_bytes: float
    link_bytes: float
    role: Literal["sync", "start", "done"]
    key: str
    group: tuple[int, ...] = ()


def collectives_of(program: Program, where: str, instruction: Instruction) -> list[Collective]:
    """The collectives that an instruction runs, starts or waits for."""
    op = instruction.op
    for suffix, role in (("-start", "start"), ("-done", "done"), ("", "sync")):
        if op.removesuffix(suffix) in KINDS and op.endswith(suffix):
            key = instruction.name if role != "done" else instruction.operands[0]
            return [_collective(program, where, instruction, role, key)]
    if op in ("call-start", "async-start"):
        found = [c for name in instruction.called for c in _within(program, name)]
        return [
            dataclasses.replace(c, role="start", key=f"{instruction.name}/{i}")
            for i, c in enumerate(found)
        ]
    if op in ("call-done", "async-done"):
        started = program.computations[where].get(instruction.operands[0])
        found = collectives_of(program, where, started) if started else []
        return [dataclasses.replace(c, role="done") for c in found]
    if op != "fusion":
        return []
    name = instruction.called[0]
    found = _within(program, name)
    if not found:
        return []
    targets = {i.target for i in program.computations[name].values() if i.op == "custom-call"}
    if "AsyncCollectiveStart" in targets:
        return [dataclasses.replace(c, role="start") for c in found]
    if "AsyncCollectiveDone" in targets:
        return [dataclasses.replace(c, role="done") for c in found]
    if name.startswith("async_collective_fusion"):  # goes on beside this fusion's own work
        return []
    return found


def _within(program: Program, name: str) -> list[Collective]:
    """Collectives inside a computation that is called as a whole."""
    found = []
    for instruction in program.computations.get(name, {}).values():
        if instruction.op in KINDS:
            kind = instruction.op
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            key = f"channel {instruction.attribute('channel_id') or instruction.name}"
            found.append(_collective(program, name, instruction, "sync", key, kind))
        for called in instruction.called if instruction.op in ("fusion", "call") else ():
            found += _within(program, called)
    return found


def _collective(
    program: Program, where: str, instruction: Instruction, role: str, key: str, kind: str = ""
) -> Collective:
    kind = kind or instruction.op.removesuffix("-start").removesuffix("-done")
    size = _group_size(instruction.attributes, program.num_partitions)
    found = arrays(instruction.shape)
    if instruction.op == "all-gather-start":  # (parts, whole)
        found = found[len(found) // 2 :]
    elif instruction.op == "collective-permute-start":  # (source, destination, …)
        found = found[1:2]
    sizes: dict[str, float] = collections.Counter()
    for dtype, dims in found:
        sizes[dtype] += ITEM_BYTES[dtype] * math.prod(dims)
    dtype = max(sizes, key=sizes.__getitem__, default="")
    full = sum(sizes.values())
    if instruction.op == "reduce-scatter":  # an all-reduce in its place has the whole shape
        full *= size
    share = 1.0 if kind == "collective-permute" else (size - 1) / size
    return Collective(
        kind,
        dtype,
        full,
        full * share * (2 if kind == "all-reduce" else 1),
        role,
        key,
        _first_group(instruction.attributes),
    )


def _first_group(attributes: str) -> tuple[int, ...]:
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return tuple(int(n) for n in match[1].split(",") if n)
    return ()


def _group_size(attributes: str, num_partitions: int) -> int:
    """Devices that take part in one instance of a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return num_partitions


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind and dtype, over one run of a program on one device.

    Attributes:
      count: how many ran.
      full_bytes, link_bytes: see `Collective`.
    """

    count: int = 0
    full_bytes: float = 0
    link_bytes: float = 0


def collectives(text: str) -> dict[tuple[str, str], Traffic]:
    """(kind, dtype) → traffic of a program, largest first.

    Raises:
      ValueError: if a loop does not count up to a constant.
    """
    program = Program(text)
    found: dict[tuple[str, str], Traffic] = collections.defaultdict(Traffic)

    def visit(name: str, times: int, arguments: tuple) -> None:
        for instruction in program.computations[name].values():
            for collective in collectives_of(program, name, instruction):
                if collective.role != "done":
                    row = found[collective.kind, collective.dtype]
                    row.count += times
                    row.full_bytes += times * collective.full_bytes
                    row.link_bytes += times * collective.link_bytes
            for call in program.calls(name, instruction, arguments):
                if call.times is None:
                    raise ValueError("a loop of the program does not count up to a constant")
                visit(call.name, times * call.times, call.arguments)

    visit(program.entry, 1, ())
    return dict(sorted(found.items(), key=lambda item: -item[1].link_bytes))
