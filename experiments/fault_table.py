"""Breaks training runs in every way that a machine does, and shows that nothing is lost.

    python experiments/fault_table.py [--kills 20] [--out docs/faults.md]

An unbroken run of `train.py` is the measure. Then the same run is killed (SIGKILL) again and again
at random moments, half of them while a checkpoint is being written, and started again each time;
its last state must equal the unbroken run's bit for bit, and no finished checkpoint may be missing
or damaged in between. After that, single faults: a flipped bit, a truncated file, a missing file
and a missing manifest in the newest checkpoint, SIGTERM, a changed setting, a full disk (where this
process may mount a small file system).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from kontext_jax.storage import arrays, step_folders

ROOT = Path(__file__).parents[1]
POLL_S = 0.0005
START_TIMEOUT_S = 600
RESUMED = re.compile(r"going on from step (\d+)")


@dataclasses.dataclass(frozen=True)
class Command:
    """How a run is started.

    Attributes:
      arguments: arguments of the process; "{run}" stands for the run's folder.
      environment: beside this process's own.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def with_(self, *more: str) -> "Command":
        """The command with more arguments."""
        return dataclasses.replace(self, arguments=(*self.arguments, *more))

    def start(self, run: Path) -> subprocess.Popen:
        """Starts it in a process group of its own; its output goes to run.log beside the folder."""
        with run.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(
                [argument.replace("{run}", str(run)) for argument in self.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
                start_new_session=True,
            )

    def finish(self, run: Path) -> tuple[int, str]:
        """Runs it to its end; exit status and output."""
        process = self.start(run)
        try:
            status = process.wait(START_TIMEOUT_S)
        finally:
            kill(process)
        return status, output_of(run)


def output_of(run: Path) -> str:
    return run.with_suffix(".log").read_text(errors="replace")


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def checkpoints_of(run: Path) -> Path:
    return run / "checkpoints"


def newest_of(run: Path) -> int:
    """The newest finished step; 0 without one."""
    return max(step_folders.list_steps(checkpoints_of(run))[0], default=0)


def unfinished_of(run: Path) -> list[int]:
    return step_folders.list_steps(checkpoints_of(run))[1]


def final_state(run: Path) -> tuple[dict[str, np.ndarray], str]:
    """Every array of the newest checkpoint, and the position in the data."""
    folder = step_folders.absolute(checkpoints_of(run)) / str(newest_of(run))
    stored = arrays.stored_leaves(folder / step_folders.ARRAYS)
    loaded = arrays.load(folder / step_folders.ARRAYS, stored)
    leaves = {
        f"{item}/{p}": np.asarray(x) for item, each in loaded.items() for p, x in each.items()
    }
    return leaves, (folder / step_folders.DATA_STATE).read_text()


def differences(run: Path, unbroken: Path) -> list[str]:
    """What of the last states is not the same bit for bit."""
    lines = []
    if newest_of(run) != newest_of(unbroken):
        lines.append(f"last step {newest_of(run)}, expected {newest_of(unbroken)}")
    (mine, my_data), (theirs, their_data) = final_state(run), final_state(unbroken)
    lines += [f"{path} is missing or unexpected" for path in sorted(mine.keys() ^ theirs.keys())]
    lines += [
        f"{path} differs"
        for path in sorted(mine.keys() & theirs.keys())
        if mine[path].dtype != theirs[path].dtype or mine[path].tobytes() != theirs[path].tobytes()
    ]
    if my_data != their_data:
        lines.append("position in the data differs")
    lines += [f"losses: {line}" for line in _loss_differences(run, unbroken)]
    return lines


def _losses(run: Path) -> dict[int, float] | None:
    """Training loss by step as the run wrote it; None if it writes none."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    losses: dict[int, float] = {}
    for row in rows:
        if row["kind"] == "train":
            if row["step"] in losses:
                raise ValueError(f"{file}: step {row['step']} is there twice")
            losses[row["step"]] = row["loss"]
    return losses


def _loss_differences(run: Path, unbroken: Path) -> list[str]:
    mine, theirs = _losses(run), _losses(unbroken)
    if mine is None or theirs is None:
        return []
    return [
        f"step {step}: {mine.get(step)}, expected {theirs.get(step)}"
        for step in sorted(mine.keys() | theirs.keys())
        if mine.get(step) != theirs.get(step)
    ]


@dataclasses.dataclass
class Kill:
    """One SIGKILL and what came after.

    Attributes:
      moment: the moment it was aimed at.
      newest: finished step at that time.
      during_save: whether a checkpoint was begun and not finished.
      resumed: the step that the next start went on from; None: from the beginning.
    """

    moment: str
    newest: int
    during_save: bool
    resumed: int | None = None


def _wait_until(process: subprocess.Popen, happened: Callable[[], bool], run: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not happened():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it could be broken:\n{output_of(run)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened for {START_TIMEOUT_S} s:\n{output_of(run)}")
        time.sleep(POLL_S)


def kill_at(process: subprocess.Popen, moment: str, run: Path, draw: random.Random) -> None:
    """Waits for the moment and kills."""
    before = newest_of(run)
    if moment == "while starting":
        time.sleep(draw.uniform(0.2, 4.0))
    elif moment == "while saving":
        _wait_until(process, lambda: any(step > before for step in unfinished_of(run)), run)
        time.sleep(draw.choice([0.0, draw.uniform(0, 0.01), draw.uniform(0, 0.1)]))
    else:
        _wait_until(process, lambda: newest_of(run) > before, run)
        time.sleep(draw.uniform(0, 0.02 if moment == "after a save" else 0.5))
    kill(process)


MOMENTS = ("while saving", "between steps", "while saving", "after a save", "while starting")


def kill_again_and_again(
    command: Command, run: Path, num_kills: int, seed: int, tell: Callable[[str], None]
) -> list[Kill]:
    """Starts and kills a run so many times, then lets it end; checks what is left each time.

    Raises:
      AssertionError: a finished checkpoint is gone or damaged, or the newest was not gone on from.
    """
    draw, kills = random.Random(seed), []
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(num_kills)]
    for moment in moments:
        before = newest_of(run)
        process = command.start(run)
        try:
            kill_at(process, moment, run, draw)
        finally:
            kill(process)
        _note_resumption(kills, run)
        _check_nothing_lost(run, before)
        newest = newest_of(run)
        kills.append(Kill(moment, newest, any(step > newest for step in unfinished_of(run))))
        tell(f"kill {len(kills)}: {moment}, newest {newest}, unfinished {unfinished_of(run)}")
    status, output = command.finish(run)
    assert status == 0, output
    _note_resumption(kills, run)
    _check_nothing_lost(run, newest_of(run))
    return kills


def _note_resumption(kills: list[Kill], run: Path) -> None:
    """Fills in what the start after the last kill went on from, where it came that far."""
    found = RESUMED.search(output_of(run))
    if found and kills:
        kills[-1].resumed = int(found[1])
        assert kills[-1].resumed == kills[-1].newest, (
            f"went on from step {found[1]}, though step {kills[-1].newest} was finished"
        )


def _check_nothing_lost(run: Path, before: int) -> None:
    assert newest_of(run) >= before, f"step {before} was finished and is gone"
    for step in step_folders.list_steps(checkpoints_of(run))[0]:
        damage = step_folders.find_damage(step_folders.absolute(checkpoints_of(run)) / str(step))
        assert not damage, f"step {step}: {damage}"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage_newest(run: Path, how: str) -> str:
    """Damages the newest checkpoint; what becomes of its folder."""
    newest = checkpoints_of(run) / str(newest_of(run))
    if how == "missing manifest":
        (newest / step_folders.MANIFEST).unlink()
        return "it counts as never finished"
    actions = {"flipped bit": flip_bit, "truncated file": truncate, "missing file": Path.unlink}
    actions[how](largest_file(newest))
    return f"its folder became `{newest.name}.damaged`"


DAMAGES = ("flipped bit", "truncated file", "missing file", "missing manifest")


def terminate(command: Command, run: Path, at_step: int) -> tuple[int, str]:
    """Sends SIGTERM some time after step `at_step` has been saved; exit status and output."""
    process = command.start(run)
    try:
        _wait_until(process, lambda: newest_of(run) >= at_step, run)
        time.sleep(0.2)
        process.terminate()
        status = process.wait(START_TIMEOUT_S)
    finally:
        kill(process)
    return status, output_of(run)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[bool]:
    """Mounts a file system of so many bytes; yields whether that was allowed."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(folder)]
    try:
        is_mounted = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclasses.dataclass
class Row:
    """A line of the table."""

    fault: str
    what_happened: str
    outcome: str

    def __str__(self) -> str:
        return f"| {self.fault} | {self.what_happened} | {self.outcome} |"


def _outcome(run: Path, unbroken: Path) -> str:
    lines = differences(run, unbroken)
    if lines:
        raise AssertionError("\n".join(lines))
    return "last state, losses and position in the data equal the unbroken run's bit for bit"


def kill_rows(kills: Sequence[Kill], outcome: str) -> list[Row]:
    """One row for every place that kills were aimed at."""
    rows = []
    for moment in dict.fromkeys(MOMENTS):
        mine = [k for k in kills if k.moment == moment]
        if not mine:
            continue
        begun = sum(k.during_save for k in mine)
        what = f"{begun} left a checkpoint half written; every start went on from the newest whole"
        rows.append(Row(f"{len(mine)} × `kill -9` {moment}", what, outcome))
    return rows


def damage_row(command: Command, source: Path, run: Path, unbroken: Path, how: str) -> Row:
    """Damages the newest checkpoint of a copy of `source`, an interrupted run, and goes on."""
    shutil.copytree(source, run)
    newest, fate = newest_of(run), damage_newest(run, how)
    status, output = command.finish(run)
    assert status == 0, output
    found = RESUMED.search(output)
    assert found and int(found[1]) < newest, output
    warning = next(line for line in output.splitlines() if "WARNING" in line)
    assert str(newest) in warning, output
    if how != "missing manifest":
        assert (checkpoints_of(run) / f"{newest}.damaged").is_dir()
    what = f"told; went on from step {found[1]} instead of {newest}; {fate}"
    return Row(f"{how} in the newest checkpoint", what, _outcome(run, unbroken))


def terminate_row(command: Command, run: Path, unbroken: Path, at_step: int) -> Row:
    status, output = terminate(command, run, at_step)
    assert status == 0, output
    stopped = newest_of(run)
    assert not unfinished_of(run)
    status, output = command.finish(run)
    assert status == 0, output
    found = RESUMED.search(output)
    assert found and int(found[1]) == stopped, output
    what = f"saved step {stopped}, exit status 0; went on from there"
    return Row("SIGTERM", what, _outcome(run, unbroken))


def changed_setting_row(command: Command, source: Path, run: Path, setting: str) -> Row:
    """A run that goes on with another value of something that decides what is computed."""
    shutil.copytree(source, run)
    before = sorted(path.name for path in checkpoints_of(run).iterdir())
    status, output = command.with_(setting).finish(run)
    assert status == 2, output
    key = setting.removeprefix("--config.").partition("=")[0]
    diff = [
        line.strip() for line in output.splitlines() if line.strip()[:1] in "-+" and key in line
    ]
    assert len(diff) == 2 and diff[0][0] + diff[1][0] == "-+", output
    assert sorted(path.name for path in checkpoints_of(run).iterdir()) == before
    shown = ", ".join(f"`{line}`" for line in diff)
    return Row(f"`{setting}` on a run begun without", f"refused: {shown}", "nothing was touched")


def fill(folder: Path) -> Path:
    """Writes a file until the disk of `folder` is full."""
    filler, block = folder / "filler", bytes(2**16)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(block)
    return filler


def full_disk_row(command: Command, run: Path, unbroken: Path, state_bytes: int) -> Row | None:
    """Something else fills the disk while the second checkpoint is written; then it goes away.

    Returns:
      None where no file system may be mounted.
    """
    disk = checkpoints_of(run)  # and the log elsewhere, so that it can be read
    with small_disk(disk, 5 * state_bytes) as is_mounted:
        if not is_mounted:
            return None
        process = command.start(run)
        try:
            _wait_until(process, lambda: newest_of(run) > 0 and any(unfinished_of(run)), run)
            filler = fill(disk)
            status = process.wait(START_TIMEOUT_S)
        finally:
            kill(process)
        output = output_of(run)
        assert status == 2, output
        message = next(line for line in output.splitlines() if "could not be written" in line)
        kept = step_folders.list_steps(checkpoints_of(run))[0]
        assert kept and not unfinished_of(run), output
        _check_nothing_lost(run, kept[-1])
        filler.unlink()
        status, output = command.finish(run)
        assert status == 0, output
        found = RESUMED.search(output)
        assert found and int(found[1]) == kept[-1], output
        needs = re.search(r"needs [\d.]+ GB, the disk has [\d.]+ GB free", message)
        what = (
            f"stopped, exit status 2 ({needs[0]}); earlier checkpoints whole, nothing half written "
            f"left behind; with room made, went on from step {kept[-1]}"
        )
        return Row("disk full while saving", what, _outcome(run, unbroken))


def state_bytes_of(run: Path) -> int:
    """Bytes of a run's newest checkpoint."""
    folder = checkpoints_of(run) / str(newest_of(run))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make_table(command: Command, folder: Path, num_kills: int, seed: int, tell) -> list[Row]:
    """Every fault in turn."""
    unbroken, killed = folder / "unbroken", folder / "killed"
    begin = time.monotonic()
    status, output = command.finish(unbroken)
    assert status == 0, output
    tell(f"unbroken run: {time.monotonic() - begin:.0f} s, {newest_of(unbroken)} steps")

    kills = kill_again_and_again(command, killed, num_kills, seed, tell)
    rows = kill_rows(kills, _outcome(killed, unbroken))
    return rows + single_faults(command, folder, unbroken, tell)


def single_faults(command: Command, folder: Path, unbroken: Path, tell) -> list[Row]:
    """The faults that are tried once, each in a run of its own."""
    rows = []
    source = folder / "interrupted"  # what the unbroken run would have left, ended before its last
    shutil.copytree(unbroken, source)
    shutil.rmtree(checkpoints_of(source) / str(newest_of(source)))
    for how in DAMAGES:
        tell(how)
        rows.append(damage_row(command, source, folder / how.replace(" ", "-"), unbroken, how))
    tell("changed setting")
    setting = "--config.optimizer.learning_rate=0.5"
    rows.append(changed_setting_row(command, source, folder / "changed", setting))
    tell("SIGTERM")
    rows.append(terminate_row(command, folder / "terminated", unbroken, at_step=1))
    tell("full disk")
    row = full_disk_row(command, folder / "full", unbroken, state_bytes_of(unbroken))
    if row is None:
        tell("no file system may be mounted here: the full disk was left out")
    return [*rows, row] if row else rows


def train_command(num_steps: int, every_steps: int, *settings: str) -> Command:
    """`train.py` on its smallest config, with small batches and nothing but training."""
    words = ["train.py", "--config", "configs/tiny.py"]
    for setting in (
        f"num_steps={num_steps}",
        f"checkpoint.every_steps={every_steps}",
        "batch_size=2",
        "eval.every_steps=0",
        "eval.sample_every_steps=0",
        *settings,
    ):
        words.append(f"--config.{setting}")
    return Command((sys.executable, *words, "--workdir", "{run}"), {"JAX_PLATFORMS": "cpu"})


HEAD = """# Faults

What a training run survives, shown by `python experiments/fault_table.py`: an unbroken run of

    {command}

({steps} steps, a checkpoint of {megabytes:.0f} MB every {every}) is the measure. {kills} kills in
one other run, and each single fault below in a run of its own, had to end with the same state.

What is wrong with the data (a picture that cannot be read, an empty text, a missing reference, a
pair of different shapes) is skipped and counted or stops the run, as `data.on_bad_sample` says:
[data.md](data.md), `tests/data/test_loader.py`.

| fault | what happened | in the end |
|---|---|---|
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    command = train_command(args.steps, args.every)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        rows = make_table(
            command, folder, args.kills, args.seed, lambda line: print(line, flush=True)
        )
        size = state_bytes_of(folder / "unbroken")
    text = HEAD.format(
        command=" ".join(["python", *command.arguments[1:-2]]),
        steps=args.steps,
        megabytes=size / 1e6,
        every=f"{args.every} steps",
        kills=args.kills,
    )
    text += "\n".join(map(str, rows)) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
