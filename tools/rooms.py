"""Rooms of the house and the arrows between them, read off the code's own imports.

    python tools/rooms.py                              floors, rooms, arrows, what is wrong
    python tools/rooms.py --page docs/architecture.md  writes the table between the page's marks
    python tools/rooms.py --picture docs/rooms.png     draws it (extra `plot`)
    python tools/rooms.py --checkout DIR               counts another checkout, old ones too

A room is a package of `kontext_jax`, a module beside them, `convert_weights`, or a script or folder
of the top level; an arrow goes from a room to a room that it imports. FLOORS says where each room
stands: tests/test_architecture.py fails where an arrow does not go to a lower floor. For another
checkout a floor is the longest way down, and rooms that reach each other are a circle.
"""

import argparse
import ast
import collections
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kontext_jax", "convert_weights")
FOLDERS = ("configs", "tools", "benchmarks", "experiments")
FACE = "__init__"  # `import kontext_jax`, with what stands behind it in api.py

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
    2: ("fields", "ops", "flow", "pictures", "storage", "hlo"),
    1: ("types", "numerics", "batches", "trees", "terminal", "charts", "runtime"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

Arrows = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Room → room that it imports → the files that do."""


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it the import stands.

    Raises:
      ValueError: the file imports relatively.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path} imports relatively")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(root: Path = ROOT) -> list[Path]:
    """All Python files but tests and notebooks, relative to the root."""
    found = [path for folder in (*PACKAGES, *FOLDERS) for path in (root / folder).rglob("*.py")]
    return sorted(path.relative_to(root) for path in (*found, *root.glob("*.py")))


def room_of_file(path: Path) -> str:
    """The room of a file: a folder, or a file without its suffix."""
    if path.parts[0] != "kontext_jax":
        return path.parts[0]
    room = path.parts[1].removesuffix(".py")
    return FACE if room == "api" else room


def room_of_import(name: str, root: Path = ROOT) -> str | None:
    """The room of a dotted name; None if it is none of ours."""
    package, *rest = name.split(".")
    if package == "kontext_jax":
        # `from kontext_jax import x` means the room x, or a name of the face.
        places = [root / package / f"{rest[0]}{suffix}" for suffix in ("", ".py")] if rest else []
        found = any(place.exists() for place in places) and rest[0] != "api"
        return rest[0] if found else FACE
    return package if package in (*PACKAGES, "configs") else None


def arrows(root: Path = ROOT) -> Arrows:
    """Every arrow between two rooms."""
    found: dict[str, dict[str, set[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for path in files(root):
        room = room_of_file(path)
        for name in imported_modules(root / path):
            used = room_of_import(name, root)
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


def circles(found: Arrows) -> list[set[str]]:
    """Groups of rooms that all reach each other."""
    reached = {room: set(_below(found, room)) for room in found}
    groups: list[set[str]] = []
    for room, below in reached.items():
        if room in below and not any(room in group for group in groups):
            groups.append({other for other in below if room in reached.get(other, ())})
    return groups


def _below(found: Arrows, room: str) -> Iterator[str]:
    """Every room that can be reached from one, itself only by a circle."""
    seen: set[str] = set()
    waiting = [*found.get(room, ())]
    while waiting:
        used = waiting.pop()
        if used not in seen:
            seen.add(used)
            yield used
            waiting += found.get(used, ())


def longest_way_down(found: Arrows) -> int:
    """The number of floors that the arrows need; rooms of a circle count as one."""
    groups = circles(found)
    name_of = {room: min(group) for group in groups for room in group}
    plain: dict[str, set[str]] = collections.defaultdict(set)
    for room, to in found.items():
        for used in to:
            a, b = name_of.get(room, room), name_of.get(used, used)
            if a != b:
                plain[a].add(b)
    depth: dict[str, int] = {}

    def floors_from(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((floors_from(used) for used in plain.get(room, ())), default=0)
        return depth[room]

    return max(map(floors_from, list(plain)), default=0)


def summary(root: Path) -> str:
    """Rooms, floors, arrows and circles of any checkout, in one line."""
    found = arrows(root)
    rooms = {room_of_file(path) for path in files(root)}
    groups = ", ".join(" ↔ ".join(sorted(group)) for group in circles(found)) or "none"
    return (
        f"{len(rooms)} rooms, {longest_way_down(found)} floors, "
        f"{sum(map(len, found.values()))} arrows, circles: {groups}"
    )


def table(found: Arrows) -> list[str]:
    """The house as Markdown: floors, rooms with their lines, and what each imports."""
    lines_of, count_of = collections.Counter(), collections.Counter()
    for path in files():
        lines_of[room_of_file(path)] += len((ROOT / path).read_text("utf-8").splitlines())
        count_of[room_of_file(path)] += 1
    lines = ["| floor | room | files | lines | imports |", "|---|---|---|---|---|"]
    for floor, names in sorted(FLOORS.items(), reverse=True):
        for room in names:
            if count_of[room]:
                used = sorted(found.get(room, {}), key=lambda name: (-FLOOR_OF[name], name))
                lines.append(
                    f"| {floor} | `{room}` | {count_of[room]} | {lines_of[room]:,} | "
                    f"{' '.join(used)} |"
                )
    return lines


def draw(found: Arrows, out: Path) -> None:
    """Draws floors, rooms and arrows as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    place, known = {}, found.keys() | {used for to in found.values() for used in to}
    for floor, names in FLOORS.items():
        rooms = [room for room in names if room in known]
        for i, room in enumerate(rooms):
            place[room] = ((i + 0.5) / len(rooms), floor)
    for room, to in found.items():
        for used in to:
            (x0, y0), (x1, y1) = place[room], place[used]
            axes.annotate(
                "",
                xy=(x1, y1 + 0.17),
                xytext=(x0, y0 - 0.17),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": "tab:blue" if y1 < y0 else "tab:red",
                    "alpha": 0.35 if y1 < y0 else 1.0,
                    "linewidth": 0.8,
                },
            )
    for room, (x, y) in place.items():
        axes.text(
            *(x, y, room),
            ha="center",
            va="center",
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "black"},
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0.5, len(FLOORS) + 0.5)
    figure.savefig(out, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=Path, metavar="PAGE.md", help="write the table into a page")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument("--checkout", type=Path, metavar="DIR", help="count another checkout")
    args = parser.parse_args()
    if args.checkout:
        print(summary(args.checkout))
        return 0
    found = arrows()
    wrong = not_down(found)
    if args.page:
        from pages import insert

        insert(args.page, {"rooms": table(found)})
    if args.picture:
        draw(found, args.picture)
    print("\n".join([summary(ROOT), "", *table(found), *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
