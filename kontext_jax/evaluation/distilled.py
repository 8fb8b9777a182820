"""Distilled models beside their teacher: `python -m kontext_jax.evaluation.distilled --row …`.

    python -m kontext_jax.evaluation.distilled --out runs/table \\
        --row "CFG, 20=runs/joint,steps=20,cfg=2.5" --row "CFG, 4=runs/joint,steps=4,cfg=2.5" \\
        --row "fast, 4=runs/fast" --row "fast, 1=runs/fast,steps=1"

The first row, or --teacher, is what the others are compared with. Edits are those of
`kontext_jax.evaluation.edits`, with its grades, and every row draws the same noise:

    to teacher     PSNR to the teacher's picture of the same seed, in dB, at most 60
    diversity      variance of the pictures of one prompt over seeds, summed over pixels and
                   prompts, as a share of the teacher's; a model that has lost modes shows less.
                   Of edits, most of it is what goes wrong; of captions, what they leave open
    ms             a picture, in batches, of the last seed, when all is compiled

Means over seeds count each edit once; brackets are 95 % intervals (of shares of variance: by
bootstrap over prompts).
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from kontext_jax.data.worlds.scenes import WORLDS, SceneExample, SceneSource, Split, World, render
from kontext_jax.evaluation import edits
from kontext_jax.evaluation.edit_features import Features
from kontext_jax.evaluation.edit_report import TITLES, markdown, mean_text, rate_text, rows_sheet
from kontext_jax.evaluation.rows import OpenRow, open_rows, parse_row
from kontext_jax.evaluation.scene_parser import parse
from kontext_jax.runtime.atomic import write_file

Tries = Sequence[Sequence[np.ndarray]]
"""One list of pictures for each seed."""

NUM_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the rows made of one split, for pictures: row → the first seed's results."""

    examples: Sequence[SceneExample]
    pictures: Mapping[str, Sequence[np.ndarray]]


def psnr(a: UInt8[np.ndarray, "height width 3"], b: UInt8[np.ndarray, "height width 3"]) -> float:
    """Of two pictures uint8, in dB, at most 60."""
    return edits.psnr_of(np.square(a.astype(np.float64) - b).mean())


def psnr_to(tries: Tries, others: Tries) -> list[float]:
    """Mean PSNR of each prompt's pictures to others of the same seeds."""
    by_seed = [
        [psnr(a, b) for a, b in zip(own, other, strict=True)]
        for own, other in zip(tries, others, strict=True)
    ]
    return list(np.mean(by_seed, axis=0))


def spread(tries: Tries) -> Float[np.ndarray, " prompts"]:
    """Unbiased variance of each prompt's pictures over seeds, summed over pixels: [N].

    Raises:
      ValueError: there are fewer than two seeds.
    """
    if len(tries) < 2:
        raise ValueError(f"{len(tries)} seed; how much pictures vary takes two or more")
    values = np.stack([np.stack(pictures) for pictures in tries]).astype(np.float64)
    return values.var(axis=0, ddof=1).sum(axis=(1, 2, 3))


def share(
    spreads: Float[np.ndarray, " prompts"], of: Float[np.ndarray, " prompts"]
) -> dict[str, float] | None:
    """Σ spreads / Σ of, with a bootstrap interval over prompts; None if `of` is nothing."""
    if not of.sum():
        return None
    draws = np.random.default_rng(0).integers(0, len(of), (NUM_RESAMPLES, len(of)))
    below = of[draws].sum(axis=1)
    ratios = spreads[draws].sum(axis=1)[below > 0] / below[below > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"share": float(spreads.sum() / of.sum()), "low": float(low), "high": float(high)}


def draw_row(
    row: OpenRow,
    prompts: Sequence[str],
    sources: Sequence[UInt8[np.ndarray, "height width 3"]] | None,
    size: tuple[int, int],
    seeds: Sequence[int],
    keep: Path | None = None,
) -> tuple[list[list[UInt8[np.ndarray, "height width 3"]]], float]:
    """Pictures of every seed, and milliseconds for each of the last one's.

    Args:
      keep: folder from which pictures are taken, and put into, seed by seed.
    """
    tries = []
    for seed in seeds:
        file = None if keep is None else keep / f"{_digest(row, prompts, sources, size, seed)}.npz"
        if file is not None and file.exists():
            with np.load(file, allow_pickle=False) as kept:
                pictures, seconds = list(kept["pictures"]), float(kept["seconds"])
        else:
            start = time.monotonic()
            pictures = row.model.make(prompts, sources, size, row.cfg, seed)
            seconds = time.monotonic() - start
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                arrays: dict[str, Any] = {"pictures": np.stack(pictures), "seconds": seconds}
                write_file(file, functools.partial(np.savez_compressed, **arrays))
        tries.append(pictures)
    return tries, 1000 * seconds / len(prompts)


def _digest(row: OpenRow, prompts, sources, size, seed: int) -> str:
    """Of all that decides a row's pictures, but for the code."""
    asked = json.dumps([row.facts, list(prompts), list(size), seed])
    digest = hashlib.sha256(asked.encode())
    for source in sources or ():
        digest.update(source.tobytes())
    return digest.hexdigest()[:16]


def evaluate(
    rows: Sequence[OpenRow],
    teacher: str,
    world: World,
    count: int,
    seed: int,
    num_seeds: int,
    splits: Sequence[Split] = edits.SPLITS,
    features: Features | None = None,
    keep: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict, dict[str, Drawn]]:
    """The report, and what was made, by split.

    Args:
      teacher: name of the row that the others are compared with; it is drawn first.
      count: edits of each split; half as many captions.
      seed: seed of the examples, and the first of the noise.
      num_seeds: number of seeds of the noise, two or more.
      features: to measure distances by, of the first seed's pictures; None: leaves them out.
      keep: see `draw_row`.

    Raises:
      ValueError: there is no such row, or there is only one seed.
    """
    if teacher not in (names := [row.name for row in rows]):
        raise ValueError(f"there is no row {teacher!r}; rows are {', '.join(names)}")
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seed; how much pictures vary takes two or more")
    ordered = sorted(rows, key=lambda row: row.name != teacher)
    report: dict = {"teacher": teacher, "seeds": num_seeds, "splits": {}}
    report["rows"] = {row.name: row.facts for row in rows}
    made: dict[str, Drawn] = {}
    size = world.size_px, world.size_px
    seeds = [seed + i * edits.SEED_STRIDE for i in range(num_seeds)]
    for split in splits:
        source = SceneSource(world, split, seed=seed, count=count)
        examples = [source[i] for i in range(count)]
        before = [render(e.source, world.size_px) for e in examples]
        after = [render(e.target, world.size_px) for e in examples]
        wanted = edits.caption_examples(world, split, max(1, count // 2), seed)
        found, pictures = {}, {}
        ceilings = {"copy": before, "autoencoder": ordered[0].model.reconstruct(after)}
        for name, results in ceilings.items():
            found[name] = edits.grade_tries(examples, [results], world) | {"passes": 0}
            if features is not None:
                found[name] |= edits.feature_distances(features, before, results, after)
        for row in ordered:
            tries, ms = draw_row(row, [e.text for e in examples], before, size, seeds, keep)
            captions, _ = draw_row(row, [e.text for e in wanted], None, size, seeds, keep)
            if row.name == teacher:
                taught = tries, captions
                spreads = spread(tries), spread(captions)
            found[row.name] = edits.grade_tries(examples, tries, world) | {
                "passes": row.passes,
                "ms_per_picture": ms,
                "text_to_image": edits.rate(edits.exact_share(wanted, captions, world)),
                "psnr_to_teacher": edits.mean(psnr_to(tries, taught[0])),
                "diversity": share(spread(tries), spreads[0]),
                "diversity_text_to_image": share(spread(captions), spreads[1]),
            }
            if features is not None:
                found[row.name] |= edits.feature_distances(features, before, tries[0], after)
                found[row.name]["vgg_mmd_to_teacher"] = features.mmd(tries[0], taught[0][0])
            pictures[row.name] = tries[0]
            tell(f"{split:8} {row.name:24} {rate_text(found[row.name]['success'])}")
        report["splits"][split] = {name: found[name] for name in (*ceilings, *names)}
        made[split] = Drawn(examples, {name: pictures[name] for name in names})
    return report, made


def _share_text(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['share']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def tables(report: Mapping) -> str:
    """The report in Markdown, one table for each split."""
    parts = []
    for split, rows in report["splits"].items():
        has_features = "vgg_mmd" in rows["copy"]
        head = ["", "passes", "success %", "IoU@ΔE10 %", "edited %", "preserved %"]
        head += ["PSNR outside, dB", "text to image, whole scene %", "PSNR to teacher, dB"]
        head += ["diversity of edits", "diversity of captions", "ms a picture"]
        if has_features:
            head += ["LPIPS outside", "VGG-MMD to targets", "VGG-MMD to teacher"]
        body = []
        for name, row in rows.items():
            cells = [f"**{name}**" if name == report["teacher"] else name, str(row["passes"])]
            cells += [rate_text(row["success"])]
            cells += [mean_text(row[f], 100) for f in ("iou", "edited", "preserved")]
            cells += [mean_text(row["psnr"])]
            if "ms_per_picture" in row:
                is_teacher = name == report["teacher"]
                cells += [
                    rate_text(row["text_to_image"]),
                    "–" if is_teacher else mean_text(row["psnr_to_teacher"]),
                    "1" if is_teacher else _share_text(row["diversity"]),
                    "1" if is_teacher else _share_text(row["diversity_text_to_image"]),
                    f"{row['ms_per_picture']:.0f}",
                ]
            else:
                cells += ["–"] * 5
            if has_features:
                lpips, own = row["lpips_outside"], row.get("vgg_mmd_to_teacher")
                cells += [
                    f"{lpips['mean']:.4f} ± {lpips['half_width']:.4f}",
                    f"{row['vgg_mmd']:.4f}",
                    "–" if own is None or name == report["teacher"] else f"{own:.4f}",
                ]
            body.append(cells)
        count = rows["copy"]["success"]["count"]
        parts += [f"### {TITLES[split]} ({count} edits)", markdown(head, body)]
    return "\n\n".join(parts) + "\n"


def sheet(drawn: Drawn, world: World, count: int) -> UInt8[np.ndarray, "height width 3"]:
    """Source, target and each row's result of the first edits."""
    examples = drawn.examples[:count]
    ends = {
        "source": [render(e.source, world.size_px) for e in examples],
        "target": [render(e.target, world.size_px) for e in examples],
    }
    results = {name: pictures[:count] for name, pictures in drawn.pictures.items()}
    right = {
        name: [parse(p, world) == e.target for p, e in zip(pictures, examples, strict=True)]
        for name, pictures in results.items()
    }
    return rows_sheet([e.text for e in examples], ends | results, right)


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m kontext_jax.evaluation.distilled"
) -> int:
    """Runs the command line; the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Grades edits of models that are sampled in different ways, side by side.",
    )
    parser.add_argument(
        "--row",
        action="append",
        required=True,
        metavar="NAME=WEIGHTS[,steps=N][,sampler=S][,guidance=G][,cfg=S]",
        help="a run's folder, a weight directory, tiny or tiny-fast; repeatable",
    )
    parser.add_argument("--teacher", metavar="NAME", help="default: the first row")
    parser.add_argument("--world", default="easy", choices=("easy", "full"))
    parser.add_argument("--num", type=int, default=500, help="edits of each split")
    parser.add_argument("--seed", type=int, default=0, help="of examples, and the first of noise")
    parser.add_argument("--seeds", type=int, default=3, help="how many of noise")
    parser.add_argument(
        "--out", default="", help="folder for distilled.json, distilled.md and distilled.png"
    )
    parser.add_argument("--sheet", type=int, default=8, help="edits among the pictures")
    args = parser.parse_args(argv)
    if args.num < 20:
        parser.error(f"--num is {args.num}; rates of fewer than 20 edits say nothing")

    from convert_weights.open import open_weights
    from kontext_jax.pictures.files import write_png
    from kontext_jax.runtime import programs

    try:
        rows = [parse_row(text) for text in args.row]
        programs.keep_compiled_programs(programs.default_cache_dir())
        opened = open_rows(rows, open_weights)
        world = WORLDS[args.world]
        report, made = evaluate(
            opened,
            args.teacher or rows[0].name,
            *(world, args.num, args.seed, args.seeds),
            tell=lambda line: print(line, file=sys.stderr),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = tables(report)
    print(text)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        content = {"settings": settings, "report": report}
        (out / "distilled.json").write_text(json.dumps(content, indent=1) + "\n")
        (out / "distilled.md").write_text(text + "\n")
        write_png(out / "distilled.png", sheet(made["held_out"], world, args.sheet), {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
