"""What the evaluation of edits found, as tables in Markdown and as sheets of pictures."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

TITLES = {"seen": "Seen combinations", "held_out": "Held-out combinations"}
RIGHT, WRONG = (0, 160, 0), (210, 0, 0)


def rate_text(figure: Mapping[str, float]) -> str:
    """A rate in per cent with its interval."""
    return f"{figure['percent']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


def mean_text(figure: Mapping[str, float] | None, factor: float = 1) -> str:
    """A mean with half the width of its interval."""
    if figure is None:
        return "–"
    return f"{factor * figure['mean']:.1f} ± {factor * figure['half_width']:.1f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def kinds_table(rows: Mapping[str, Mapping]) -> str:
    """Success by kind of edit."""
    kinds = list(next(iter(rows.values()))["by_kind"])
    body = [
        [name, *(rate_text(row["by_kind"][kind]) for kind in kinds)] for name, row in rows.items()
    ]
    return markdown(["success % by kind", *kinds], body)


def tables(report: Mapping) -> str:
    """The report on scenes; success in % with 95 % intervals, other measures ± the same."""
    parts = []
    for split, rows in report.items():
        edits = {name: row for name, row in rows.items() if name != "text to image"}
        first = next(iter(edits.values()))
        count = first["success"]["count"]
        head = ["", "success %", "IoU@ΔE10 %", "edited %", "preserved %", "PSNR outside, dB"]
        has_features = "vgg_mmd" in first
        if has_features:
            head += ["LPIPS outside", "VGG-MMD to the targets"]
        body = []
        for name, row in edits.items():
            measures = [mean_text(row[f], 100) for f in ("iou", "edited", "preserved")]
            cells = [name, rate_text(row["success"]), *measures, mean_text(row["psnr"])]
            if has_features:
                lpips = row["lpips_outside"]
                cells += [
                    f"{lpips['mean']:.4f} ± {lpips['half_width']:.4f}",
                    f"{row['vgg_mmd']:.4f}",
                ]
            body.append(cells)
        parts += [
            f"### {TITLES[split]} ({count} edits)",
            markdown(head, body),
            kinds_table(edits),
            f"Text to image, whole scene: {rate_text(rows['text to image'])} %.",
        ]
    return "\n\n".join(parts) + "\n"


def rows_sheet(
    texts: Sequence[str],
    columns: Mapping[str, Sequence[UInt8[np.ndarray, "height width 3"]]],
    successes: Mapping[str, Sequence[bool]],
    zoom: int = 2,
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """One line of pictures for each edit, the columns named at the top: uint8 RGB.

    Args:
      texts: the instructions.
      columns: title → a picture of each edit, all of one size.
      successes: for some of the columns; a green bar under a picture marks a success, a red one a
        failure.
    """
    height_px, width_px = (zoom * side for side in next(iter(columns.values()))[0].shape[:2])
    font, caption_px = ImageFont.load_default(12), 18
    cell, line = width_px + 6, height_px + caption_px + 6
    heads = ["\n".join(textwrap.wrap(title, cell // 7)) for title in columns]
    head_px = 18 * max(1 + head.count("\n") for head in heads)
    sheet = Image.new("RGB", (len(columns) * cell, head_px + len(texts) * line), "white")
    draw = ImageDraw.Draw(sheet)
    for j, (title, pictures) in enumerate(columns.items()):
        draw.text((j * cell + 2, 2), heads[j], fill="black", font=font)
        for i, pixels in enumerate(pictures):
            x, y = j * cell, head_px + i * line + caption_px
            shown = Image.fromarray(np.ascontiguousarray(pixels))
            sheet.paste(shown.resize((width_px, height_px), Image.Resampling.NEAREST), (x, y))
            if title in successes:
                colour = RIGHT if successes[title][i] else WRONG
                draw.rectangle([x, y + height_px, x + width_px - 1, y + height_px + 2], fill=colour)
    for i, text in enumerate(texts):
        draw.text((2, head_px + i * line + 2), text, fill="black", font=font)
    return np.asarray(sheet)


def contact_sheet(
    texts: Sequence[str],
    rows: Sequence[Sequence[UInt8[np.ndarray, "height width 3"]]],
    successes: Sequence[bool],
    columns: int = 4,
    zoom: int = 2,
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Pictures of each edit side by side under its instruction: uint8 RGB.

    Args:
      rows: source, result and target of each edit. A green bar under the result marks a success, a
        red one a failure.
      columns: edits beside each other.
      zoom: how much larger pictures are shown.
    """
    width_px = zoom * max(picture.shape[1] for row in rows for picture in row)
    height_px = zoom * max(picture.shape[0] for row in rows for picture in row)
    margin, caption_px = 6, 16
    width, height = 3 * (width_px + 3) + 15, height_px + caption_px + margin
    sheet = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (text, row, success) in enumerate(zip(texts, rows, successes, strict=True)):
        x, y = i % columns * width, i // columns * height
        draw.text((x + 2, y + 2), text, fill="black")
        for j, pixels in enumerate(row):
            own = zoom * pixels.shape[1], zoom * pixels.shape[0]
            shown = Image.fromarray(np.ascontiguousarray(pixels))
            shown = shown.resize(own, Image.Resampling.NEAREST)
            sheet.paste(shown, (x + j * (width_px + 3), y + caption_px))
        left, bottom = x + width_px + 3, y + caption_px + zoom * row[1].shape[0]
        bar = [left, bottom, left + zoom * row[1].shape[1] - 1, bottom + 2]
        draw.rectangle(bar, fill=RIGHT if success else WRONG)
    return np.asarray(sheet)
