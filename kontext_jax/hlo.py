"""What the text of a compiled program (`Compiled.as_text()`) says of its communication.

Loops are counted as often as they run, if they count up to a constant, as `lax.scan` does. TPU
programs write a reduce-scatter as a fusion around an all-reduce; it is counted as what it is.
"""

import collections
import dataclasses
import math
import re

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    shape: str
    op: str
    operands: str
    attributes: str

    def attribute(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind and dtype, over one run of a program on one device.

    Attributes:
      count: how many ran.
      full_bytes: of the gathered arrays, or of those before they are reduced.
      link_bytes: what has to leave the device: (n − 1)/n of those in a group of n, twice for an
        all-reduce.
    """

    count: int = 0
    full_bytes: float = 0
    link_bytes: float = 0


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(name → its instructions, name of the entry)."""
    found: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[1]
            found[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current and (match := _INSTRUCTION.match(line)):
            found[current].append(Instruction(*match.groups()))
    return found, entry


def _array_bytes(shape: str) -> dict[str, int]:
    """Bytes of the arrays of a shape, by dtype."""
    sizes: dict[str, int] = collections.Counter()
    for dtype, dims in _ARRAY.findall(shape):
        if dtype in ITEM_BYTES:
            sizes[dtype] += ITEM_BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
    return sizes


def _group_size(attributes: str) -> int:
    """Devices that take part in one instance of a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 1


def _full_shape(instruction: Instruction) -> str:
    """The gathered arrays, or those that are reduced."""
    if instruction.op == "all-gather-start":  # (parts, whole)
        arrays = _ARRAY.findall(instruction.shape)
        return " ".join(f"{dtype}[{dims}]" for dtype, dims in arrays[len(arrays) // 2 :])
    if instruction.op == "reduce-scatter":
        group = _group_size(instruction.attributes)
        return " ".join([instruction.shape] * group)
    return instruction.shape


def _trip_count(condition: list[Instruction]) -> int:
    """The constant that a loop counts up to.

    Raises:
      ValueError: if its condition is not of that form.
    """
    constants = [int(i.operands) for i in condition if i.op == "constant" and i.operands.isdigit()]
    if len(constants) != 1 or "LT" not in str([i.attribute("direction") for i in condition]):
        raise ValueError("a loop of the program does not count up to a constant")
    return constants[0]


def collectives(text: str) -> dict[tuple[str, str], Traffic]:
    """(kind, dtype) → traffic of a program, largest first.

    Raises:
      ValueError: if a loop does not count up to a constant.
    """
    computations, entry = _computations(text)
    found: dict[tuple[str, str], Traffic] = collections.defaultdict(Traffic)

    def add(kind: str, instruction: Instruction, times: int):
        group = _group_size(instruction.attributes)
        share = (group - 1) / group * (2 if kind == "all-reduce" else 1)
        for dtype, size in _array_bytes(_full_shape(instruction)).items():
            row = found[kind, dtype]
            row.count += times
            row.full_bytes += times * size
            row.link_bytes += times * size * share

    def visit(name: str, times: int):
        for instruction in computations.get(name, ()):
            kind = instruction.op.removesuffix("-start")
            called = instruction.attribute("calls")
            reductions = [i for i in computations.get(called or "", ()) if i.op == "all-reduce"]
            if instruction.op == "while":
                loops = _trip_count(computations[instruction.attribute("condition") or ""])
                visit(instruction.attribute("body") or "", times * loops)
            elif kind in KINDS:
                add(kind, instruction, times)
            elif reductions and called.startswith("all-reduce-scatter"):
                for reduction in reductions:
                    add("reduce-scatter", reduction, times)
            elif called:
                visit(called, times)

    visit(entry, 1)
    return dict(sorted(found.items(), key=lambda item: -item[1].link_bytes))
