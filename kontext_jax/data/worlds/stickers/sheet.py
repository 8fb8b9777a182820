"""A sheet of examples to look at: `python -m kontext_jax.data.worlds.stickers.sheet --out PNG`.

Each example shows its references, an arrow, its target, and its text. Options choose world, split,
seed and number.
"""

import argparse
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kontext_jax.data.worlds.stickers.drawings import open_drawings
from kontext_jax.data.worlds.stickers.examples import WORLDS, StickerExample, StickerExamples
from kontext_jax.data.worlds.stickers.render import Renderer

_TEXT_PX = 46
_GAP_PX = 12
_ARROW_PX = 18
_PAPER, _INK = (255, 255, 255), (40, 42, 52)


def draw_example(
    render: Renderer, example: StickerExample, most_sources: int, note: str = ""
) -> Image.Image:
    """References, arrow and target over the text."""
    side = render.side_px
    draft = example.draft
    width = most_sources * (side + 4) + _ARROW_PX + side if most_sources else side
    text_px = _TEXT_PX if most_sources else 2 * _TEXT_PX
    tile = Image.new("RGB", (width, side + text_px), _PAPER)
    draw = ImageDraw.Draw(tile)
    for number, source in enumerate(draft.sources):
        left = (most_sources - len(draft.sources) + number) * (side + 4)
        tile.paste(Image.fromarray(render(source)), (left, 0))
    tile.paste(Image.fromarray(render(draft.target)), (width - side, 0))
    font = ImageFont.load_default(12)
    if most_sources:
        x, y = width - side - _ARROW_PX + 2, side // 2
        draw.polygon([(x, y - 5), (x + 8, y), (x, y + 5)], _INK)
    lines = textwrap.wrap(draft.text + note, max(20, width // 6))[: 3 if most_sources else 6]
    draw.multiline_text((0, side + 2), "\n".join(lines), _INK, font, spacing=2)
    return tile


def draw_sheet(
    render: Renderer, examples: Iterable[StickerExample], columns: int, with_notes: bool = False
) -> Image.Image:
    """Examples row by row."""
    examples = list(examples)
    most = max(len(example.draft.sources) for example in examples)
    tiles = [
        draw_example(render, e, most, f" [{', '.join(sorted(e.draft.novelties))}]" * with_notes)
        for e in examples
    ]
    width, height = (size + _GAP_PX for size in tiles[0].size)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP_PX, rows * height + _GAP_PX), _PAPER)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (_GAP_PX + column * width, _GAP_PX + row * height))
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="PNG")
    parser.add_argument("--world", default="edits", choices=sorted(WORLDS))
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=48, help="number of examples")
    parser.add_argument("--columns", type=int, default=4)
    args = parser.parse_args(argv)
    drawings = open_drawings()
    examples = StickerExamples(WORLDS[args.world], drawings, args.split, args.seed, args.count)
    drawn = (examples[i] for i in range(args.count))
    sheet = draw_sheet(Renderer(drawings), drawn, args.columns, args.split == "held_out")
    sheet.save(args.out)
    print(f"wrote {args.out}: {np.prod(sheet.size):,} pixels")


if __name__ == "__main__":
    main()
