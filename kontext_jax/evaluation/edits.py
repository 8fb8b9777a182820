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
Copies of the source succeed at "keep", so the rate over all kinds leaves that kind out.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kontext_jax.data.scenes import (
    CAPTION,
    WORLDS,
    Scene,
    SceneExample,
    SceneSource,
    World,
    render,
)
from kontext_jax.evaluation.scene_parser import parse

CHANGED_DELTA_E, EDITED_DELTA_E, PRESERVED_DELTA_E = 5, 10, 5
MAX_PSNR = 60.0
BATCH = 50
SPLITS = ("seen", "held_out")


@dataclasses.dataclass(frozen=True)
class Grade:
    """What became of one edit; None where nothing can be said.

    Attributes:
      copied: the result reads as the source, which is not the target.
    """

    success: bool
    copied: bool
    iou: float
    edited: float | None
    preserved: float | None
    psnr: float | None


def lab(pixels: np.ndarray) -> np.ndarray:
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


def delta_e(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CIE76 difference of two pictures, pixel by pixel."""
    return np.linalg.norm(lab(a) - lab(b), axis=-1)


def grade(source: Scene, target: Scene, result: np.ndarray, world: World) -> Grade:
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
        mse = max(np.square(error).mean(), 1e-12)
        psnr = float(min(MAX_PSNR, 10 * np.log10(255**2 / mse)))
    return Grade(
        success=found == target,
        copied=found == source and source != target,
        iou=float(right.sum() / union) if union else 1.0,
        edited=edited,
        preserved=preserved,
        psnr=psnr,
    )


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a rate (Wilson's score interval)."""
    if not count:
        raise ValueError("no trials, so there is no rate")
    z = 1.959964
    rate = successes / count
    centre = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def rate(flags: Sequence[bool]) -> dict[str, float]:
    """Rate, interval and count, as percentages."""
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


# Where pictures come from


class Model:
    """Edits whole lists of scenes by the stages of a model.

    Args:
      stages: `kontext_jax.stages.Stages`.
      num_steps: Euler steps.
      seed: of the noise; picture i of a list gets seed + i.
    """

    def __init__(self, stages, num_steps: int, seed: int = 0):
        self.stages, self.num_steps, self.seed = stages, num_steps, seed
        self._texts: dict[str, tuple] = {}

    def _text(self, prompts: Sequence[str]) -> tuple:
        """txt, vec of some prompts, each encoded once."""
        for prompt in prompts:
            if prompt not in self._texts:
                self._texts[prompt] = self.stages.encode_text(prompt)
        txt, vec = zip(*(self._texts[prompt] for prompt in prompts), strict=True)
        return np.concatenate(txt), np.concatenate(vec)

    def _latents(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([self.stages.encode_picture(picture) for picture in pictures])

    def _pixels(self, latents: np.ndarray) -> list[np.ndarray]:
        from kontext_jax.latents import model_to_pixels

        return [model_to_pixels(picture, "round") for picture in self.stages.decode(latents)]

    def reconstruct(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures through the autoencoder and back."""
        return _in_batches(lambda part: self._pixels(self._latents(part)), pictures)

    def make(
        self, prompts: Sequence[str], sources: Sequence[np.ndarray] | None, size_px: int, cfg: float
    ) -> list[np.ndarray]:
        """Pictures from prompts and, unless None, one reference each.

        Args:
          cfg: scale of guidance away from the empty prompt, with the reference; 1: none.
        """
        from kontext_jax.sampler import initial_noise

        preset = self.stages.preset
        side = size_px // preset.vae.downsampling

        def run(indices: Sequence[int]) -> list[np.ndarray]:
            count = len(indices)
            txt, vec = self._text([prompts[i] for i in indices])
            negative = scale = None
            if cfg != 1:
                negative = self._text([""] * count)
                scale = np.full(count, cfg, np.float32)
            noise = initial_noise(
                [self.seed + i for i in indices], side, side, preset.vae.z_channels
            )
            references = []
            if sources is not None:
                references = [self._latents([sources[i] for i in indices])]
            takes_guidance = preset.mmdit.guidance_embed
            return self._pixels(
                self.stages.denoise(
                    noise,
                    txt,
                    vec,
                    num_steps=self.num_steps,
                    guidance=np.ones(count, np.float32) if takes_guidance else None,
                    references=references,
                    negative=negative,
                    true_cfg_scale=scale,
                )
            )

        return _in_batches(run, range(len(prompts)))


def _in_batches(run: Callable, items: Sequence) -> list[np.ndarray]:
    """Runs batches of one size, the last filled up with its first item: nothing recompiles."""
    results = []
    for start in range(0, len(items), BATCH):
        part = list(items[start : start + BATCH])
        results += run(part + part[:1] * (BATCH - len(part)))[: len(part)]
    return results


def evaluate(
    model: Model, world: World, count: int, cfg: float, seed: int, tell=lambda line: None
) -> tuple[dict, dict]:
    """The report, and what was made: split → (examples, name of the row → pictures).

    Args:
      count: edits of each split; half as many captions.
      seed: of the examples.
    """
    report, made = {}, {}
    for split in SPLITS:
        source = SceneSource(world, split, seed=seed, count=count)
        examples = [source[i] for i in range(count)]
        prompts = [e.text for e in examples]
        before = [render(e.source, world.size_px) for e in examples]
        after = [render(e.target, world.size_px) for e in examples]
        rows = {
            "copy": lambda before=before: before,
            "autoencoder": lambda after=after: model.reconstruct(after),
            "text only": lambda prompts=prompts: model.make(prompts, None, world.size_px, 1),
            "model": lambda p=prompts, b=before: model.make(p, b, world.size_px, 1),
        }
        if cfg != 1:
            rows[f"model, CFG {cfg:g}"] = lambda p=prompts, b=before: model.make(
                p, b, world.size_px, cfg
            )
        report[split], pictures = {}, {}
        for name, run in rows.items():
            pictures[name] = run()
            grades = [
                grade(e.source, e.target, picture, world)
                for e, picture in zip(examples, pictures[name], strict=True)
            ]
            report[split][name] = summarise(examples, grades)
            tell(f"{split:8} {name:16} {_rate_text(report[split][name]['success'])}")
        made[split] = examples, pictures

        captions = dataclasses.replace(world, kinds=(CAPTION,))
        source = SceneSource(captions, split, seed=seed, count=max(1, count // 2))
        wanted = [source[i] for i in range(len(source))]
        drawn = model.make([e.text for e in wanted], None, world.size_px, cfg)
        exact = [parse(p, world) == e.target for e, p in zip(wanted, drawn, strict=True)]
        report[split]["text to image"] = rate(exact)
        tell(f"{split:8} text to image    {_rate_text(report[split]['text to image'])}")
    return report, made


# The report


def _rate_text(figure: dict[str, float]) -> str:
    return f"{figure['percent']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


def _mean_text(figure: dict[str, float] | None, factor: float = 1) -> str:
    if figure is None:
        return "–"
    return f"{factor * figure['mean']:.1f} ± {factor * figure['half_width']:.1f}"


def tables(report: dict) -> str:
    """The report in Markdown; success in % with 95 % intervals, other measures ± the same."""
    titles = {"seen": "Seen combinations", "held_out": "Held-out combinations"}
    parts = []
    for split, rows in report.items():
        edits = {name: row for name, row in rows.items() if name != "text to image"}
        count = next(iter(edits.values()))["success"]["count"]
        parts += [
            f"### {titles[split]} ({count} edits)",
            "",
            "| | success % | IoU@ΔE10 % | edited % | preserved % | PSNR outside, dB |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in edits.items():
            measures = [_mean_text(row[f], 100) for f in ("iou", "edited", "preserved")]
            cells = [_rate_text(row["success"]), *measures, _mean_text(row["psnr"])]
            parts.append(f"| {name} | {' | '.join(cells)} |")
        kinds = list(next(iter(edits.values()))["by_kind"])
        parts += [
            "",
            f"| success % by kind | {' | '.join(kinds)} |",
            "|---" * (len(kinds) + 1) + "|",
        ]
        for name, row in edits.items():
            cells = [_rate_text(row["by_kind"][kind]) for kind in kinds]
            parts.append(f"| {name} | {' | '.join(cells)} |")
        parts += ["", f"Text to image, whole scene: {_rate_text(rows['text to image'])} %.", ""]
    return "\n".join(parts)


def contact_sheet(
    examples: Sequence[SceneExample],
    pictures: Sequence[np.ndarray],
    world: World,
    columns: int = 4,
    zoom: int = 2,
) -> np.ndarray:
    """Source, result and target of each edit side by side under its instruction: uint8 RGB.

    A green bar marks a success, a red one a failure.
    """
    from PIL import Image, ImageDraw

    side, margin, caption_px = zoom * world.size_px, 6, 16
    width, height = 3 * side + 2 * margin + 12, side + caption_px + margin
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (example, picture) in enumerate(zip(examples, pictures, strict=True)):
        x, y = i % columns * width, i // columns * height
        before, after = (render(s, world.size_px) for s in (example.source, example.target))
        success = parse(picture, world) == example.target
        draw.text((x + 2, y + 2), example.text, fill="black")
        for j, pixels in enumerate((before, picture, after)):
            shown = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(shown, (x + j * (side + 3), y + caption_px))
        left = x + side + 3
        bar = [left, y + caption_px + side, left + side - 1, y + caption_px + side + 2]
        draw.rectangle(bar, fill=(0, 160, 0) if success else (210, 0, 0))
    return np.asarray(sheet)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kontext_jax.evaluation.edits",
        description="Edits procedural scenes and grades the results.",
    )
    parser.add_argument("--weights", required=True, help="a run's folder or a weight directory")
    parser.add_argument("--world", default="easy", choices=("easy", "full"))
    parser.add_argument("--num", type=int, default=500, help="edits of each split")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--cfg", type=float, default=2.5, help="scale of the guided row; 1: none")
    parser.add_argument("--seed", type=int, default=0, help="of examples and noise")
    parser.add_argument("--out", default="", help="folder for edits.json, edits.md and edits.png")
    parser.add_argument("--sheet", type=int, default=24, help="edits on the contact sheet")
    args = parser.parse_args(argv)
    if args.num < 20:
        parser.error(f"--num is {args.num}; rates of fewer than 20 edits say nothing")

    from convert_weights.runs import open_weights
    from kontext_jax import compiling
    from kontext_jax.images import write_png
    from kontext_jax.stages import Stages

    compiling.keep_compiled_programs(compiling.default_cache_dir())
    bundle = open_weights(args.weights)
    print(bundle.source, file=sys.stderr)
    world = WORLDS[args.world]
    model = Model(Stages(bundle), args.steps, args.seed)
    report, made = evaluate(
        model, world, args.num, args.cfg, args.seed, tell=lambda line: print(line, file=sys.stderr)
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
        sheet = contact_sheet(examples[: args.sheet], best[: args.sheet], world)
        write_png(out / "edits.png", sheet, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
