"""Measures the tiny Kontext and writes what docs say of it: `python experiments/tiny_report.py`.

    python experiments/tiny_report.py --runs runs/tiny                  # measures runs/tiny/final
    python tools/pack_tiny.py --weights runs/tiny/final --figures runs/tiny/report/figures.json \\
        --out kontext_jax/assets/models/tiny

Measured are 500 edits of scenes of each split and 320 of held-out photographs, with three seeds of
noise; the model at the kept checkpoints of the joint run, which shows how it grew; and a few edits
of pictures that ship with the package. What was measured is kept in RUNS/report and not measured
again for the same weights. VGG16 must have been fetched once by
`python -m kontext_jax.evaluation.fetch_perceptual`. Into --docs go tiny.md's results, and the
pictures tiny_*.png; nothing of them is typed by hand.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from convert_weights.open import open_weights
from kontext_jax.data.worlds.scenes import WORLDS
from kontext_jax.evaluation import edit_report, edits, photographs
from kontext_jax.evaluation.edit_features import Features
from kontext_jax.evaluation.edit_model import Model
from kontext_jax.evaluation.line_chart import Point, line_chart
from kontext_jax.pictures.files import write_png
from kontext_jax.runtime import programs
from kontext_jax.runtime.atomic import write_json, write_text
from kontext_jax.sampling.pipeline import Pipeline
from kontext_jax.sampling.requests import SampleRequest, prepare
from kontext_jax.sampling.stages import Stages
from kontext_jax.storage import step_folders
from kontext_jax.weights.perceptual import load_perceptual

MARK = "<!-- results: written by experiments/{} -->"
DEMO = (  # image of the package, instruction
    ("example:cat", "make the picture gray"),
    ("example:cat", "tint the picture blue"),
    ("example:cat", "invert the picture"),
    ("example:cat", "mirror the picture"),
    ("example:cat", "put a red frame around the picture"),
    ("example:cat", "add a big yellow circle at the top left"),
    ("example:shapes", "make the red circle yellow"),
    ("example:shapes", "move the red circle to the center"),
    ("example:shapes", "remove the blue square"),
    ("example:shapes", "turn the blue square into a cross"),
    ("example:shapes", "make the background pink"),
    ("example:shapes", "add a big green triangle at the left"),
)
DEMO_SIDE = 208  # pixels of a picture in the strip
SHEET = 24
GROWTH_EVERY = 1000  # steps; configs/tiny_kontext.py keeps these


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measured(file: Path, facts: Mapping, measure) -> dict:
    """What `measure` gives, or what it gave before for the same facts."""
    if file.exists():
        content = json.loads(file.read_text("utf-8"))
        if {key: content.get(key) for key in facts} == dict(facts):
            return content
    content = {**facts, **measure()}
    write_json(file, content)
    return content


def measure_figures(weights: str, settings: Mapping, out: Path) -> dict:
    """Tables of scenes and photographs, and their sheets."""
    bundle = open_weights(weights)

    def measure() -> dict:
        model, world = Model(Stages(bundle), settings["steps"]), WORLDS["easy"]
        cfg, seeds = settings["cfg"], settings["seeds"]
        vgg = Features(load_perceptual("vgg16"))
        report, made = edits.evaluate(
            model, world, settings["num"], cfg, 0, seeds, features=vgg, tell=say
        )
        examples, pictures = made["held_out"]
        best = pictures[list(pictures)[-1]][:SHEET]
        write_png(out / "scenes.png", edits.scenes_sheet(examples[:SHEET], best, world), {})
        photos, (drawn, shown) = photographs.evaluate(
            model, settings["photos"], cfg, num_seeds=seeds, tell=say
        )
        best = shown[list(shown)[-1]][:SHEET]
        write_png(out / "photos.png", photographs.sheet(drawn[:SHEET], best), {})
        return {"report": report, "photos": photos}

    facts = {"settings": dict(settings), "weights": bundle.identity}
    return measured(out / "figures.json", facts, measure)


def measure_growth(runs: Path, settings: Mapping, out: Path) -> dict:
    """Success at the kept checkpoints of the joint run, with guidance: step → figures."""
    steps, _ = step_folders.list_steps((runs / "joint" / "checkpoints").absolute())
    growth = {}
    for step in (step for step in steps if step % GROWTH_EVERY == 0):
        bundle = open_weights(str(runs / "joint"), step=step)

        def measure(bundle=bundle, step=step) -> dict:
            model, world = Model(Stages(bundle), settings["steps"]), WORLDS["easy"]
            num, cfg = settings["growth"], settings["cfg"]
            figures = {}
            for split in edits.SPLITS:
                rows = edits.evaluate(model, world, num, cfg, 0, splits=(split,))[0][split]
                name = list(rows)[-2]  # the guided model, before text to image
                figures[split] = rows[name]["success"]
                figures[f"{split} t2i"] = rows["text to image"]
            photos, _ = photographs.evaluate(model, num, cfg)
            figures["photos"] = list(photos["rows"].values())[-1]["success"]
            say(f"step {step}: {figures['held_out']['percent']:.1f} % of held-out edits")
            return {"figures": figures}

        facts = {"settings": dict(settings), "weights": bundle.identity}
        growth[step] = measured(out / f"growth-{step}.json", facts, measure)["figures"]
    return growth


def demo_strip(weights: str, columns: int = 6) -> np.ndarray:
    """Pictures of the package before and after edits, each under its instruction: uint8 RGB."""
    bundle = open_weights(weights)
    pipeline = Pipeline(bundle, tell=say)
    prepared = [prepare(SampleRequest(text, images=(name,)), bundle.preset) for name, text in DEMO]
    results = {result.request_index: result.pixels for result in pipeline.edit(prepared)}
    font = ImageFont.load_default(13)
    cell, caption = DEMO_SIDE + 6, 20
    rows = -(-len(DEMO) // columns)
    strip = Image.new("RGB", ((columns + 1) * cell, rows * (DEMO_SIDE + caption)), "white")
    draw = ImageDraw.Draw(strip)

    def show(x: int, y: int, text: str, pixels: np.ndarray) -> None:
        zoom = DEMO_SIDE / max(pixels.shape[:2])
        size = round(zoom * pixels.shape[1]), round(zoom * pixels.shape[0])
        draw.text((x + 2, y + 2), text, fill="black", font=font)
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        strip.paste(picture, (x, y + caption))

    for i, (name, text) in enumerate(DEMO):
        y = i // columns * (DEMO_SIDE + caption)
        if i % columns == 0:
            show(0, y, name, prepared[i].pictures[0].pixels)
        show((1 + i % columns) * cell, y, text, results[i])
    return np.asarray(strip)


def growth_chart(growth: Mapping[int, Mapping]) -> np.ndarray:
    """Success over steps of joint training, with 95 % intervals: uint8 RGB."""
    names = {
        "seen": "scenes, seen combinations",
        "held_out": "scenes, held-out combinations",
        "held_out t2i": "text to image, held-out combinations",
        "photos": "held-out photographs",
    }
    curves = {
        title: [
            Point(step, *(figures[name][key] for key in ("percent", "low", "high")))
            for step, figures in growth.items()
        ]
        for name, title in names.items()
    }
    return line_chart(curves, "steps of joint training", "%")


def speed_table(report: Mapping) -> str:
    """Network passes and time a picture, of the held-out rows."""
    rows = [
        [name, str(row["passes"]), f"{row['ms_per_picture']:.0f}"]
        for name, row in report["held_out"].items()
        if "passes" in row
    ]
    return edit_report.markdown(["", "passes", "ms a picture, on this CPU"], rows)


def results(content: Mapping, growth: Mapping) -> str:
    """The part of docs/tiny.md after the mark."""
    settings = content["settings"]
    parts = [
        f"{settings['num']} edits of scenes of each split and {content['photos']['count']} of "
        f"held-out photographs, {settings['seeds']} seeds of noise each, {settings['steps']} Euler "
        "steps. “copy” returns the source, “autoencoder” is the target encoded and decoded, “text "
        "only” the model without its reference. The rate leaves “keep” out, at which a copy always "
        "succeeds. Brackets are 95 % intervals (Wilson, an edit counts once however many seeds); "
        "after ± stands half of a 95 % interval of the mean.",
        edit_report.tables(content["report"]).strip(),
        "### Photographs",
        photographs.tables(content["photos"]).strip(),
        speed_table(content["report"]),
        "The first held-out edits, not chosen; source, result, target:",
        "![held-out edits of scenes](tiny_scenes.png)",
        "![edits of held-out photographs](tiny_photos.png)",
    ]
    if growth:
        parts += [
            f"How it grew ({settings['growth']} edits of each split, guided):",
            "![success over steps](tiny_growth.png)",
        ]
    return "\n\n".join(parts) + "\n"


def fill_page(page: Path, text: str, tool: str = "tiny_report.py") -> None:
    """Puts `text` after the mark of a tool in a page.

    Raises:
      ValueError: the page has no mark.
    """
    wanted = MARK.format(tool)
    before, mark, _ = page.read_text("utf-8").partition(wanted)
    if not mark:
        raise ValueError(f"{page} has no line {wanted}")
    write_text(page, f"{before}{wanted}\n\n{text}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), metavar="DIR")
    parser.add_argument("--weights", default="", metavar="RUN", help="default: DIR/final")
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR")
    parser.add_argument("--num", type=int, default=500, help="edits of scenes of each split")
    parser.add_argument("--photos", type=int, default=320, help="edits of photographs")
    parser.add_argument("--growth", type=int, default=200, help="edits at each kept checkpoint")
    parser.add_argument("--seeds", type=int, default=3, help="of noise")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--cfg", type=float, default=2.5)
    args = parser.parse_args(argv)
    weights, out = args.weights or str(args.runs / "final"), args.runs / "report"
    out.mkdir(parents=True, exist_ok=True)
    names = ("num", "photos", "growth", "seeds", "steps", "cfg")
    settings = {name: getattr(args, name) for name in names}
    programs.keep_compiled_programs(programs.default_cache_dir())

    content = measure_figures(weights, settings, out)
    growth = measure_growth(args.runs, settings, out)
    for name in ("scenes", "photos"):
        (args.docs / f"tiny_{name}.png").write_bytes((out / f"{name}.png").read_bytes())
    write_png(args.docs / "tiny_demo.png", demo_strip(weights), {})
    if growth:
        write_png(args.docs / "tiny_growth.png", growth_chart(growth), {})
    fill_page(args.docs / "tiny.md", results(content, growth))
    say(f"wrote {args.docs / 'tiny.md'}")


if __name__ == "__main__":
    main()
