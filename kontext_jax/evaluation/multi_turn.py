"""What six edits in a row leave of a picture: `python -m kontext_jax.evaluation.multi_turn`.

    python -m kontext_jax.evaluation.multi_turn --row "CFG=runs/joint,cfg=2.5" --row fast=runs/fast

A chain of edits is drawn about all but one object of a scene, which has to stay as it is, so that
what becomes of it is known at every turn. With A_k the scene that k edits should have made, and
out_k what a model made of out_{k-1}:

    identity     how many objects of A_0 that no edit so far was about are read back from out_k
                 exactly: same place, shape, colour, size
    psnr         of out_k against A_0 where no edit so far changes anything, in dB, at most 60
    success      whether all of out_k reads as A_k

Each row goes on from pixels, as people use it, and from latents, which saves the two passes
through the autoencoder between turns ("… in latents", as `sample.py --then` does). With --keep it
is also told to "keep the picture" instead of the edits. Two rows need no transformer: "autoencoder"
is A_0 encoded and decoded again and again, "another scene" what chance leaves of identity.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from kontext_jax.data.worlds.scenes import OBJECT_EDITS, WORLDS, Scene, SceneSource, World, render
from kontext_jax.evaluation import edits
from kontext_jax.evaluation.edit_model import Model
from kontext_jax.evaluation.edit_report import markdown
from kontext_jax.evaluation.line_chart import Point, line_chart
from kontext_jax.evaluation.rows import OpenRow, open_rows, parse_row
from kontext_jax.evaluation.scene_parser import parse

KEEP = "keep the picture"
TOLD_TO_KEEP = ", told to keep"  # in names of rows
PSNR_RANGE = 10.0, 40.0  # of the chart, in dB


@dataclasses.dataclass(frozen=True)
class Chain:
    """Edits of one scene in a row.

    Attributes:
      scenes: A_0, A_1, …, A_K.
      texts: instructions, one for each turn.
    """

    scenes: tuple[Scene, ...]
    texts: tuple[str, ...]

    def kept(self, turn: int) -> set:
        """Objects of A_0 that no edit up to this turn was about."""
        return set.intersection(*(set(scene.things) for scene in self.scenes[: turn + 1]))

    def changed(self, turn: int, size_px: int) -> Bool[np.ndarray, "size_px size_px"]:
        """Where edits up to this turn change something: bool [size_px, size_px]."""
        pictures = [render(scene, size_px) for scene in self.scenes[: turn + 1]]
        changed = np.zeros((size_px, size_px), bool)
        for before, after in itertools.pairwise(pictures):
            changed |= edits.delta_e(before, after) > edits.CHANGED_DELTA_E
        return changed


def draw_chains(world: World, count: int, num_turns: int, seed: int = 0) -> list[Chain]:
    """Chains of edits of combinations that training shows.

    Raises:
      ValueError: nothing can be added beside an object in this world.
    """
    kinds = [kind for kind in world.kinds if kind in OBJECT_EDITS]
    if "add" not in kinds or world.max_things < 2:
        raise ValueError("chains of edits need a world of two or more objects that can be added")
    source = SceneSource(world, "seen", seed=seed)
    return [_draw_chain(source, kinds, num_turns, [seed, i]) for i in range(count)]


def _draw_chain(source: SceneSource, kinds: list[str], num_turns: int, entropy: list) -> Chain:
    rng = np.random.default_rng(entropy)
    while True:
        scene = source[int(rng.integers(len(source)))].source
        if scene is not None and scene.things and scene.style == "plain":
            break
    stays = scene.things[int(rng.integers(len(scene.things)))]
    scenes: list[Scene] = [scene]
    texts: list[str] = []
    while len(texts) < num_turns:
        kind = kinds[int(rng.integers(len(kinds)))] if len(scenes[-1].things) > 1 else "add"
        example = source.edit_object(rng, kind, scenes[-1], "")
        if example is None or stays.pair in example.pairs or source.is_held_out(example):
            continue
        scenes.append(example.target)
        texts.append(example.text)
    return Chain(tuple(scenes), tuple(texts))


def run_edits(
    row: OpenRow, chains: Sequence[Chain], world: World, seed: int, in_latents: bool, keep: bool
) -> list[list[UInt8[np.ndarray, "size_px size_px 3"]]]:
    """What a row makes of the chains, turn by turn: uint8 pictures [turns][chains].

    Args:
      in_latents: hand latents from turn to turn instead of pixels.
      keep: tell it to keep the picture in every turn.
    """
    model, size = row.model, (world.size_px, world.size_px)
    latents = model.encode([render(chain.scenes[0], world.size_px) for chain in chains])
    turns = []
    for turn in range(len(chains[0].texts)):
        texts = [KEEP if keep else chain.texts[turn] for chain in chains]
        # Each turn draws noise of its own, from the upper half of the seed, as the pipeline does.
        latents = model.draw(texts, latents, size, row.cfg, seed + (turn << 32))
        turns.append(model.decode(latents))
        if not in_latents:
            latents = model.encode(turns[-1])
    return turns


def run_autoencoder(
    model: Model, chains: Sequence[Chain], world: World
) -> list[list[UInt8[np.ndarray, "size_px size_px 3"]]]:
    """The first scenes encoded and decoded once a turn."""
    pictures, turns = [render(chain.scenes[0], world.size_px) for chain in chains], []
    for _ in chains[0].texts:
        pictures = model.reconstruct(pictures)
        turns.append(pictures)
    return turns


def other_scenes(
    chains: Sequence[Chain], world: World
) -> list[list[UInt8[np.ndarray, "size_px size_px 3"]]]:
    """What the next chain's pictures should be, in place of each chain's own."""
    others = [*chains[1:], chains[0]]
    return [
        [render(chain.scenes[turn + 1], world.size_px) for chain in others]
        for turn in range(len(chains[0].texts))
    ]


def grade_turns(
    chains: Sequence[Chain],
    turns: Sequence[Sequence[UInt8[np.ndarray, "size_px size_px 3"]]],
    world: World,
) -> list[dict]:
    """The figures of each turn."""
    figures = []
    for number, pictures in enumerate(turns, start=1):
        identity, psnrs, successes = [], [], []
        for chain, picture in zip(chains, pictures, strict=True):
            found, kept = parse(picture, world), chain.kept(number)
            identity.append(len(kept & set(found.things)) / len(kept))
            successes.append(float(found == chain.scenes[number]))
            same = ~chain.changed(number, world.size_px)
            error = picture[same].astype(np.float64) - render(chain.scenes[0], world.size_px)[same]
            psnrs.append(edits.psnr_of(np.square(error).mean()))
        figures.append(
            {
                "turn": number,
                "identity": edits.rate(identity),
                "success": edits.rate(successes),
                "psnr": edits.mean(psnrs),
            }
        )
    return figures


def evaluate(
    rows: Sequence[OpenRow],
    world: World,
    count: int,
    num_turns: int = 6,
    seed: int = 0,
    keep: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[
    dict[str, list[dict]],
    dict[str, list[list[UInt8[np.ndarray, "size_px size_px 3"]]]],
    list[Chain],
]:
    """The figures of every turn and the pictures, by row, and the chains.

    Args:
      count: chains, two or more.
      seed: seed of the chains and of the noise.
      keep: rows that are told to keep the picture, too.

    Raises:
      ValueError: see `draw_chains`, or there are fewer than two chains.
    """
    if count < 2:
        raise ValueError(f"{count} chains; one row compares them with each other, so give two")
    chains = draw_chains(world, count, num_turns, seed)
    made: dict[str, list[list[np.ndarray]]] = {}
    report: dict[str, list[dict]] = {}

    def grade(name: str, turns: list[list[np.ndarray]]) -> None:
        made[name], report[name] = turns, grade_turns(chains, turns, world)
        last = report[name][-1]["identity"]["percent"]
        tell(f"{name:32} {last:.1f} % of identity after {num_turns} turns")

    grade("another scene", other_scenes(chains, world))
    grade("autoencoder", run_autoencoder(rows[0].model, chains, world))
    for row in rows:
        for kept in (False, True) if keep else (False,):
            for in_latents in (False, True):
                name = row.name + TOLD_TO_KEEP * kept + ", in latents" * in_latents
                grade(name, run_edits(row, chains, world, seed, in_latents, kept))
    return report, made, chains


def half_life(turns: Sequence[Mapping]) -> int | None:
    """The first turn that keeps less than half of identity, if one does."""
    low = (turn["turn"] for turn in turns if turn["identity"]["percent"] < 50)
    return next(low, None)


def edited(report: Mapping[str, Sequence[Mapping]]) -> dict[str, Sequence[Mapping]]:
    """Without the rows that were told to keep the picture."""
    return {name: turns for name, turns in report.items() if TOLD_TO_KEEP not in name}


def table(report: Mapping[str, Sequence[Mapping]]) -> str:
    """Identity and PSNR over turns in Markdown, and how often the whole scene is right."""
    numbers = [str(turn["turn"]) for turn in next(iter(report.values()))]
    blocks = []
    for field, title in (("identity", "identity kept, %"), ("success", "whole scene, %")):
        body = []
        # Who is told to keep the picture does not do what the chain asks.
        for name, turns in (report if field == "identity" else edited(report)).items():
            cells = [f"{turn[field]['percent']:.1f}" for turn in turns]
            mean = np.mean([turn[field]["percent"] for turn in turns])
            extra = [str(half_life(turns) or "–")] if field == "identity" else []
            body.append([name, *cells, f"{mean:.1f}", *extra])
        head = [f"{title}, after turn", *numbers, "mean"]
        blocks.append(markdown([*head, *["below half from"] * (field == "identity")], body))
    body = [
        [name, *(f"{t['psnr']['mean']:.1f} ± {t['psnr']['half_width']:.1f}" for t in turns)]
        for name, turns in report.items()
    ]
    blocks.append(markdown(["PSNR outside all edits, dB, after turn", *numbers], body))
    return "\n\n".join(blocks) + "\n"


def chart(report: Mapping[str, Sequence[Mapping]]) -> UInt8[np.ndarray, "height width 3"]:
    """Identity and PSNR over turns, side by side, of those that edit: uint8 RGB."""

    def rates(turn: Mapping) -> Point:
        figure = turn["identity"]
        return Point(turn["turn"], figure["percent"], figure["low"], figure["high"])

    def decibels(turn: Mapping) -> Point:
        mean, half = turn["psnr"]["mean"], turn["psnr"]["half_width"]
        return Point(turn["turn"], mean, mean - half, mean + half)

    panels = []
    for title, unit, y_range, point in (
        ("objects that no edit was about, still as they were", "%", (0, 100), rates),
        ("PSNR outside of all edits", "dB", PSNR_RANGE, decibels),
    ):
        curves = {name: [point(turn) for turn in turns] for name, turns in edited(report).items()}
        panels.append(line_chart(curves, "turns", unit, y_range, title, size=(560, 360)))
    return np.concatenate(panels, axis=1)


def rows_of_csv(report: Mapping[str, Sequence[Mapping]]) -> list[list]:
    """One line for each row and turn, a head first."""
    lines = [["row", "turn", "identity_percent", "low", "high", "success_percent", "psnr_db"]]
    for name, turns in report.items():
        for turn in turns:
            identity = [turn["identity"][field] for field in ("percent", "low", "high")]
            rest = turn["success"]["percent"], turn["psnr"]["mean"]
            lines.append([name, turn["turn"], *identity, *rest])
    return lines


def write_report(
    out: Path, settings: Mapping, rows: Sequence[OpenRow], report: Mapping[str, Sequence[Mapping]]
) -> None:
    """Writes multi_turn.json, .csv, .md and .png."""
    from kontext_jax.pictures.files import write_png

    out.mkdir(parents=True, exist_ok=True)
    facts = {row.name: row.facts for row in rows}
    content = {"settings": dict(settings), "rows": facts, "report": report}
    (out / "multi_turn.json").write_text(json.dumps(content, indent=1) + "\n")
    with (out / "multi_turn.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows_of_csv(report))
    (out / "multi_turn.md").write_text(table(report))
    write_png(out / "multi_turn.png", chart(report), {})


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m kontext_jax.evaluation.multi_turn"
) -> int:
    """Runs the command line; the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Edits scenes several times in a row and measures what is left of them.",
    )
    parser.add_argument(
        "--row",
        action="append",
        metavar="NAME=WEIGHTS[,steps=N][,sampler=S][,guidance=G][,cfg=S]",
        help="a run's folder, a weight directory, tiny or tiny-fast; repeatable (default: tiny)",
    )
    parser.add_argument("--world", default="easy", choices=("easy", "full"))
    parser.add_argument("--num", type=int, default=200, help="chains of edits")
    parser.add_argument("--turns", type=int, default=6, help="edits in a row")
    parser.add_argument("--seed", type=int, default=0, help="of the chains and of the noise")
    parser.add_argument("--keep", action="store_true", help="also told to keep the picture")
    parser.add_argument("--out", default="", help="folder for multi_turn.json, .csv, .md and .png")
    args = parser.parse_args(argv)
    for flag in ("num", "turns"):
        if getattr(args, flag) < 2:
            parser.error(f"--{flag} is {getattr(args, flag)}; expected 2 or more")

    from convert_weights.open import open_weights
    from kontext_jax.runtime import programs

    try:
        rows = [parse_row(text) for text in args.row or ["tiny=tiny"]]
        programs.keep_compiled_programs(programs.default_cache_dir())
        opened = open_rows(rows, open_weights)
        report, _, _ = evaluate(
            opened,
            *(WORLDS[args.world], args.num, args.turns, args.seed, args.keep),
            tell=lambda line: print(line, file=sys.stderr),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        write_report(Path(args.out), settings, opened, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
