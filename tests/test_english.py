"""An entry of a docstring is a noun with its unit, or a full clause; it is no fragment."""

import ast
import collections
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

SECTION = re.compile(r"^( *)(Args|Attributes|Returns|Raises|Yields):\s*$")
ENTRY = re.compile(r"^( *)([*\w][\w*, ]*): +(.*)$")
FRAGMENT = re.compile(r"(of|as|that|where|likewise)\b", re.IGNORECASE)


def load_rooms():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tools" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = load_rooms()


def entries(docstring: str) -> list[str]:
    """The texts of a docstring's entries, without the names before them.

    An entry begins in the first column of its section; a section without named entries ("Returns:"
    and a sentence) is one entry.
    """
    lines, found = docstring.expandtabs().splitlines(), []
    for number, line in enumerate(lines):
        if not (section := SECTION.match(line)):
            continue
        column = None
        for inner in lines[number + 1 :]:
            indent = len(inner) - len(inner.lstrip())
            if not inner.strip() or indent <= len(section[1]):
                break
            first = column is None
            column = indent if first else column
            if indent != column:
                continue
            entry = ENTRY.match(inner)
            if entry:
                found.append(entry[3])
            elif first:
                found.append(inner.strip())
    return found


def fragments() -> dict[str, list[str]]:
    """Room → its fragments, as "file:line: text" with the line of the definition."""
    found = collections.defaultdict(list)
    for path in rooms.files():
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        for node in ast.walk(tree):
            kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
            if not isinstance(node, kinds) or not (text := ast.get_docstring(node)):
                continue
            found[rooms.room_of_file(path)] += [
                f"{path}:{getattr(node, 'lineno', 1)}: {entry}"
                for entry in entries(text)
                if FRAGMENT.match(entry)
            ]
    return found


def test_no_entry_is_a_fragment():
    found = fragments()
    assert len(found) > 10
    assert not [line for lines in found.values() for line in lines]


def test_fragments_are_found():
    docstring = """Head.

    Args:
      x: of the batch; said in
        of two lines.
      y, z: Where they lie.
      often: a noun.

    Returns:
      That which is.
    """
    assert [e for e in entries(docstring) if FRAGMENT.match(e)] == [
        "of the batch; said in",
        "Where they lie.",
        "That which is.",
    ]


if __name__ == "__main__":
    for room, lines in sorted(fragments().items()):
        print(f"{room}: {len(lines)}", *lines, sep="\n  ")
    print(sum(map(len, fragments().values())), "fragments")
