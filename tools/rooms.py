"""Rooms of the house and the arrows between them, read off the code's own imports.

    python tools/rooms.py                                what there is, floor by floor
    python tools/rooms.py --into docs/architecture.md    writes it between the page's marks

A room is a package of `kontext_jax`, a module beside them, `convert_weights` or a script of the
top level; an arrow goes from a room to a room that it imports. FLOORS says where each room stands:
tests/test_architecture.py fails where an arrow does not go to a lower floor.
"""

import argparse
import ast
import collections
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kontext_jax", "convert_weights")
FACE = "__init__"  # `import kontext_jax`

# From the top down; a room imports from rooms on lower floors alone.
FLOORS: dict[int, tuple[str, ...]] = {
    7: (
        *("__init__", "__main__", "hlo_cost"),
        *("sample.py", "train.py", "tools", "benchmarks", "experiments"),
    ),
    6: ("commands", "precompute", "evaluation", "plan", "configs"),
    5: ("sampling", "training", "convert_weights"),
    4: ("weights",),
    3: ("models", "objectives", "data"),
    2: ("ops", "flow", "pictures", "storage", "hlo"),
    1: ("types", "numerics", "batches", "trees", "terminal", "runtime"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

Arrows = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Room → room that it imports → the files that do."""


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path} imports relatively")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files() -> list[Path]:
    """All Python files but tests and notebooks, relative to the root."""
    folders = (*PACKAGES, "configs", "tools", "benchmarks", "experiments")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in (*found, *ROOT.glob("*.py")))


def room_of_file(path: Path) -> str:
    """The room of a file: a folder, or a file without its suffix."""
    if path.parts[0] != "kontext_jax":
        return path.parts[0]
    return path.parts[1].removesuffix(".py")


def room_of_import(name: str) -> str | None:
    """The room of a dotted name; None if it is none of ours."""
    package, *rest = name.split(".")
    if package == "kontext_jax":
        # `from kontext_jax import x` means the room x, or a name of the face.
        return rest[0] if rest and rest[0] in FLOOR_OF else FACE
    return package if package in PACKAGES or package in ("configs",) else None


def arrows() -> Arrows:
    """Every arrow between two rooms."""
    found: dict[str, dict[str, set[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for path in files():
        room = room_of_file(path)
        for name in imported_modules(ROOT / path):
            used = room_of_import(name)
            if used is not None and used != room:
                found[room][used].add(path.as_posix())
    return {
        room: {used: tuple(sorted(paths)) for used, paths in sorted(to.items())}
        for room, to in sorted(found.items())
    }


def not_down(found: Arrows) -> list[str]:
    """The arrows that stay on their floor or rise, a line each."""
    return [
        f"{room} (floor {FLOOR_OF[room]}) imports {used} (floor {FLOOR_OF[used]}): "
        + ", ".join(paths)
        for room, to in found.items()
        for used, paths in to.items()
        if FLOOR_OF[used] >= FLOOR_OF[room]
    ]


def picture(found: Arrows) -> list[str]:
    """The house as text: floors, rooms with their lines, and what each imports."""
    lines_of = collections.Counter()
    count_of = collections.Counter()
    for path in files():
        lines_of[room_of_file(path)] += len((ROOT / path).read_text("utf-8").splitlines())
        count_of[room_of_file(path)] += 1
    rooms = [room for room in FLOOR_OF if count_of[room]]
    num_arrows = sum(map(len, found.values()))
    lines = [
        f"{len(rooms)} rooms on {len(FLOORS)} floors, {num_arrows} arrows, "
        f"{len(not_down(found))} of them not down.",
        "",
        "| floor | room | files | lines | imports |",
        "|---|---|---|---|---|",
    ]
    for floor, names in sorted(FLOORS.items(), reverse=True):
        for room in names:
            if count_of[room]:
                used = sorted(found.get(room, {}), key=lambda name: (-FLOOR_OF[name], name))
                lines.append(
                    f"| {floor} | {room} | {count_of[room]} | {lines_of[room]:,} | "
                    f"{' '.join(used)} |"
                )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--into", type=Path, metavar="PAGE.md", help="write between the marks")
    args = parser.parse_args()
    found = arrows()
    if args.into:
        sys.path.insert(0, str(ROOT / "experiments"))
        from pages import insert

        insert(args.into, {"rooms": picture(found)})
        return 0
    print("\n".join(picture(found)))
    wrong = not_down(found)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
