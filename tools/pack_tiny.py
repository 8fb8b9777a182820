"""Puts a trained small model into the package, with a model card made from its own figures.

    python tools/pack_tiny.py --weights RUN --figures FILE.json --out kontext_jax/assets/models/tiny
    python tools/pack_tiny.py --weights RUN --figures DISTILLED.json \\
        --out kontext_jax/assets/models/tiny-fast

RUN is a run's folder or a weight directory; FILE.json is what `kontext_jax.evaluation.edits` or
`experiments/tiny_report.py` wrote about the same weights, DISTILLED.json what
`kontext_jax.evaluation.distilled` or `experiments/fast_report.py` did: the model then keeps the
sampler, steps and guidance that it was distilled for. Transformer and text encoders are stored in
bfloat16, the autoencoder, which always computes in float32, as it is.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from convert_weights.open import open_weights
from convert_weights.to_jax import copy_tokenizer
from kontext_jax.data.worlds import photo_edits, photos
from kontext_jax.data.worlds.scenes import WORLDS
from kontext_jax.evaluation import distilled
from kontext_jax.runtime.atomic import write_folder
from kontext_jax.weights.bundle import (
    KINDS,
    ModelBundle,
    open_params,
    save_component,
    write_manifest,
)
from kontext_jax.weights.card import CHECKS
from kontext_jax.weights.run import is_run, open_run

LARGEST_MIB = {"whole": 32, "distilled": 16}
DTYPES = {"mmdit": jnp.bfloat16, "t5": jnp.bfloat16, "clip": jnp.bfloat16, "vae": jnp.float32}
SPLITS = {"seen": "combinations seen in training", "held_out": "held-out combinations"}


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters of each network in a weight directory."""
    counts = {}
    for kind in KINDS:
        with open_params(folder, kind) as file:
            counts[kind] = sum(math.prod(info.shape) for info in file.tensors.values())
    return counts


def figures_table(report: Mapping) -> list[str]:
    """Success and preservation on scenes, in Markdown."""
    lines = ["| | success % | PSNR outside the edit, dB | text to image, whole scene % |"]
    lines.append("|---|---|---|---|")
    for split, rows in report.items():
        exact = rows["text to image"]
        for name, row in rows.items():
            if name == "text to image":
                continue
            success, psnr = row["success"], row["psnr"]
            cells = [
                f"{SPLITS[split]}: {name}",
                f"{success['percent']:.1f} [{success['low']:.1f}, {success['high']:.1f}]",
                f"{psnr['mean']:.1f} ± {psnr['half_width']:.1f}",
                f"{exact['percent']:.1f} [{exact['low']:.1f}, {exact['high']:.1f}]"
                if name.startswith("model")
                else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def scene_phrases() -> list[str]:
    world = WORLDS["easy"]
    return [
        f"objects: {', '.join(world.shapes)} in {', '.join(world.colours)}, big or small; "
        f"backgrounds: {', '.join(world.backgrounds)}; places: top left, top, top right, left, "
        "center, …",
        "`make the red circle yellow`, `remove the red circle`, `turn the red circle into a "
        "cross`, `move the red circle to the bottom left`, `add a big red circle at the top left`, "
        "`make the background pink`, `keep the picture`",
        "text to image: `big red circle top left, small blue square center, pink background`",
    ]


def photo_phrases() -> list[str]:
    whole = [f"`{text}`" for edits in photo_edits.PICTURE_EDITS.values() for text in edits]
    return [f"of photographs: {', '.join(whole)}, and the edits of objects above, drawn onto them"]


def recipe_page(content: Mapping) -> str:
    return "docs/tiny.md" if content.get("photos") is not None else "docs/learning.md"


def photo_credits() -> list[str]:
    return [
        f"| {p.name} | `{p.package}` | {p.author} | {p.licence} | {p.split.replace('_', ' ')} |"
        for p in photos.PHOTOS
    ]


def card(
    bundle: ModelBundle,
    source: str,
    counts: Mapping[str, int],
    content: Mapping,
    steps: int,
    cfg: float,
) -> str:
    """The model card."""
    with_photos = content.get("photos") is not None
    names = {"mmdit": "transformer", "vae": "autoencoder", "t5": "T5", "clip": "CLIP"}
    sizes = ", ".join(f"{names[kind]} {count / 1e6:.2f} million" for kind, count in counts.items())
    side = round((bundle.preset.megapixels * 1e6) ** 0.5)
    settings = content["settings"]
    world = "drawn scenes and photographs" if with_photos else "drawn scenes"
    lines = [
        "# The tiny Kontext",
        "",
        "A FLUX.1 Kontext in small, trained from nothing by this project on CPU cores: the same",
        "classes and the same code as the model of 12 billion parameters. `python sample.py` uses",
        "it.",
        "",
        f"- **What it is.** {source[0].upper()}{source[1:]}. Parameters: {sizes}.",
        "  Text encoders are drawn at random and not trained.",
        f"- **What it takes.** Pictures of about {side}×{side} pixels (others are resized), "
        f"{steps} steps, classifier-free",
        f"  guidance of {cfg:g} away from the empty prompt; these are the defaults.",
        "- **What it was trained on.** Scenes drawn by `kontext_jax/data/worlds/scenes.py`"
        + (
            ", and crops of the photographs below that are\n  marked train."
            if with_photos
            else "; it has never seen a photograph."
        ),
        "- **What it understands.** A few dozen words:",
        *[f"  - {line}" for line in scene_phrases() + (photo_phrases() if with_photos else [])],
        "- **Licence.** Apache-2.0, as the code.",
        f"- **Recipe.** {recipe_page(content)}, with the commands that make it again.",
        "",
        "## Figures",
        "",
        f"{settings['num']} edits of each split, {settings['steps']} Euler steps; an edit succeeds",
        "if the whole scene, read back from the pixels, is the target. “copy” returns the source,",
        "“autoencoder” is the target encoded and decoded, “text only” the model without its",
        "reference. 95 % intervals in brackets and after ±.",
        "",
        *figures_table(content["report"]),
        "",
    ]
    if with_photos:
        row = content["photos"]["rows"]
        lines += [
            f"Edits of photographs that it never saw ({content['photos']['count']}): the result is "
            "nearer to what was",
            "asked for than to anything that another instruction asks for in "
            + ", ".join(f"{r['success']['percent']:.1f} % ({name})" for name, r in row.items())
            + ".",
            "",
        ]
    lines += [
        "## Limits",
        "",
        f"It edits {world} in the words above and nothing else: other words do something, but not",
        f"what they say. Pictures are {side} pixels a side, and softer than what went in. It makes",
        "mistakes as often as the table says, most with several objects.",
        "",
    ]
    if with_photos:
        lines += [
            "## Photographs",
            "",
            "| name | package | author | licence | used to |",
            "|---|---|---|---|---|",
            *photo_credits(),
            "",
        ]
    return "\n".join(lines)


def own_report(report: Mapping, identity: str) -> Mapping:
    """What a comparison found of its teacher, of what needs no model, and of this one."""

    def belongs(name: str) -> bool:
        row = report["rows"].get(name)
        return row is None or name == report["teacher"] or row["weights"] == identity

    splits = {
        split: {name: found for name, found in rows.items() if belongs(name)}
        for split, rows in report["splits"].items()
    }
    return {**report, "splits": splits}


def fast_card(bundle: ModelBundle, source: str, counts: Mapping[str, int], content: Mapping) -> str:
    """The model card of a distilled model."""
    preset, report = bundle.preset, own_report(content["report"], bundle.identity)
    side = round((preset.megapixels * 1e6) ** 0.5)
    times = ", ".join(f"{t:g}" for t in preset.default_timesteps or ()) or "an even grid"
    steps = f"{preset.default_num_steps} steps of the sampler “{preset.default_sampler}” at {times}"
    guidance = "guidance being what it learnt"
    if preset.mmdit.guidance_embed:
        guidance = f"guidance {preset.default_guidance:g} as an input"
    return "\n".join(
        [
            "# The tiny Kontext in a few steps",
            "",
            "The tiny Kontext (../tiny/README.md) distilled: what took it dozens of passes of the",
            "network takes this one as many as it has steps. `python sample.py --model tiny-fast`",
            "uses it.",
            "",
            f"- **What it is.** {source[0].upper()}{source[1:]}.",
            f"  The transformer has {counts['mmdit'] / 1e6:.2f} million parameters; autoencoder",
            "  and text encoders are those of its teacher.",
            f"- **What it takes.** Pictures of about {side}×{side} pixels (others are resized),",
            f"  {steps}, {guidance}; these are the defaults.",
            *["  1, 2 and 4 steps work (`--steps`)."] * (preset.default_sampler == "renoise"),
            "- **What it was trained on, what it understands, whose photographs.** As its teacher.",
            "- **Licence.** Apache-2.0, as the code.",
            "- **Recipe.** docs/distillation.md, with the commands that make it again.",
            "",
            "## Figures",
            "",
            "The row in bold is the teacher, the last ones are this model;"
            f" {report['seeds']} seeds of noise",
            "each; docs/distillation.md says what the columns are.",
            "",
            distilled.tables(report).strip(),
            "",
            "## Limits",
            "",
            "Those of its teacher, whose mistakes it has learnt as well.",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, metavar="RUN")
    parser.add_argument("--figures", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    args = parser.parse_args(argv)

    content = json.loads(args.figures.read_text("utf-8"))
    bundle = open_weights(args.weights)
    is_distilled = "rows" in content["report"]
    measured = {content.get("weights")}
    if is_distilled:
        measured = {row["weights"] for row in content["report"]["rows"].values()}
    if bundle.identity not in measured:
        raise SystemExit(f"{args.figures} is about other weights than {args.weights}; measure them")
    source = f"trained from nothing by kontext_jax ({recipe_page(content)})"
    what = "its last run"
    if is_distilled:
        source = "distilled from the tiny Kontext by kontext_jax (docs/distillation.md)"
        what = "distillation"
    if is_run(args.weights):
        source += f", {open_run(args.weights).step} steps of {what}"
    if is_distilled:
        if bundle.preset.default_num_steps is None:
            raise SystemExit(f"{args.weights} does not say how it is sampled; pack a distilled run")
        defaults = {
            name: value for name in CHECKS if (value := getattr(bundle.preset, name)) is not None
        }
        if not bundle.preset.mmdit.guidance_embed:
            defaults.pop("default_guidance", None)
    else:
        defaults = {
            "default_num_steps": content["settings"]["steps"],
            "default_true_cfg_scale": content["settings"]["cfg"],
            "megapixels": bundle.preset.megapixels,
        }
    shift = bundle.preset.shift_timesteps if is_distilled else None
    largest = LARGEST_MIB["distilled" if is_distilled else "whole"]

    def fill(folder: Path) -> None:
        for kind in KINDS:
            component = bundle.components[kind]
            save_component(folder, kind, component.config, component.load(dtype=DTYPES[kind]))
        for name, files in bundle.tokenizer_dirs.items():
            copy_tokenizer(files, folder / "tokenizers" / name)
        write_manifest(folder, bundle.preset.name, KINDS, source, "Apache-2.0", shift, defaults)
        counts = count_parameters(folder)
        if is_distilled:
            text = fast_card(bundle, source, counts, content)
        else:
            steps, cfg = defaults["default_num_steps"], defaults["default_true_cfg_scale"]
            text = card(bundle, source, counts, content, steps, cfg)
        (folder / "README.md").write_text(text, "utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
        if size > largest:
            raise SystemExit(f"{size:.1f} MiB; such a model in the package may have {largest} MiB")
        print(f"{args.out}: {size:.1f} MiB")

    write_folder(args.out, fill)


if __name__ == "__main__":
    main()
