"""What the discriminator and the number of latent channels do (`experiments/vae_ablations.py`).

    python -m kontext_jax.evaluation.fetch_perceptual        once
    python experiments/vae_ablations.py --list                     the commands
    python experiments/vae_ablations.py                            runs what is not done yet
    python experiments/vae_ablations.py --into docs/autoencoder.md writes the tables there

Three comparisons, each at equal steps and data, on the small autoencoder of configs/scenes_vae.py
(64-pixel scenes and crops of photographs):

    rate            z = 4, 8 and 16 channels from nothing, by pixels alone
    discriminator   from the run with z = 16: more steps by pixels alone, with LPIPS, and with LPIPS
                    and a PatchGAN, some seeds each (order of data, noise, discriminator)
    judge           the same for fewer steps with LPIPS by VGG16, which costs twenty times what
                    AlexNet does, or with none, each with a PatchGAN and without

Every run is measured on held-out scenes and held-out photographs by evaluation.reconstruction. Runs
go on where they were interrupted; a measurement is made again when its command has changed. The
tables are made of the saved figures alone; `--tables` chooses among them.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kontext_jax.evaluation.reconstruction import bootstrap
from kontext_jax.evaluation.reconstruction_metrics import METRICS
from kontext_jax.training import metrics

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from pages import insert

ROOT = Path(__file__).parents[1]
RATES = (4, 8, 16)
BASE = "z16"
SIDE, CELL = 64, 8
WORLDS = {
    "scenes": "scenes:easy-crowded:held_out:{}",
    "photographs": "photos:squares-64:held_out:{}",
}
TITLES = {"pdist_a": "PDist-A", "pdist_b": "LPIPS-VGG", "ssim": "SSIM", "psnr": "PSNR, dB"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long everything is.

    Attributes:
      steps: steps of the runs from nothing.
      more_steps: steps of the runs that go on from one.
      seeds: number of seeds of each of these.
      judge_steps: steps of the runs that compare judges in training.
      judge_seeds: number of seeds of each of these.
      examples: number of training examples of either kind.
      pictures: number of measured pictures of either kind.
    """

    steps: int = 3000
    more_steps: int = 1500
    seeds: int = 3
    judge_steps: int = 400
    judge_seeds: int = 1
    examples: int = 12_000
    pictures: int = 256


FULL = Plan()
SMOKE = Plan(steps=6, more_steps=6, seeds=1, judge_steps=6, examples=32, pictures=4)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What the autoencoder goes on learning by, beside pixels and the KL term.

    Attributes:
      label: in the table.
      perceptual_net: network of LPIPS; None: without.
      discriminator: whether there is a PatchGAN.
    """

    label: str
    perceptual_net: str | None = None
    discriminator: bool = False


# Name of the table → arms by the names of their runs; the arm with a discriminator stands after
# the same without.
COMPARISONS = {
    "discriminator": {
        "pixels": Arm("pixels alone"),
        "lpips": Arm("+ LPIPS", "alexnet"),
        "gan": Arm("+ LPIPS + PatchGAN", "alexnet", True),
    },
    "judge": {
        "judge_pixels": Arm("pixels alone"),
        "judge_pixels_gan": Arm("+ PatchGAN", None, True),
        "judge_vgg16": Arm("+ LPIPS by VGG16", "vgg16"),
        "judge_vgg16_gan": Arm("+ LPIPS by VGG16 + PatchGAN", "vgg16", True),
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, under the folder of all."""

    name: str
    config: str
    settings: dict[str, str]

    def command(self, runs: Path) -> list[str]:
        words = ["train.py", "--config", f"configs/{self.config}.py", "--workdir"]
        return [
            *words,
            str(runs / self.name),
            *(f"--config.{key}={value}" for key, value in self.settings.items()),
        ]


def list_runs(runs: Path, plan: Plan) -> list[Run]:
    """All runs, in an order in which each finds what it begins from."""
    common = {
        "data.sources": f"scenes:easy-crowded:train:{plan.examples},"
        f"photos:squares-64:train:{plan.examples}",
        "eval.sources": f"photos:squares-64:held_out:{max(16, plan.pictures)}",
        "eval.num_batches": str(max(1, plan.pictures // 16)),
        "checkpoint.keep_last": "1",
    }

    def lengths(steps: int) -> dict[str, str]:
        return {
            "num_steps": str(steps),
            "eval.every_steps": str(steps),
            "eval.sample_every_steps": str(steps),
            "checkpoint.every_steps": str(min(steps, 250)),
            "optimizer.warmup_steps": str(min(50, steps // 4)),
        }

    found = [
        Run(
            f"z{z}", "scenes_vae", common | lengths(plan.steps) | {"autoencoder.z_channels": str(z)}
        )
        for z in RATES
    ]
    # The same optimizer for all that go on; what has no discriminator takes its settings back.
    start = {"weights": str(runs / BASE)}
    without = {
        "autoencoder.adversarial_weight": "0",
        "autoencoder.adversarial_start_step": "50000",
        "discriminator.width": "64",
        "discriminator.num_layers": "3",
    }
    lengths_of = {
        "discriminator": (plan.more_steps, plan.seeds),
        "judge": (plan.judge_steps, plan.judge_seeds),
    }
    for comparison, arms in COMPARISONS.items():
        steps, seeds = lengths_of[comparison]
        for seed, (name, arm) in itertools.product(range(seeds), arms.items()):
            own = {"seed": str(seed)}
            if arm.perceptual_net is None:
                own["autoencoder.perceptual_weight"] = "0"
            else:
                own["autoencoder.perceptual_net"] = arm.perceptual_net
            own |= (
                {"autoencoder.adversarial_start_step": str(steps // 10)}
                if arm.discriminator
                else without
            )
            found.append(Run(f"{name}-{seed}", "vae_tiny", common | lengths(steps) | start | own))
    return found


def measurement(run: Run, runs: Path, world: str, plan: Plan) -> tuple[list[str], Path]:
    """The command that measures a run on held-out pictures, and the file it writes."""
    out = runs / "figures" / f"{run.name}-{world}.json"
    words = ["-m", "kontext_jax.evaluation.reconstruction", "--weights", str(runs / run.name)]
    words += ["--images", WORLDS[world].format(plan.pictures), "--size", str(SIDE)]
    return [*words, "--batch_size", str(min(16, plan.pictures)), "--out", str(out)], out


def execute(words: Sequence[str]) -> None:
    print("$ python", shlex.join(words), flush=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(f"error: ended with {done.returncode}; the same command goes on from here")


def is_finished(run: Run, runs: Path) -> bool:
    """Whether the run's last checkpoint is there, by its own manifest."""
    last = runs / run.name / "checkpoints" / run.settings["num_steps"] / "manifest.json"
    return last.exists()


def is_measured(words: Sequence[str], out: Path) -> bool:
    """Whether the file holds the figures of just this command."""
    note = out.with_suffix(".command")
    return out.exists() and note.exists() and note.read_text() == shlex.join(words)


def run_all(runs: Path, plan: Plan, only: Sequence[str]) -> None:
    for run in list_runs(runs, plan):
        if only and not any(run.name.startswith(name) for name in only):
            continue
        if not is_finished(run, runs):
            execute(run.command(runs))
        for world in WORLDS:
            words, out = measurement(run, runs, world, plan)
            if not is_measured(words, out):
                execute(words)
                out.with_suffix(".command").write_text(shlex.join(words))


# Tables


def figures(runs: Path, name: str, world: str) -> dict[str, np.ndarray]:
    """Metric → a value a picture, of a run's rounded reconstructions."""
    content = json.loads((runs / "figures" / f"{name}-{world}.json").read_text())
    values = content["by_picture"]["rounded"]
    return {metric: np.array(values[metric], np.float64) for metric in METRICS}


def number(metric: str, value: float, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.{2 if metric == 'psnr' else 3}f}"


def bits_per_pixel(runs: Path, name: str) -> float:
    """The KL divergence of a run's held-out pictures at the end, as a rate."""
    rows = metrics.read(runs / name / "metrics.jsonl", "eval_ema")
    nats_per_latent = rows[-1]["kl"]
    channels = int(name.removeprefix("z"))
    return nats_per_latent * channels / CELL**2 / np.log(2)


def rate_table(runs: Path) -> list[str]:
    lines = []
    for world in WORLDS:
        names = [f"z{z}" for z in RATES]
        count = len(figures(runs, names[0], world)["psnr"])
        lines += [
            f"Held-out {world}, {count} of {SIDE}², mean [95 % interval]:",
            "",
            f"| channels | KL, bits a pixel | {' | '.join(TITLES[m] for m in METRICS)} |",
            "|---" * (2 + len(METRICS)) + "|",
        ]
        for name in names:
            values = figures(runs, name, world)
            cells = []
            for metric in METRICS:
                ends = ", ".join(number(metric, end) for end in bootstrap(values[metric]))
                cells.append(f"{number(metric, values[metric].mean())} [{ends}]")
            rate = f"{bits_per_pixel(runs, name):.2f}"
            lines.append(f"| {name[1:]} | {rate} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def seeds_of(runs: Path, loss: str) -> list[str]:
    paths = (runs / "figures").glob(f"{loss}-[0-9]*-scenes.json")
    return sorted(path.name.removesuffix("-scenes.json") for path in paths)


def arms_table(runs: Path, comparison: str) -> list[str]:
    """Arms of a comparison, and what the discriminator changes in each pair of them."""
    lines = []
    arms = COMPARISONS[comparison]
    for world in WORLDS:
        base = figures(runs, BASE, world)
        lines += [
            f"Held-out {world}, {len(base['psnr'])} of {SIDE}²:",
            "",
            f"| trained on | seeds | {' | '.join(TITLES[m] for m in METRICS)} |",
            "|---" * (2 + len(METRICS)) + "|",
            f"| (the run they begin from) | 1 | "
            f"{' | '.join(number(m, base[m].mean()) for m in METRICS)} |",
        ]
        off: dict[str, np.ndarray] = {}  # of the arm before
        for name, arm in arms.items():
            by_seed = [figures(runs, run, world) for run in seeds_of(runs, name)]
            own = {m: np.array([f[m] for f in by_seed]) for m in METRICS}
            cells = []
            for metric in METRICS:
                means = own[metric].mean(axis=1)
                ends = f" ({number(metric, means.min())} to {number(metric, means.max())})"
                cells.append(number(metric, means.mean()) + (ends if len(means) > 1 else ""))
            lines.append(f"| {arm.label} | {len(by_seed)} | {' | '.join(cells)} |")
            if arm.discriminator:
                cells = []
                for metric in METRICS:
                    # Pairs of the same picture; the seeds of an arm are averaged first.
                    change = own[metric].mean(axis=0) - off[metric].mean(axis=0)
                    ends = ", ".join(number(metric, end, sign=True) for end in bootstrap(change))
                    cells.append(f"{number(metric, change.mean(), sign=True)} [{ends}]")
                lines.append(f"| PatchGAN on − off [95 %] | | {' | '.join(cells)} |")
            off = own
        lines.append("")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/vae_ablations"))
    parser.add_argument("--only", nargs="+", default=(), help="runs whose names begin so")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each, to try it out")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--into", type=Path, help="page to write the tables into, run nothing")
    tables = {"rate": rate_table} | {
        name: functools.partial(arms_table, comparison=name) for name in COMPARISONS
    }
    parser.add_argument("--tables", nargs="+", choices=list(tables), help="of those --into writes")
    args = parser.parse_args(argv)
    if args.tables and not args.into:
        parser.error("--tables chooses what --into writes; give --into PAGE")
    runs, plan = args.runs.resolve(), SMOKE if args.smoke else FULL
    if args.list:
        for run in list_runs(args.runs, plan):
            print("python", shlex.join(run.command(args.runs)))
            for world in WORLDS:
                print("python", shlex.join(measurement(run, args.runs, world, plan)[0]))
        return 0
    if args.into:
        insert(args.into, {name: tables[name](runs) for name in args.tables or tables})
        return 0
    run_all(runs, plan, args.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
