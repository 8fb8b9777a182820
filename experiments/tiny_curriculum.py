"""Trains the tiny Kontext from nothing: `python experiments/tiny_curriculum.py [--runs runs/tiny]`.

Runs the commands of `--list` one after another: the autoencoder, its polish (for which
`python -m kontext_jax.evaluation.fetch_perceptual` must have run once), the frozen networks, the
encoded data, text to image, editing and text to image together, the last steps at a falling rate;
then what that makes itself, by which guidance and few steps are distilled into the network
(`--until final` leaves these out). Each goes on where it was interrupted, and a stage that is done
is not run again, so the same command is given until it says that all is done. Ctrl-C and SIGTERM
end it as they end the command that is running, which first saves what it has.

A stage whose command or whose inputs have changed since it was done is run again where that makes
it go on (a training run with more steps); where it would mix old and new, it is named and has to be
deleted by hand.
"""

import argparse
import dataclasses
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kontext_jax.runtime.atomic import write_text

DONE = "done"  # folder of what was done, one file a stage
TRAIN = "train.py --config configs/{}.py --workdir {}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, and what it needs.

    Attributes:
      makes: name of the folder that it makes, and of the stage.
      inputs: stages whose folders it reads.
    """

    makes: str
    command: str
    inputs: tuple[str, ...] = ()


def list_stages(runs: Path, part: float = 1.0, joint_steps: int = 3500) -> tuple[Stage, ...]:
    """The stages in order.

    Args:
      part: factor of all numbers of steps and examples; below 1 to try the commands out.
      joint_steps: steps of the longest stage.
    """

    def count(whole: int, least: int = 8) -> int:
        return max(least, round(part * whole))

    def train(config: str, makes: str, steps: int, *settings: str) -> str:
        words = [TRAIN.format(config, runs / makes), f"--config.num_steps={count(steps)}"]
        if part < 1:
            settings = (*settings, "optimizer.warmup_steps=2", "batch_size=8")
            settings += ("autoencoder.adversarial_start_step=4",) * (config == "vae_tiny")
            settings += ("ladd.warmup_steps=2",) * (config == "tiny_ladd")
        return " ".join([*words, *(f"--config.{setting}" for setting in settings)])

    def encode(out: str, *sources: str) -> str:
        options = f"--weights {runs / 'encoders'} --out {runs / out} --resolution 64"
        return (
            f"-m kontext_jax.data.encode {' '.join(sources)} {options} --dtype float32 "
            "--batch-size 50 -q"
        )

    pictures = (
        f"data.sources=scenes:easy-crowded:any:{count(12_000, 64)},"
        f"photos:squares-64:train:{count(24_000, 64)}"
    )
    cached = f"data.cache={runs / 'encoded'}", f"eval.cache={runs / 'encoded_eval'}"
    frozen = f"encoders={runs / 'encoders'}"
    return (
        Stage("vae", train("tiny_vae", "vae", 8000, pictures)),
        Stage(
            "vae_sharp",
            train(
                "vae_tiny",
                "vae_sharp",
                1500,
                "preset=tiny-kontext",
                f"weights={runs / 'vae'}",
                pictures,
                "eval.sources=photos:squares-64:held_out:64",
            ),
            ("vae",),
        ),
        Stage(
            "encoders",
            f"tools/scenes_encoders.py --autoencoder {runs / 'vae_sharp'} --preset tiny-kontext "
            f"--photos --out {runs / 'encoders'}",
            ("vae_sharp",),
        ),
        Stage(
            "encoded",
            encode(
                "encoded",
                f"scenes:easy:train:{count(48_000, 128)}",
                f"scenes:easy-captions:train:{count(15_000, 64)}",
                f"photos:edits-64:train:{count(30_000, 128)}",
            ),
            ("encoders",),
        ),
        Stage(
            "encoded_eval",
            encode(
                "encoded_eval",
                f"scenes:easy:seen:{count(240, 64)}",
                f"scenes:easy-captions:seen:{count(256, 64)}",
                f"photos:edits-64:held_out:{count(160, 64)}",
            ),
            ("encoders",),
        ),
        Stage(
            "t2i",
            train("tiny_t2i", "t2i", 1200, frozen, *cached),
            ("encoded", "encoded_eval"),
        ),
        Stage(
            "joint",
            train("tiny_kontext", "joint", joint_steps, frozen, *cached, f"weights={runs / 't2i'}"),
            ("encoded", "encoded_eval", "t2i"),
        ),
        Stage(
            "final",
            train(
                "tiny_kontext",
                "final",
                1200,
                frozen,
                *cached,
                f"weights={runs / 'joint'}",
                "optimizer.schedule=linear",
                "ema_decay=0.995",
            ),
            ("encoded", "encoded_eval", "joint"),
        ),
        Stage(
            "guided",
            f"-m kontext_jax.data.synthesize --model {runs / 'final'} --cache {runs / 'encoded'} "
            f"--out {runs / 'guided'} --guidance 2.5 --limit {count(6000, 64)} --dtype float32 "
            "--batch-size 48 -q",
            ("encoded", "final"),
        ),
        Stage(
            "guidance",
            train(
                "tiny_guidance_distill",
                "guidance",
                1500,
                frozen,
                *cached,
                f"weights={runs / 'final'}",
                f"data.synthetic_cache={runs / 'guided'}",
            ),
            ("encoded", "encoded_eval", "final", "guided"),
        ),
        Stage(
            "ladd",
            train(
                "tiny_ladd",
                "ladd",
                700,
                frozen,
                f"data.cache={runs / 'guided'}",
                f"eval.cache={runs / 'encoded_eval'}",
                f"weights={runs / 'guidance'}",
            ),
            ("encoded_eval", "guidance", "guided"),
        ),
        Stage(
            "fast",
            f"-m convert_weights mix {runs / 'guidance'} {runs / 'ladd'} --share 0.75 "
            f"--out {runs / 'fast'}",
            ("guidance", "ladd"),
        ),
        Stage(
            "policy",
            train(
                "tiny_policy",
                "policy",
                1000,
                frozen,
                *cached,
                f"weights={runs / 'guidance'}",
            ),
            ("encoded", "encoded_eval", "guidance"),
        ),
    )


def run_stages(runs: Path, stages: Sequence[Stage], until: str | None, tell=print) -> int:
    """Runs what is not done; the exit status of the first command that failed, or 0.

    Raises:
      ValueError: a stage was made from what is no longer there.
    """
    (runs / DONE).mkdir(parents=True, exist_ok=True)
    marks: dict[str, str] = {}
    for stage in stages:
        inputs = {name: marks[name] for name in stage.inputs}
        note = {"command": stage.command, "inputs": inputs}
        file = runs / DONE / f"{stage.makes}.json"
        before = json.loads(file.read_text()) if file.exists() else None
        seconds = before.pop("seconds") if before else 0.0
        if before is not None and before["inputs"] != inputs:
            changed = [n for n in stage.inputs if before["inputs"].get(n) != inputs[n]]
            raise ValueError(
                f"{runs / stage.makes} was made from another {', '.join(changed)}; delete "
                f"{runs / stage.makes} and {file} to make it again"
            )
        if before != note:
            tell(f"== {stage.makes}: python {stage.command}")
            start = time.monotonic()
            status = run_command(stage.command)
            if status:
                tell(f"{stage.makes}: stopped with status {status}; the same command goes on")
                return status
            seconds += time.monotonic() - start
            tell(f"== {stage.makes}: done in {seconds / 60:.1f} min")
            write_text(file, json.dumps({**note, "seconds": seconds}, indent=1) + "\n")
        marks[stage.makes] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        if stage.makes == until:
            tell(f"done up to {until}")
            return 0
    tell("all is done")
    return 0


def run_command(command: str) -> int:
    """Runs a command of Python's and hands it the signals that this process gets.

    Returns:
      Its status; 143 where SIGTERM was asked to end it, since a run that saved and stopped says 0.
    """
    process = subprocess.Popen([sys.executable, *shlex.split(command)], process_group=0)
    asked: list[int] = []

    def hand_on(number, frame):
        asked.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + asked[-1] if asked else status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), metavar="DIR")
    parser.add_argument("--until", metavar="STAGE", help="stop after this one")
    parser.add_argument("--joint-steps", type=int, default=3500, help="of the longest stage")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--part", type=float, default=1.0, help="of all steps, to try it out")
    args = parser.parse_args(argv)
    stages = list_stages(args.runs, args.part, args.joint_steps)
    names = [stage.makes for stage in stages]
    if args.until not in (None, *names):
        parser.error(f"there is no stage {args.until}; they are {', '.join(names)}")
    if args.list:
        print("\n".join(f"python {stage.command}" for stage in stages))
        return 0
    try:
        return run_stages(args.runs, stages, args.until)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
