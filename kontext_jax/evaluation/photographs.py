"""How well a model edits photographs that it never saw, against edits with known results.

An edit succeeds if the result is nearer to its target, by squared error, than to anything else
that an instruction of the same sort would have made of the same source: all edits of whole
pictures, or all changes of one drawn object. How near it is, is PSNR to the target, which the row
"autoencoder" bounds. What a removed object leaves behind is judged like the rest, though nobody can
know what the photograph showed there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kontext_jax.data.worlds.photo_edits import KEEP, PhotoExample, PhotoSource, alternatives
from kontext_jax.evaluation.edit_model import Model
from kontext_jax.evaluation.edit_report import (
    contact_sheet,
    kinds_table,
    markdown,
    mean_text,
    rate_text,
)
from kontext_jax.evaluation.edits import SEED_STRIDE, mean, psnr_of, rate


@dataclasses.dataclass(frozen=True)
class PhotoGrade:
    """What became of one edit, or the mean of several tries."""

    success: float
    psnr: float  # to the target, in dB, at most 60


def grade(example: PhotoExample, result: UInt8[np.ndarray, "height width 3"]) -> PhotoGrade:
    """The grade of `result`, uint8 of the example's size."""

    def error(picture: np.ndarray) -> float:
        return float(np.square(result.astype(np.float32) - picture).mean())

    own = error(example.target)
    nearest = min((error(other) for other in alternatives(example)), default=np.inf)
    return PhotoGrade(float(own < nearest), psnr_of(own))


def summarise(examples: Sequence[PhotoExample], grades: Sequence[PhotoGrade]) -> dict:
    """Rates over all kinds of edits but "keep", and by kind; mean PSNR to the target."""
    pairs = list(zip(examples, grades, strict=True))
    changing = [grade for example, grade in pairs if example.kind != KEEP]
    kinds = sorted({example.kind for example in examples})
    return {
        "success": rate([grade.success for grade in changing]),
        "psnr": mean([grade.psnr for grade in changing]),
        "by_kind": {k: rate([g.success for e, g in pairs if e.kind == k]) for k in kinds},
    }


def evaluate(
    model: Model,
    count: int,
    cfg: float,
    seed: int = 0,
    num_seeds: int = 1,
    side_px: int = 64,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict, tuple]:
    """The report, and what was made with the first seed: (examples, row → pictures).

    Args:
      count: square crops of held-out photographs.
      cfg, seed, num_seeds: the request and its seeds, see `edits.evaluate`.
    """
    source = PhotoSource("held_out", seed=seed, count=count, side_px=side_px, square=True)
    examples = [source[i] for i in range(count)]
    prompts, before = [e.text for e in examples], [e.source for e in examples]
    size = side_px, side_px
    rows = {
        "copy": lambda seed: before,
        "autoencoder": lambda seed: model.reconstruct([e.target for e in examples]),
        "model": lambda seed: model.make(prompts, before, size, 1, seed),
    }
    if cfg != 1:
        rows[f"model, CFG {cfg:g}"] = lambda seed: model.make(prompts, before, size, cfg, seed)
    report: dict[str, Any] = {"count": count, "rows": {}}
    made: dict[str, list] = {}
    for name, run in rows.items():
        numbers = range(num_seeds if name.startswith("model") else 1)
        tries = []
        for i in numbers:
            results = run(seed + i * SEED_STRIDE)
            tries.append([grade(e, r) for e, r in zip(examples, results, strict=True)])
            made.setdefault(name, results)
        means = [
            PhotoGrade(*(float(np.mean([getattr(g, f) for g in own])) for f in ("success", "psnr")))
            for own in zip(*tries, strict=True)
        ]
        report["rows"][name] = summarise(examples, means)
        tell(f"photos   {name:16} {rate_text(report['rows'][name]['success'])}")
    return report, (examples, made)


def tables(report: Mapping) -> str:
    """The report in Markdown."""
    rows = report["rows"]
    body = [[n, rate_text(row["success"]), mean_text(row["psnr"])] for n, row in rows.items()]
    head = ("", "success %", "PSNR to the target, dB")
    return f"{markdown(head, body)}\n\n{kinds_table(rows)}\n"


def sheet(
    examples: Sequence[PhotoExample],
    pictures: Sequence[UInt8[np.ndarray, "height width 3"]],
    columns: int = 4,
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Source, result and target of each edit: see `contact_sheet`."""
    pairs = list(zip(examples, pictures, strict=True))
    rows = [(e.source, picture, e.target) for e, picture in pairs]
    successes = [bool(grade(e, picture).success) for e, picture in pairs]
    return contact_sheet([e.text for e in examples], rows, successes, columns)
