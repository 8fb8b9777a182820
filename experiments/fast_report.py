"""Measures the distilled tiny models and writes what docs say of them.

    python experiments/fast_report.py --runs runs/tiny
    python tools/pack_tiny.py --weights runs/tiny/fast --figures runs/tiny/report/distilled.json \\
        --out kontext_jax/assets/models/tiny-fast

Teacher is DIR/final with classifier-free guidance; beside it stand DIR/guidance, DIR/ladd,
DIR/fast and DIR/policy (the stages of experiments/tiny_curriculum.py), as far as they are there, by
as many steps as each is made for and fewer. 500 edits of each split by three seeds of
noise, 200 chains of six edits; what was drawn and measured is kept in DIR/report and not made again
for the same weights. VGG16 must have been fetched once by
`python -m kontext_jax.evaluation.fetch_perceptual`. Into --docs go distillation.md's results and
the pictures distilled.png, multi_turn.png and fast_demo.png; nothing of them is typed by hand.
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tiny_report import DEMO, fill_page, measured, say

from convert_weights.open import open_weights
from kontext_jax.data.worlds.scenes import WORLDS
from kontext_jax.evaluation import distilled, multi_turn
from kontext_jax.evaluation.edit_features import Features
from kontext_jax.evaluation.edit_report import markdown, rows_sheet
from kontext_jax.evaluation.rows import OpenRow, Row, open_rows
from kontext_jax.pictures.files import load_picture, resize, write_png
from kontext_jax.runtime import programs
from kontext_jax.sampling.requests import find_image
from kontext_jax.weights.perceptual import load_perceptual

FEW = (4, 2, 1)
SHEET = 8


def table_rows(runs: Path, steps: int, cfg: float) -> dict[str, Row]:
    """The rows of the table, by what the criteria call them."""
    final, guided, ladd, fast, policy = (
        str(runs / name) for name in ("final", "guidance", "ladd", "fast", "policy")
    )
    rows = {
        "teacher": Row(f"CFG {cfg:g}, {steps} steps", final, steps, "euler", cfg=cfg),
        "teacher 4": Row(f"CFG {cfg:g}, 4 steps", final, 4, "euler", cfg=cfg),
        "plain": Row(f"no guidance, {steps} steps", final, steps, "euler", cfg=1.0),
    }
    if Path(guided).exists():
        for n in (steps, *FEW):
            rows[f"guided {n}"] = Row(f"distilled guidance, {n} steps", guided, n, "euler", cfg)
    if Path(ladd).exists():
        for n in FEW:
            rows[f"renoise {n}"] = Row(f"LADD, {n} renoise steps", ladd, n, "renoise")
        for n in FEW[:-1]:  # one step is the same by both
            rows[f"euler {n}"] = Row(f"LADD, {n} euler steps", ladd, n, "euler")
    if Path(fast).exists():
        for n in FEW:
            rows[f"mixed {n}"] = Row(f"LADD, mixed, {n} renoise steps", fast, n, "renoise")
    if Path(policy).exists():
        rows["policy 4"] = Row("policies, 4 steps", policy, 4, "policy")
    return rows


def turn_rows(rows: Mapping[str, Row], steps: int) -> list[Row]:
    """Those that are followed over turns."""
    followed = "teacher", f"guided {steps}", "renoise 4", "mixed 4", "policy 4"
    return [rows[key] for key in followed if key in rows]


def criteria(report: Mapping, names: Mapping[str, str], steps: int) -> list[list[str]]:
    """What was asked of the distilled models, found, and whether it is so: lines of a table.

    Args:
      names: titles of rows, by their names in `table_rows`.
    """
    lines = []
    for split, found in report["splits"].items():

        def figure(key: str, *path: str, found=found) -> float | None:
            value = found.get(names.get(key, ""))
            for part in path:
                value = None if value is None else value.get(part)
            return value

        def line(
            text: str, value: float | None, least: float | None, digits: int = 2, split=split
        ) -> None:
            if value is None or least is None:
                return
            met = "yes" if value >= least else "no"
            title = f"{split.replace('_', ' ')}: {text}"
            lines.append([title, f"{value:.{digits}f}", f"{least:.{digits}f}", met])

        def success(key: str) -> float | None:
            return figure(key, "success", "percent")

        teacher, guided = success("teacher"), f"guided {steps}"
        line("PSNR of distilled guidance to CFG, dB", figure(guided, "psnr_to_teacher", "mean"), 25)
        line("success of distilled guidance, % (CFG’s − 2)", success(guided), teacher - 2)
        few = [key for key in ("renoise 4", "euler 4") if success(key) is not None]
        if not few or success("guided 4") is None:
            continue
        best = max(few, key=success)
        wanted = min(success("guided 4") + 10, 0.95 * success(guided))
        line("success of LADD in 4 steps, %", success(best), wanted)
        line("success of LADD in 1 step, %", success("renoise 1"), 5 * success("guided 1"))
        line("success of LADD, mixed, in 4 steps, %", success("mixed 4"), wanted)
        line("diversity of LADD’s captions", figure(best, "diversity_text_to_image", "share"), 0.7)
        line("PSNR outside, LADD, dB", figure(best, "psnr", "mean"),
             figure(guided, "psnr", "mean") - 1.5)  # fmt: skip
        if (own := figure(best, "vgg_mmd_to_teacher")) is not None:
            # Unbiased estimates, which are below 0 for half of all equal pairs: no ratio.
            line("VGG-MMD to CFG of 4 teacher steps, less LADD’s",
                 figure("guided 4", "vgg_mmd_to_teacher") - own, 0, digits=4)  # fmt: skip
        line("success of policies in 4 steps, %", success("policy 4"), wanted)
    return lines


def square(name: str, side: int) -> np.ndarray:
    """The middle of a picture of the package: uint8 [side, side, 3]."""
    pixels = load_picture(find_image(name)).pixels
    height, width = pixels.shape[:2]
    edge = min(height, width)
    left, top = (width - edge) // 2, (height - edge) // 2
    return resize(pixels, side, side, box=(left, top, left + edge, top + edge))


def demo(rows: Sequence[OpenRow], side: int) -> np.ndarray:
    """Pictures of the package edited by each row, with the time of one alone: uint8 RGB."""
    before = [square(name, side) for name, _ in DEMO]
    columns = {"before": before}
    for row in rows:
        made, seconds = [], []
        for (_, text), picture in zip(DEMO, before, strict=True):
            start = time.perf_counter()
            made += row.model.make([text], [picture], (side, side), row.cfg, 0)
            seconds.append(time.perf_counter() - start)
        # The median leaves out the first, which was compiled for.
        columns[f"{row.name}: {1000 * np.median(seconds):.0f} ms"] = made
    return rows_sheet([text for _, text in DEMO], columns, {}, zoom=3)


def results(content: Mapping, turns: Mapping | None) -> str:
    """The part of docs/distillation.md after the mark; None: without edits in a row."""
    settings, head = content["settings"], ["", "found", "at least", "met"]
    parts = [
        f"{settings['num']} edits of scenes of each split, half as many captions, "
        f"{settings['seeds']} seeds of noise each. Bold is the teacher. Columns as in "
        "`kontext_jax/evaluation/distilled.py`; brackets are 95 % intervals.",
        distilled.tables(content["report"]).strip(),
        *(["What was asked for:", markdown(head, content["criteria"])] * bool(content["criteria"])),
        "The first held-out edits, not chosen:",
        "![edits by all rows](distilled.png)",
        "Pictures of the package, and the time of one picture alone on this CPU:",
        "![teacher and few steps](fast_demo.png)",
    ]
    if turns is not None:
        parts += [
            "### Six edits in a row",
            f"{turns['chains']} chains of edits about all but one object; see "
            "`kontext_jax/evaluation/multi_turn.py`.",
            multi_turn.table(turns["report"]).strip(),
            "![what is left after each turn](multi_turn.png)",
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), metavar="DIR")
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR")
    parser.add_argument("--num", type=int, default=500, help="edits of scenes of each split")
    parser.add_argument("--chains", type=int, default=200, help="of six edits; 0: none")
    parser.add_argument("--seeds", type=int, default=3, help="of noise")
    parser.add_argument("--steps", type=int, default=20, help="of the teacher")
    parser.add_argument("--cfg", type=float, default=2.5, help="guidance, in either form")
    parser.add_argument("--no-vgg", action="store_true", help="without distances by VGG16")
    args = parser.parse_args(argv)
    out = args.runs / "report"
    out.mkdir(parents=True, exist_ok=True)
    programs.keep_compiled_programs(programs.default_cache_dir())
    world, rows = WORLDS["easy"], table_rows(args.runs, args.steps, args.cfg)
    opened = dict(zip(rows, open_rows(list(rows.values()), open_weights), strict=True))
    names = {key: row.name for key, row in rows.items()}
    settings = {name: getattr(args, name) for name in ("num", "seeds", "steps", "cfg")}
    settings["vgg"] = not args.no_vgg

    def measure() -> dict:
        vgg = None if args.no_vgg else Features(load_perceptual("vgg16"))
        report, made = distilled.evaluate(
            list(opened.values()),
            names["teacher"],
            *(world, args.num, 0, args.seeds),
            features=vgg,
            keep=out / "drawn",
            tell=say,
        )
        write_png(out / "distilled.png", distilled.sheet(made["held_out"], world, SHEET), {})
        return {"report": report}

    chosen = {row.name for row in turn_rows(rows, args.steps)}
    followed = [row for row in opened.values() if row.name in chosen]

    def measure_turns() -> dict:
        report, _, _ = multi_turn.evaluate(followed, world, args.chains, keep=True, tell=say)
        multi_turn.write_report(out, {"chains": args.chains}, followed, report)
        return {"report": report}

    def facts(rows: Iterable[OpenRow]) -> dict:
        return {"rows": {row.name: json.loads(json.dumps(row.facts)) for row in rows}}

    content = measured(
        out / "distilled.json", {"settings": settings} | facts(opened.values()), measure
    )
    content["criteria"] = criteria(content["report"], names, args.steps)
    (args.docs / "distilled.png").write_bytes((out / "distilled.png").read_bytes())
    few = "teacher", "policy 4", "mixed 4", "mixed 2", "mixed 1"
    shown = [opened[key] for key in few if key in opened]
    write_png(args.docs / "fast_demo.png", demo(shown, world.size_px), {})
    turns = None
    if args.chains:
        turns = measured(
            out / "turns.json", {"chains": args.chains} | facts(followed), measure_turns
        )
        (args.docs / "multi_turn.png").write_bytes((out / "multi_turn.png").read_bytes())
    fill_page(args.docs / "distillation.md", results(content, turns), "fast_report.py")
    say(f"wrote {args.docs / 'distillation.md'}")


if __name__ == "__main__":
    main()
