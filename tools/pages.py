"""Pages of docs/ into which tools write, beside what people wrote.

python tools/pages.py docs/full-run.md suites LINE LINE …     writes lines between the marks
"""

import sys
from pathlib import Path

from kontext_jax.runtime.atomic import write_text


def insert(path: Path, parts: dict[str, list[str]]) -> None:
    """Puts lines between the marks of their names, `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
      ValueError: the page has no such marks.
    """
    text = path.read_text()
    for name, lines in parts.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{path}: expected one {begin.strip()} and one {end}")
        head, rest = text.split(begin)
        text = head + begin + "\n".join(lines).rstrip() + "\n" + end + rest.split(end)[1]
    write_text(path, text)


if __name__ == "__main__":
    page, name, *lines = sys.argv[1:]
    insert(Path(page), {name: lines})
