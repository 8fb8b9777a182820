"""What a folder of encoded samples says of itself: how it was made, and whether it is complete.

`encoded_records` lists its files.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kontext_jax.data.encoded.records import (
    CacheError,
    facts_difference,
    facts_hash,
)
from kontext_jax.runtime.atomic import write_text
from kontext_jax.storage.safetensors_reader import SafetensorsFile, TensorFileError, TensorInfo
from kontext_jax.storage.safetensors_writer import SafetensorsWriter

FORMAT = 2  # records are safetensors; those of format 1 are read too
FORMATS = (1, 2)
MANIFEST = "manifest.json"
NULL_TEXT = "null_text.safetensors"
DONE_NAME = re.compile(r"done-(\d{5})-of-(\d{5})\.json")


def check_share(process_index: int, process_count: int) -> None:
    """Raises ValueError if that is no process of so many."""
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index {process_index} is none of {process_count} processes, which "
            "count from 0"
        )


def local_folder(path: str | Path) -> Path:
    """The folder as a Path.

    Raises:
      CacheError: it is not on a disk of this machine, where ArrayRecord can read and write.
    """
    if "://" in str(path):
        raise CacheError(
            f"{path}: encoded samples are kept on a local or mounted disk; mount the bucket, or "
            "copy the folder"
        )
    return Path(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `manifest.json` says of a folder of encoded samples.

    Raises:
      CacheError: there is none, or it is damaged or of another format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CacheError(
            f"{directory} is no folder of encoded samples: no {MANIFEST} in it; make one by "
            "`python -m kontext_jax.data.encode PATH … --weights … --out DIR`"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, facts, stored_hash = manifest["format"], manifest["facts"], manifest["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged: {error!r}") from None
    if version not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise CacheError(f"{path} is of format {version}; this version reads formats {known}")
    if facts_hash(facts) != stored_hash:
        raise CacheError(
            f"{path}: its facts hash to {facts_hash(facts)[:12]}, it says {stored_hash[:12]}: the "
            "file was edited; restore it, or encode anew into another folder"
        )
    return manifest


def check_facts(directory: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses records that were not made as expected.

    Raises:
      CacheError: with one line for each fact that differs.
    """
    here = {section: stored.get(section, {}) for section in expected}
    if lines := facts_difference(here, expected):
        listed = "\n  ".join(lines)
        raise CacheError(
            f"{directory} holds samples that were encoded in another way:\n  {listed}\n"
            "use what they were made with, or encode anew into another folder"
        )


def read_null_text(directory: Path, made_by: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of the empty prompt that belong to the records `made_by`."""
    path = directory / NULL_TEXT
    try:
        with SafetensorsFile(path) as file:
            if file.metadata.get("made_by") != made_by:
                raise CacheError(f"{path} belongs to another folder; restore its own")
            return file.read("txt"), file.read("vec")
    except (OSError, KeyError, TensorFileError) as error:
        raise CacheError(f"{path}: {error}") from None


def start_folder(
    directory: Path,
    facts: Mapping[str, Any],
    notes: Mapping[str, Any],
    make_null_text: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> str:
    """Makes a folder of encoded samples of `directory`, or finds that it is one of the same facts.

    Args:
      facts: what makes the records.
      notes: what else to tell people in the manifest.
      make_null_text: gives txt [T, D] and vec [D] of the empty prompt.

    Returns:
      The hash of the facts, for the records.

    Raises:
      CacheError: the folder was made in another way.
    """
    made_by = facts_hash(facts)
    if (directory / MANIFEST).exists():
        check_facts(directory, read_manifest(directory)["facts"], facts)
        read_null_text(directory, made_by)
        return made_by
    arrays = dict(zip(("txt", "vec"), map(np.asarray, make_null_text()), strict=True))
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(directory / NULL_TEXT, infos, {"made_by": made_by}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    manifest = {"format": FORMAT, "hash": made_by, "facts": facts, **notes}
    write_text(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n", durable=True)
    return made_by


def write_done(directory: Path, process: int, process_count: int, num_records: int) -> None:
    """Says that a process has encoded its whole share, of so many samples and variants."""
    path = directory / f"done-{process:05d}-of-{process_count:05d}.json"
    write_text(path, json.dumps({"records": num_records}), durable=True)


def withdraw_done(directory: Path, process: int, process_count: int) -> None:
    """Takes back that a process is done, and what runs of other numbers of processes said."""
    for path in directory.iterdir():
        match = DONE_NAME.fullmatch(path.name)
        if match and (int(match[2]) != process_count or int(match[1]) == process):
            path.unlink(missing_ok=True)


def check_complete(directory: Path, num_records: int) -> None:
    """Raises CacheError unless all processes of some run are done, and their records still here."""
    finished: dict[int, dict[int, int]] = {}
    for path in directory.iterdir():
        if match := DONE_NAME.fullmatch(path.name):
            records = json.loads(path.read_text("utf-8"))["records"]
            finished.setdefault(int(match[2]), {})[int(match[1])] = records
    again = "run the same `python -m kontext_jax.data.encode` again, which makes what is missing"
    for count, records in finished.items():
        if len(records) == count:
            if num_records < sum(records.values()):
                raise CacheError(
                    f"{directory} has {num_records} of {sum(records.values())} encoded samples; "
                    f"{again}"
                )
            return
    missing = "; ".join(
        f"of {count} processes, {', '.join(map(str, sorted(set(range(count)) - done.keys())))} is "
        "not done"
        for count, done in finished.items()
    )
    raise CacheError(f"{directory} is not complete{f' ({missing})' if missing else ''}; {again}")
