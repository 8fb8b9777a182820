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

import numpy as np

from kontext_jax.hlo.text import ITEM_BYTES, Instruction, Program, arrays

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

Role = Literal["sync", "start", "done"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      dtype: dtype of its arrays; the one with most bytes.
      full_bytes: bytes of the gathered arrays, or of those before they are reduced.
      link_bytes: what has to leave the device: (n − 1)/n of those in a group of n, twice for an
        all-reduce.
      role: "sync" stops the device until it is done; a "start" runs beside what follows until its
        "done".
      key: the same for a start and its done.
      group: devices of its first instance.
    """

    kind: str
    dtype: str
    full_bytes: float
    link_bytes: float
    role: Role
    key: str
    group: tuple[int, ...]


def collectives_of(program: Program, where: str, instruction: Instruction) -> list[Collective]:
    """The collectives that an instruction runs, starts or waits for."""
    op = instruction.op
    roles: dict[str, Role] = {"-start": "start", "-done": "done", "": "sync"}
    for suffix, role in roles.items():
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
    program: Program, where: str, instruction: Instruction, role: Role, key: str, kind: str = ""
) -> Collective:
    kind = kind or instruction.op.removesuffix("-start").removesuffix("-done")
    group = _group(instruction.attributes, program.num_partitions)
    size = len(group)
    found = arrays(instruction.shape)
    if instruction.op == "all-gather-start":  # (parts, whole)
        found = found[len(found) // 2 :]
    elif instruction.op == "collective-permute-start":  # (source, destination, …)
        found = found[1:2]
    sizes: dict[str, float] = collections.defaultdict(int)
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
        group,
    )


def _group(attributes: str, num_partitions: int) -> tuple[int, ...]:
    """The devices of the first instance of a collective, in each of the notations there are."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(int(n) for n in match[1].split(",") if n)
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(match[1]), int(match[2])
    if match := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes
    ):
        return tuple(_devices(match[3]).reshape(int(match[1]), int(match[2]))[0].tolist())
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", match[2])
        grid = _devices(ids[1]) if ids else np.arange(math.prod(sizes.values()))
        chosen = re.findall(r"'(\w+)'", match[3])
        index = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return tuple(grid.reshape(*sizes.values())[index].reshape(-1).tolist())
    return tuple(range(num_partitions))


def _devices(text: str) -> np.ndarray:
    """The devices of "[2,32]T(1,0)": counted up in these dimensions, then transposed."""
    dims, _, order = text.partition("T")
    shape = [int(n) for n in re.findall(r"\d+", dims)]
    grid = np.arange(math.prod(shape)).reshape(shape)
    return grid.transpose([int(n) for n in re.findall(r"\d+", order)] or None)


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
