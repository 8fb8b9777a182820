"""How well a model edits procedural scenes: `python -m kontext_jax.evaluation.edits --weights RUN`.

An edit succeeds if the whole scene, read back from the result's pixels, is the target: the change
and everything that was to stay. With A the source, B the target, out the result, ΔE the CIE76
colour difference, and M the pixels where ΔE(A, B) > 5:

    iou        |right| / |M ∪ wrong|;  right: M, ΔE(out, B) ≤ 10;  wrong: not M, ΔE(out, A) > 10
    edited     part of M that is right
    preserved  part of the rest with ΔE(out, A) ≤ 5
    psnr       of out against A outside M, in dB, at most 60

Every table has the rows without which its numbers say little: the source itself ("copy"), the
target through the autoencoder ("autoencoder"), and the model without its reference ("text only").
Copies of the source succeed at "keep", so the rate over all kinds leaves that kind out. Rows that
depend on noise are the means over several seeds of it; intervals count each edit once.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from kontext_jax.data.worlds.scenes import (
    CAPTION,
    WORLDS,
    Scene,
    SceneExample,
    SceneSource,
    Split,
    World,
    render,
)
from kontext_jax.evaluation.edit_features import Features
from kontext_jax.evaluation.edit_model import Model
from kontext_jax.evaluation.edit_report import contact_sheet, rate_text, tables
from kontext_jax.evaluation.scene_parser import parse

CHANGED_DELTA_E, EDITED_DELTA_E, PRESERVED_DELTA_E = 5, 10, 5
MAX_PSNR = 60.0
SPLITS: tuple[Split, ...] = ("seen", "held_out")
SEED_STRIDE = 100_000  # between seeds of noise, each of which counts up from picture to picture


def psnr_of(mean_square: float) -> float:
    """In dB, at most MAX_PSNR, from the mean squared difference of values to 255."""
    return float(min(MAX_PSNR, 10 * np.log10(255**2 / max(mean_square, 1e-12))))


@dataclasses.dataclass(frozen=True)
class Grade:
    """What became of one edit, or the mean of several tries; None where nothing can be said.

    Attributes:
      success: 1 or 0 of one try.
      copied: 1 or 0, whether the result reads as the source although the target differs.
    """

    success: float
    copied: float
    iou: float
    edited: float | None
    preserved: float | None
    psnr: float | None


def lab(pixels: UInt8[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    """CIE L*a*b* (D65) of sRGB uint8 [..., 3], float64."""
    srgb = pixels.astype(np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array(
        [
            [0.4124564, 0.2126729, 0.0193339],
            [0.3575761, 0.7151522, 0.1191920],
            [0.1804375, 0.0721750, 0.9503041],
        ]
    )
    x, y, z = np.moveaxis(xyz / (0.95047, 1.0, 1.08883), -1, 0)
    fx, fy, fz = (
        np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116) for v in (x, y, z)
    )
    return np.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=-1)


def delta_e(
    a: UInt8[np.ndarray, "... 3"], b: UInt8[np.ndarray, "... 3"]
) -> Float[np.ndarray, "..."]:
    """CIE76 difference of two pictures, pixel by pixel."""
    return np.linalg.norm(lab(a) - lab(b), axis=-1)


def grade(
    source: Scene, target: Scene, result: UInt8[np.ndarray, "size_px size_px 3"], world: World
) -> Grade:
    """The grade of `result`, uint8 [size_px, size_px, 3], as an edit of `source` to `target`."""
    found = parse(result, world)
    before, after = (render(scene, world.size_px) for scene in (source, target))
    changed = delta_e(before, after) > CHANGED_DELTA_E
    from_before = delta_e(result, before)
    right = changed & (delta_e(result, after) <= EDITED_DELTA_E)
    wrong = ~changed & (from_before > EDITED_DELTA_E)
    union = (changed | wrong).sum()
    edited = preserved = psnr = None
    if changed.any():
        edited = float(right.sum() / changed.sum())
    if not changed.all():
        preserved = float((from_before[~changed] <= PRESERVED_DELTA_E).mean())
        error = result[~changed].astype(np.float64) - before[~changed]
        psnr = psnr_of(np.square(error).mean())
    return Grade(
        success=float(found == target),
        copied=float(found == source and source != target),
        iou=float(right.sum() / union) if union else 1.0,
        edited=edited,
        preserved=preserved,
        psnr=psnr,
    )


def mean_grade(tries: Sequence[Grade]) -> Grade:
    """The mean of several tries at one edit."""

    def of(field: str) -> float | None:
        values = [getattr(one, field) for one in tries]
        return None if values[0] is None else float(np.mean(values))

    means: dict[str, Any] = {field.name: of(field.name) for field in dataclasses.fields(Grade)}
    return Grade(**means)


def wilson(successes: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a rate (Wilson's score interval)."""
    if not count:
        raise ValueError("no trials, so there is no rate")
    z = 1.959964
    rate = successes / count
    centre = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def rate(flags: Sequence[float]) -> dict[str, float]:
    """Rate, interval and count, as percentages.

    Args:
      flags: 1 or 0 for each edit, or the mean of several tries at it; the interval is that of one
        try each, so with several it is wider than it need be.
    """
    low, high = wilson(sum(flags), len(flags))
    percent = 100 * sum(flags) / len(flags)
    return {"percent": percent, "low": 100 * low, "high": 100 * high, "count": len(flags)}


def mean(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean of what is not None, and half the width of its 95 % interval (normal)."""
    known = np.array([v for v in values if v is not None], np.float64)
    if not len(known):
        return None
    error = 1.96 * known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return {"mean": float(known.mean()), "half_width": float(error)}


def summarise(examples: Sequence[SceneExample], grades: Sequence[Grade]) -> dict:
    """Rates over all kinds of edits but "keep", by kind, and the means of the pixel measures."""
    pairs = list(zip(examples, grades, strict=True))
    changing = [(e, g) for e, g in pairs if e.source != e.target]
    kinds = sorted({e.kind for e in examples})
    fields = ("iou", "edited", "preserved", "psnr")
    return {
        "success": rate([g.success for _, g in changing]),
        "copied": rate([g.copied for _, g in changing]),
        "by_kind": {kind: rate([g.success for e, g in pairs if e.kind == kind]) for kind in kinds},
        **{field: mean([getattr(g, field) for _, g in changing]) for field in fields},
    }


def evaluate(
    model: Model,
    world: World,
    count: int,
    cfg: float,
    seed: int,
    num_seeds: int = 1,
    splits: Sequence[Split] = SPLITS,
    features: Features | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict, dict]:
    """The report, and what was made with the first seed: split → (examples, row → pictures).

    Args:
      count: edits of each split; half as many captions.
      seed: seed of the examples, and the first of the noise.
      num_seeds: number of seeds of the noise.
      features: to measure distances by, of the first seed's pictures; None: leaves them out.
    """
    report: dict[str, dict] = {}
    made = {}
    size = world.size_px, world.size_px
    seeds = [seed + i * SEED_STRIDE for i in range(num_seeds)]
    for split in splits:
        source = SceneSource(world, split, seed=seed, count=count)
        examples = [source[i] for i in range(count)]
        prompts = [e.text for e in examples]
        before = [render(e.source, world.size_px) for e in examples]
        after = [render(e.target, world.size_px) for e in examples]

        def draw(references, scale, prompts=prompts):
            return lambda seed: model.make(prompts, references, size, scale, seed)

        rows = {
            "copy": (0, lambda seed, before=before: before),
            "autoencoder": (0, lambda seed, after=after: model.reconstruct(after)),
            "text only": (model.num_steps, draw(None, 1)),
            "model": (model.num_steps, draw(before, 1)),
        }
        if cfg != 1:
            rows[f"model, CFG {cfg:g}"] = 2 * model.num_steps, draw(before, cfg)
        report[split], pictures = {}, {}
        for name, (passes, run) in rows.items():
            tries = []
            for number in seeds if passes else seeds[:1]:
                start = time.monotonic()
                tries.append(run(number))
                seconds = time.monotonic() - start
            pictures[name] = tries[0]
            report[split][name] = grade_tries(examples, tries, world) | {
                "passes": passes,
                "ms_per_picture": 1000 * seconds / count,  # of the last seed, when all is compiled
            }
            if features is not None:
                report[split][name] |= feature_distances(features, before, tries[0], after)
            tell(f"{split:8} {name:16} {rate_text(report[split][name]['success'])}")
        made[split] = examples, pictures
        wanted = caption_examples(world, split, max(1, count // 2), seed)
        prompts = [e.text for e in wanted]
        drawn = [model.make(prompts, None, size, cfg, number) for number in seeds]
        report[split]["text to image"] = rate(exact_share(wanted, drawn, world))
        tell(f"{split:8} text to image    {rate_text(report[split]['text to image'])}")
    return report, made


def grade_tries(
    examples: Sequence[SceneExample],
    tries: Sequence[Sequence[UInt8[np.ndarray, "size_px size_px 3"]]],
    world: World,
) -> dict:
    """The summary of several tries at each edit, which counts once."""
    grades = [
        [
            grade(e.source, e.target, picture, world)
            for e, picture in zip(examples, pictures, strict=True)
        ]
        for pictures in tries
    ]
    return summarise(examples, [mean_grade(own) for own in zip(*grades, strict=True)])


def feature_distances(
    features: Features,
    before: Sequence[UInt8[np.ndarray, "height width 3"]],
    results: Sequence[UInt8[np.ndarray, "height width 3"]],
    after: Sequence[UInt8[np.ndarray, "height width 3"]],
) -> dict:
    """Of results and sources outside the edits, and of results and targets as a whole."""
    changed = [delta_e(a, b) > CHANGED_DELTA_E for a, b in zip(before, after, strict=True)]
    return {
        "lpips_outside": mean(features.lpips_outside(before, results, changed)),
        "vgg_mmd": features.mmd(results, after),
    }


def caption_examples(world: World, split: Split, count: int, seed: int) -> list[SceneExample]:
    """Scenes to be drawn from their captions."""
    captions = dataclasses.replace(world, kinds=(CAPTION,))
    source = SceneSource(captions, split, seed=seed, count=count)
    return [source[i] for i in range(count)]


def exact_share(
    wanted: Sequence[SceneExample],
    tries: Sequence[Sequence[UInt8[np.ndarray, "size_px size_px 3"]]],
    world: World,
) -> list[float]:
    """In how many of its tries the picture of each caption reads as its scene."""
    return [
        float(np.mean([parse(picture, world) == e.target for picture in own]))
        for e, own in zip(wanted, zip(*tries, strict=True), strict=True)
    ]


def scenes_sheet(
    examples: Sequence[SceneExample],
    pictures: Sequence[UInt8[np.ndarray, "size_px size_px 3"]],
    world: World,
    columns: int = 4,
) -> UInt8[np.ndarray, "height width 3"]:
    """Source, result and target of each edit: see `contact_sheet`."""
    rows, successes = [], []
    for example, picture in zip(examples, pictures, strict=True):
        before, after = (render(s, world.size_px) for s in (example.source, example.target))
        rows.append((before, picture, after))
        successes.append(parse(picture, world) == example.target)
    return contact_sheet([e.text for e in examples], rows, successes, columns)


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m kontext_jax.evaluation.edits"
) -> int:
    """Runs the command line; the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Edits procedural scenes and grades the results.",
    )
    parser.add_argument("--weights", required=True, help="a run's folder or a weight directory")
    parser.add_argument("--world", default="easy", choices=("easy", "full"))
    parser.add_argument("--num", type=int, default=500, help="edits of each split")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--cfg", type=float, default=2.5, help="scale of the guided row; 1: none")
    parser.add_argument("--seed", type=int, default=0, help="of examples, and the first of noise")
    parser.add_argument("--seeds", type=int, default=1, help="how many of noise")
    parser.add_argument("--out", default="", help="folder for edits.json, edits.md and edits.png")
    parser.add_argument("--sheet", type=int, default=24, help="edits on the contact sheet")
    args = parser.parse_args(argv)
    if args.num < 20:
        parser.error(f"--num is {args.num}; rates of fewer than 20 edits say nothing")

    from convert_weights.open import open_weights
    from kontext_jax.pictures.files import write_png
    from kontext_jax.runtime import programs
    from kontext_jax.sampling.stages import Stages

    programs.keep_compiled_programs(programs.default_cache_dir())
    bundle = open_weights(args.weights)
    print(bundle.source, file=sys.stderr)
    world = WORLDS[args.world]
    report, made = evaluate(
        Model(Stages(bundle), args.steps),
        world,
        args.num,
        args.cfg,
        args.seed,
        args.seeds,
        tell=lambda line: print(line, file=sys.stderr),
    )
    text = tables(report)
    print(text)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        content = {"settings": settings, "weights": bundle.identity, "report": report}
        (out / "edits.json").write_text(json.dumps(content, indent=1) + "\n")
        (out / "edits.md").write_text(text + "\n")
        examples, pictures = made["held_out"]
        best = pictures[list(pictures)[-1]]
        sheet = scenes_sheet(examples[: args.sheet], best[: args.sheet], world)
        write_png(out / "edits.png", sheet, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
