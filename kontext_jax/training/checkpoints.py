"""Checkpoints of a training run: written beside the training, checked when read, never half used.

    RUN/checkpoints/STEP/arrays/{params, ema_params, opt_state, rest}/    by storage.arrays
    RUN/checkpoints/STEP/data_state.json, config.json
    RUN/checkpoints/STEP/manifest.json                                    written last

The manifest lists every other file with its size and CRC-32. A step without one was never finished
and counts as absent; a step whose files are not what its manifest says is damaged: it is set aside
as `STEP.damaged`, and the step before it is used. Nothing is deleted but what the policy of keeping
names, and unfinished steps once a later one is whole.

Orbax writes and reads the arrays (`storage.arrays`). Keeping, deleting and the thread that finishes
a save are not left to its CheckpointManager, which deletes old steps when it has committed the
arrays of a new one: before a manifest can be written, since that needs the checksums of those
files. Here a step is deleted only when a later one has its manifest, and its own manifest goes
first, so that a kill at any point leaves no step that looks whole and is not. A failed save must
leave nothing half written, and say how much room it needed (docs/faults.md has the tests by kill).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from kontext_jax.runtime.atomic import is_local, write_text
from kontext_jax.runtime.processes import from_all, from_first
from kontext_jax.storage import arrays, checksums, step_folders
from kontext_jax.storage.step_folders import ARRAYS, CONFIG, DATA_STATE, MANIFEST, CheckpointError

ITEMS = ("params", "ema_params", "opt_state")  # fields of the state that are items of their own
REST = "rest"
POLL_S = 0.2
GIVE_UP_TRIES = 10
OTHERS_TIMEOUT_S = 1200


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves its state, and what it keeps.

    Attributes:
      every_steps: steps between checkpoints; one more is always made at the end.
      keep_last: number of the newest that stay; there is one more while the next is written.
      keep_every: steps between those that stay for good; None: none do.
      asynchronous: train on while writing.
      on_failed_save: "stop" ends the run with the reason; "continue" tells it and trains on.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    asynchronous: bool = True
    on_failed_save: Literal["stop", "continue"] = "stop"

    def __post_init__(self):
        for name in ("every_steps", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it must be 1 or more")
        if self.keep_every is not None and self.keep_every % self.every_steps:
            raise ValueError(
                f"checkpoint.keep_every {self.keep_every} is no multiple of checkpoint.every_steps "
                f"{self.every_steps}, so that steps to keep would not be saved"
            )


@dataclasses.dataclass
class Restored:
    """A checkpoint read back: what was handed to `Checkpoints.save`."""

    state: Any
    data_state: dict[str, Any]
    config_json: str
    step: int


def difference_lines(
    stored: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, Any]
) -> list[str]:
    """`-` for leaves that are wanted and not stored, `+` for the reverse, and those that differ."""
    lines = [f"- {path}" for path in sorted(wanted.keys() - stored.keys())]
    lines += [f"+ {path}" for path in sorted(stored.keys() - wanted.keys())]
    for path in sorted(stored.keys() & wanted.keys()):
        have, want = stored[path], wanted[path]
        if (have.shape, have.dtype) != (tuple(want.shape), np.dtype(want.dtype)):
            lines.append(
                f"shape {path}: {have.dtype.name} {list(have.shape)} in the checkpoint, "
                f"{np.dtype(want.dtype).name} {list(want.shape)} here"
            )
    return lines


def config_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Iterable[str] = ()
) -> list[str]:
    """Settings that differ, `-` as it was and `+` as it is; those that may are left out.

    Args:
      old, new: configs as nested dicts of JSON's types.
      free: dotted keys that may change, `*` standing for any characters ("mesh.*").
    """

    def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            if isinstance(value, Mapping):
                found |= dotted(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = json.loads(json.dumps(value))  # tuples become lists
        return found

    free = tuple(free)
    was, now = dotted(old), dotted(new)
    lines = []
    for key in sorted({*was, *now}):
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in free):
            continue
        if key in was and key in now and was[key] == now[key]:
            continue
        lines += [f"- {key}: {json.dumps(was[key])}"] if key in was else []
        lines += [f"+ {key}: {json.dumps(now[key])}"] if key in now else []
    return lines


class Checkpoints:
    """The checkpoints of one run, for the process that trains. Every process calls it alike."""

    def __init__(
        self,
        directory: epath.PathLike,
        keep_last: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
        on_failed_save: Literal["stop", "continue"] = "stop",
        tell: Callable[[str], None] = print,
    ):
        """Looks at nothing yet.

        Args:
          directory: RUN/checkpoints, a local path or gs://…; the same one for all processes.
          keep_last, keep_every, asynchronous, on_failed_save: see `CheckpointConfig`.
          tell: called with lines for the user, on every process.
        """
        self.directory = step_folders.absolute(directory)
        self._is_local = is_local(self.directory)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._asynchronous, self._on_failed_save = asynchronous, on_failed_save
        self._tell = tell
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as error:  # what ended the run matters more
            self._tell(f"WARNING: {error}")

    def latest_step(self) -> int | None:
        """The newest finished step, None without one. Its files are checked by `restore`."""
        return max(self._steps()[0], default=None)

    # Writing.

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        config_json: str,
        *,
        wait: bool = False,
    ) -> None:
        """Writes a checkpoint; returns when the state may change, which is long before the end.

        A step that is there already is left as it is. The save before must have ended: it is
        waited for.

        Args:
          step: its name.
          state: a dataclass of arrays; `ITEMS` are stored apart from the other fields.
          data_state: the position in the data, small, in JSON's types, equal on every process.
          config_json: the run's config.
          wait: return only when everything is on disk.

        Raises:
          CheckpointError: this save, or the one before, failed, and failures stop the run.
        """
        self.wait()
        if step in self._steps()[0]:
            return
        fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        items = {name: fields.pop(name) for name in ITEMS if name in fields}
        items[REST] = fields
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        folder = self.directory / str(step)
        problem = ""
        if jax.process_index() == 0:
            try:
                self._prepare(folder, nbytes, data_state, config_json)
            except OSError as error:
                problem = str(error)
        # What process 0 prepares, the others need: this is also where they wait for it.
        if problem := from_first(problem):
            self._fail(step, nbytes, problem)
            return
        try:
            saving = arrays.save_async(folder / ARRAYS, items)
        except Exception as error:  # Orbax and TensorStore have no common class of errors
            self._give_up(folder)
            self._fail(step, nbytes, _first_line(error))
            return
        self._thread = threading.Thread(
            target=self._finish, args=(step, nbytes, saving), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        if wait or not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Raises what a save in the background failed with, if one has; cheap, for every step."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          CheckpointError: it failed, and failures stop the run.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            if self._on_failed_save == "stop":
                raise error
            self._tell(f"WARNING: {error} Training goes on.")

    def close(self) -> None:
        """Waits for the save under way; see `wait`."""
        self.wait()

    def _prepare(self, folder, nbytes: int, data_state: Mapping, config_json: str) -> None:
        """Makes the folder of a step with its small files, on process 0."""
        if folder.exists():
            self._set_aside(folder, "unfinished")
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._is_local and nbytes > shutil.disk_usage(self.directory).free:
            self._remove_unfinished()
            if nbytes > shutil.disk_usage(self.directory).free:
                raise CheckpointError("the disk is too full")
        folder.mkdir(parents=True)
        write_text(folder / DATA_STATE, json.dumps(data_state, indent=2), durable=True)
        write_text(folder / CONFIG, config_json, durable=True)

    def _finish(self, step: int, nbytes: int, saving: arrays.Saving) -> None:
        """Waits for the arrays, commits them and deletes what need not be kept; in a thread."""
        folder = self.directory / str(step)
        try:
            saving.result()
            self._commit(step, folder)
        except Exception as error:
            self._give_up(folder)
            try:
                self._fail(step, nbytes, _first_line(error), raise_now=False)
            except OSError as second:
                self._error = second
            return
        if jax.process_index() == 0:
            try:
                self._delete_old(step)
            except OSError as error:
                self._tell(f"WARNING: step {step} is saved, but older ones cannot go: {error}")

    def _give_up(self, folder: epath.Path) -> None:
        """Removes what a failed save has written, and what its other threads still write."""
        if jax.process_index() == 0:
            for _ in range(GIVE_UP_TRIES):
                step_folders.remove(folder)
                time.sleep(POLL_S)

    def _commit(self, step: int, folder: epath.Path) -> None:
        """Writes the manifest, each process having looked at the files that it wrote."""
        # Object stores keep checksums of their own, and reading back costs as much as writing.
        index, count = jax.process_index(), jax.process_count()
        names = [
            name
            for name in checksums.list_files(folder)
            if not name.startswith(MANIFEST) and _writer_of(name, count) == index
        ]
        files = checksums.record(folder, names, with_checksums=self._is_local)
        if index:
            own = json.dumps(step_folders.as_json(files))
            write_text(folder / f"{MANIFEST}.{index}", own, durable=True)
            self._await(lambda: (folder / MANIFEST).exists(), folder, "process 0")
            return
        parts = [folder / f"{MANIFEST}.{other}" for other in range(1, count)]
        self._await(lambda: all(part.exists() for part in parts), folder, "the other processes")
        listed = step_folders.as_json(files)
        for part in parts:
            listed |= json.loads(part.read_text())
            part.unlink()
        write_text(folder / MANIFEST, step_folders.manifest_json(step, listed), durable=True)

    def _await(self, is_done: Callable[[], bool], folder: epath.Path, whom: str) -> None:
        deadline = time.monotonic() + OTHERS_TIMEOUT_S
        while not is_done():
            if not folder.exists():
                raise CheckpointError(f"given up by {whom}")
            if time.monotonic() > deadline:
                raise CheckpointError(f"waited {OTHERS_TIMEOUT_S} s for {whom}")
            time.sleep(POLL_S)

    def _delete_old(self, newest: int) -> None:
        """Deletes what the policy does not keep, and what was never finished, on process 0."""
        steps = [step for step in step_folders.list_steps(self.directory)[0] if step <= newest]
        kept = set(steps[-self._keep_last :])
        if self._keep_every is not None:
            kept |= {step for step in steps if step % self._keep_every == 0}
        for step in sorted(set(steps) - kept):
            (self.directory / str(step) / MANIFEST).unlink()  # from here on it is unfinished
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        unfinished = step_folders.list_steps(self.directory)[1]
        folders = [self.directory / str(step) for step in unfinished]
        for folder in [*folders, *self.directory.glob("*.unfinished*")]:
            step_folders.remove(folder)

    def _fail(self, step: int, nbytes: int, reason: str, raise_now: bool = True) -> None:
        lines = f"checkpoint of step {step} could not be written to {self.directory}: {reason}. "
        lines += f"It needs {nbytes / 1e9:.2f} GB"
        if self._is_local and self.directory.exists():
            lines += f", the disk has {shutil.disk_usage(self.directory).free / 1e9:.2f} GB free"
        kept = ", ".join(map(str, step_folders.list_steps(self.directory)[0])) or "none"
        lines += f". Nothing was deleted; whole checkpoints there: {kept}. "
        lines += "Free some space or name another disk, then start again to go on from the newest."
        self._error = CheckpointError(lines)
        if raise_now:
            self.wait()

    # Reading.

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """Reads a checkpoint onto the devices that `abstract_state` names.

        Args:
          abstract_state: the state's dataclass with `jax.ShapeDtypeStruct`s (or arrays) for leaves;
            their shardings decide where the arrays go, whatever they were saved from.
          step: None: the newest that is whole; damaged ones are told, set aside and passed over. A
            step named is the only one tried, and newer ones are set aside as `STEP.superseded`.

        Raises:
          CheckpointError: no checkpoint is whole; what is wrong with each is listed.
          ValueError: the checkpoint is of another state; every difference is listed.
        """
        self.wait()
        committed, unfinished = self._steps()
        candidates = [step] if step is not None else committed[::-1]
        for begun in unfinished:
            if not committed or begun > committed[-1]:
                self._tell(f"WARNING: {self.directory / str(begun)} was never finished: not used")
        reports, damaged = [], []
        for candidate in candidates:
            folder = self.directory / str(candidate)
            if candidate not in committed:
                reports.append(f"{folder}: no finished checkpoint")
                continue
            damage = self._damage(folder)
            if damage:
                reports.append("\n    ".join([f"{folder} is damaged:", *damage]))
                self._tell(f"WARNING: {reports[-1]}")
                damaged.append(folder)
                continue
            if damaged:
                self._tell(f"WARNING: going on from step {candidate} instead")
            restored = self._read(folder, candidate, abstract_state)
            # Not before something has been read: without anything left, a run would begin anew.
            if jax.process_index() == 0:
                why = "damaged" if step is None else "superseded"
                for newer in (other for other in committed if other > candidate):
                    self._set_aside(self.directory / str(newer), why)
            return restored
        listed = "\n  ".join(reports) or "it holds no finished checkpoint"
        raise CheckpointError(f"{self.directory}: nothing to restore:\n  {listed}")

    def _read(self, folder: epath.Path, step: int, abstract_state: Any) -> Restored:
        fields = {
            f.name: getattr(abstract_state, f.name) for f in dataclasses.fields(abstract_state)
        }
        trees = {name: fields.pop(name) for name in ITEMS if name in fields}
        trees[REST] = fields
        wanted = {item: arrays.leaves_of(tree) for item, tree in trees.items()}
        stored = arrays.stored_leaves(folder / ARRAYS)
        lines = difference_lines(_with_items(stored), _with_items(wanted))
        if lines:
            raise ValueError(
                f"{folder}: not a checkpoint of this run's state (- missing in it, + unexpected):"
                "\n  " + "\n  ".join(lines)
            )
        loaded = arrays.load(folder / ARRAYS, wanted)

        def fill(item: str) -> Any:
            structure = jax.tree.structure(trees[item])
            return jax.tree.unflatten(structure, [loaded[item][path] for path in wanted[item]])

        parts = {item: fill(item) for item in trees}
        state = dataclasses.replace(abstract_state, **parts.pop(REST), **parts)
        data_state = json.loads((folder / DATA_STATE).read_text())
        return Restored(state, data_state, (folder / CONFIG).read_text(), step)

    def _steps(self) -> tuple[list[int], list[int]]:
        """Finished and unfinished steps as process 0 sees them."""
        found = step_folders.list_steps(self.directory) if jax.process_index() == 0 else None
        finished, unfinished = json.loads(from_first(json.dumps(found)))
        return finished, unfinished

    def _damage(self, folder: epath.Path) -> list[str]:
        """What is wrong with a checkpoint; each process reads a share of its files."""
        index, count = jax.process_index(), jax.process_count()
        try:
            files = step_folders.read_manifest(folder)
            mine = {name: files[name] for name in sorted(files)[index::count]}
            lines = checksums.find_damage(folder, mine)
        except CheckpointError as error:
            lines = [str(error)]
        return sorted({line for text in from_all("\n".join(lines)) for line in text.splitlines()})

    def _set_aside(self, folder: epath.Path, why: str) -> None:
        """Renames a folder to `STEP.why`, or `STEP.why-2` and so on."""
        names = (f"{folder.name}.{why}{'' if i == 1 else f'-{i}'}" for i in range(1, 10**6))
        target = next(path for name in names if not (path := folder.parent / name).exists())
        folder.rename(target)
        self._tell(f"{folder} is now {target.name}")


def _with_items(leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{item}/{path}": leaf for item, each in leaves.items() for path, leaf in each.items()}


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) < 400 else f"{line[:180]} … {line[-180:]}"  # the reason comes last


def _writer_of(name: str, num_processes: int) -> int:
    """Index of the process that wrote the file (and has it in its page cache)."""
    for part in name.split("/"):
        owner = part.removeprefix("ocdbt.process_")
        if owner != part and owner.isdecimal() and int(owner) < num_processes:
            return int(owner)
    return 0
