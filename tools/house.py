"""Counts by which code bases are compared: a column for each folder.

    python tools/house.py [DIR …]        without DIR, this checkout

Counted with `ast` over the product's Python files, without tests, tools, experiments, benchmarks
and configs: lines; files; lines of a function with signature, docstring and nested functions;
public functions (no underscore in front) with a docstring; functions with a return type; modules
that lie flat in the largest package.
"""

import argparse
import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("kontext_jax", "convert_weights", "sample.py", "train.py")
NOT_SOURCE = ("test", "tests", "build", "dist", "node_modules", "third_party")


def sources(root: Path) -> list[Path]:
    """All Python files but tests and hidden folders, relative to the root."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if (root / OURS[0]).is_dir() and parts[0] not in OURS:
            continue
        hidden = any(part.startswith(".") or part in NOT_SOURCE for part in parts[:-1])
        if not hidden and not parts[-1].startswith("test_") and parts[-1] != "conftest.py":
            found.append(path.relative_to(root))
    return sorted(found)


def share(count: int, total: int) -> str:
    return f"{100 * count / total:.0f} %" if total else "–"


def count(root: Path) -> dict[str, str]:
    """The rows of one code base."""
    paths = sources(root)
    lines = {path: len((root / path).read_text("utf-8", "replace").splitlines()) for path in paths}
    lengths, public, described, typed = [], 0, 0, 0
    for path in paths:
        try:
            tree = ast.parse((root / path).read_text("utf-8", "replace"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
                typed += node.returns is not None
                if not node.name.startswith("_"):
                    public += 1
                    described += ast.get_docstring(node) is not None
    folders = [path.parent for path in paths if len(path.parts) > 1]
    tops = {folder.parts[0] for folder in folders}
    main = max(tops, key=lambda top: sum(folder.parts[0] == top for folder in folders), default="")
    flat = sum(path.parent == Path(main) and path.name != "__init__.py" for path in paths)
    inner = {path.parts[1] for path in paths if path.parts[0] == main and len(path.parts) > 2}
    return {
        "source lines (no tests)": f"{sum(lines.values()):,}",
        "files; median; largest": f"{len(paths)}; {statistics.median(lines.values()):.0f}; "
        f"{max(lines.values()):,}",
        "function lines: median / p90": f"{statistics.median(lengths):.0f} / "
        f"{sorted(lengths)[int(0.9 * len(lengths))]}",
        "functions over 100 lines": f"{sum(n > 100 for n in lengths)} of {len(lengths):,}",
        "public functions with a docstring": share(described, public),
        "functions with a return type": share(typed, len(lengths)),
        "modules flat in the main package (+ folders)": f"{flat} (+{len(inner)})",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", default=[ROOT])
    args = parser.parse_args()
    columns = {folder.resolve().name: count(folder) for folder in args.folders}
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for row in next(iter(columns.values())):
        print(f"| {row} | " + " | ".join(column[row] for column in columns.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
