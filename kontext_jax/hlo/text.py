"""Reading the text of a compiled program (`Compiled.as_text()`): its operations and its loops.

A loop that counts by a constant to a constant, as `lax.scan` does, is known to run as often as that
says; a conditional counts as the costlier of its branches, by the compiler's cycles.
"""

import dataclasses
import functools
import math
import re
from typing import Any

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?=,|$)(.*)$", re.DOTALL
)
_ARRAY = re.compile(r"\b([a-z]+[\da-z]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|called_computation)=%?([\w.\-]+)")
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program.

    Attributes:
      operands: names; the text itself of a constant or a parameter's number.
      attributes: everything behind the operands.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    def attribute(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that it calls, other than a loop's or a conditional's."""
        return _CALLED.findall(self.attributes)

    @property
    def source(self) -> str:
        """The JAX operation it was made for: `op_name` of its metadata.

        Without "eval_jaxpr", which flax 0.12.12 puts into the path of all that a scan lifts.
        """
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("eval_jaxpr/", "") if found else ""

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate for one execution, where it gives one."""
        found = re.search(r'"?estimated_cycles"?:"?(\d+)', self.attributes)
        return int(found[1]) if found else None

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found and found[1]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of the arrays in a shape's text, those of tuples one after another."""
    return [
        (dtype, tuple(int(d) for d in dims.split(",") if d))
        for dtype, dims in _ARRAY.findall(shape)
        if dtype in ITEM_BYTES
    ]


def array_text(dtype: str, dims: tuple[int, ...]) -> str:
    return f"{dtype}[{','.join(map(str, dims))}]"


def num_bytes(shape: str) -> float:
    return sum(ITEM_BYTES[dtype] * math.prod(dims) for dtype, dims in arrays(shape))


@dataclasses.dataclass(frozen=True)
class _Carried:
    """A value that a loop hands on: element `index` of its state."""

    index: int


@dataclasses.dataclass(frozen=True)
class Call:
    """A computation that an instruction runs, `times` times; None: the text does not say."""

    name: str
    times: int | None
    arguments: tuple = ()


class Program:
    """The computations of a program's text, name → {name: instruction} in the order they run."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._ops_within: dict[str, frozenset[str]] = {}
        self.entry, current = "", ""
        lines: list[str] = []

        def finish():
            if lines and (match := _INSTRUCTION.match("\n".join(lines))):
                root, name, shape, op, operands, attributes = match.groups()
                if op not in ("constant", "parameter"):
                    names = tuple(re.findall(r"%([\w.\-]+)", operands))
                else:
                    names = (operands,)
                self.computations[current][name] = Instruction(
                    name, shape, op, names, attributes, bool(root)
                )
            lines.clear()

        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head[1]
                self.computations[current] = {}
                if line.startswith("ENTRY"):
                    self.entry = current
            elif line == "}" or line.startswith("}, execution_thread"):
                finish()
                current = ""
            elif current:
                if re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
                    finish()
                lines.append(line)
        found = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self.num_partitions = int(found[1]) if found else 1

    def root(self, name: str) -> Instruction | None:
        return next((i for i in self.computations.get(name, {}).values() if i.is_root), None)

    def operands(self, where: str, instruction: Instruction) -> list[Instruction]:
        """The instructions that make an instruction's operands."""
        found = self.computations[where]
        return [found[name] for name in instruction.operands if name in found]

    def ops_within(self, name: str) -> frozenset[str]:
        """Kinds of all operations of a computation and of those it calls."""
        if name not in self._ops_within:
            found = set()
            for instruction in self.computations.get(name, {}).values():
                found.add(instruction.op)
                for called in instruction.called:
                    found |= self.ops_within(called)
            self._ops_within[name] = frozenset(found)
        return self._ops_within[name]

    def calls(self, where: str, instruction: Instruction, arguments: tuple = ()) -> list[Call]:
        """What a loop, conditional or call runs; [] for other instructions, fusions included.

        Args:
          where: the computation it stands in.
          arguments: arguments of that computation, in the form that a `Call` to it has them.
        """
        if instruction.op == "while":
            return [self._loop(where, instruction, arguments)]
        if instruction.op == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = (
                re.findall(r"%?([\w.\-]+)", listed[1])
                if listed
                else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
            )
            return [Call(max(names, key=self._cycles_within), 1)]
        if instruction.op == "call":
            return [Call(name, 1) for name in instruction.called]
        return []

    def _cycles_within(self, name: str) -> float:
        total = 0.0
        for instruction in self.computations[name].values():
            total += instruction.cycles or 0
            for call in self.calls(name, instruction):
                total += (call.times or 1) * self._cycles_within(call.name)
        return total

    def _loop(self, where: str, loop: Instruction, arguments: tuple) -> Call:
        """A loop's body, how often it runs, and what of its state is known and stays."""
        condition, body = loop.attribute("condition") or "", loop.attribute("body") or ""
        initial = self._value(where, loop.operands[0], arguments)
        initial = initial if isinstance(initial, tuple) else ()
        steps = self._steps(body)
        invariant = tuple(
            value if steps.get(index) == 0 else None for index, value in enumerate(initial)
        )
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        times = int(known[1]) if known else self._trip_count(condition, initial, steps)
        return Call(body, times, (invariant,))

    def _trip_count(self, condition: str, initial: tuple, steps: dict[int, int]) -> int | None:
        root = self.root(condition)
        state = tuple(_Carried(index) for index in range(len(initial) or 4096))
        where, arguments = condition, (state,)
        if root is not None and root.op == "fusion":  # the comparison was fused
            arguments = tuple(self._value(where, name, arguments) for name in root.operands)
            where = root.called[0]
            root = self.root(where)
        if root is None or root.op != "compare" or root.attribute("direction") not in _MIRRORED:
            return None
        left, right = (self._value(where, name, arguments) for name in root.operands)
        direction = root.attribute("direction") or ""

        def start_and_step(side: Any) -> tuple[int | None, int]:
            if not isinstance(side, _Carried):
                return side, 0
            start = initial[side.index] if side.index < len(initial) else None
            return start if isinstance(start, int) else None, steps.get(side.index, 0)

        (start, step), (bound, bound_step) = start_and_step(left), start_and_step(right)
        if bound_step and not step:
            start, step, bound, direction = bound, bound_step, start, _MIRRORED[direction]
        if not isinstance(left, _Carried) and not isinstance(right, _Carried):
            return None
        if bound is None or not isinstance(bound, int):
            return None
        # A counter whose beginning stands outside the text begins at 0, as those of scans do.
        span = (bound - (start or 0)) / (step or 1)
        times = math.floor(span) + 1 if direction in ("LE", "GE") else math.ceil(span)
        return times if times >= 0 else None

    def _steps(self, body: str) -> dict[int, int]:
        """Element of a loop's state → what each iteration adds to it, where that is a constant."""
        root = self.root(body)
        if root is None or root.op != "tuple":
            return {}
        state = (tuple(_Carried(index) for index in range(len(root.operands))),)
        found = {}
        for index, name in enumerate(root.operands):
            value = self._value(body, name, state)
            if value == _Carried(index):
                found[index] = 0
            elif isinstance(value, _Sum) and value.start == _Carried(index):
                found[index] = value.step
        return found

    def _value(self, where: str, name: str, arguments: tuple) -> Any:
        """What an instruction makes, where that is a known number: int, tuple, or of a state."""
        instruction = self.computations.get(where, {}).get(name)
        if instruction is None:
            return None
        if instruction.op == "constant":
            text = instruction.operands[0]
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        if instruction.op == "parameter":
            number = int(instruction.operands[0])
            return arguments[number] if number < len(arguments) else None
        if instruction.op in _SAME:
            return self._value(where, instruction.operands[0], arguments)
        if instruction.op == "tuple":
            return tuple(self._value(where, name, arguments) for name in instruction.operands)
        if instruction.op == "get-tuple-element":
            whole = self._value(where, instruction.operands[0], arguments)
            index = int(instruction.attribute("index") or 0)
            return whole[index] if isinstance(whole, tuple) and index < len(whole) else None
        if instruction.op in ("add", "subtract"):
            sides = [self._value(where, name, arguments) for name in instruction.operands]
            if instruction.op == "add" and isinstance(sides[0], int):
                sides.reverse()
            left, right = sides
            if not isinstance(right, int):
                return None
            right = right if instruction.op == "add" else -right
            if isinstance(left, int):
                return left + right
            return _Sum(left, right) if isinstance(left, _Carried) else None
        is_number = [dims for _, dims in arrays(instruction.shape)] == [()]
        if instruction.op == "fusion" and is_number:
            inner = instruction.called[0]
            given = tuple(self._value(where, name, arguments) for name in instruction.operands)
            root = self.root(inner)
            return self._value(inner, root.name, given) if root else None
        return None


_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class _Sum:
    start: _Carried
    step: int
