"""The folder of one checkpoint: what lies in it, and whether it is as it was written.

    STEP/arrays/{params, ema_params, opt_state, rest}/    by array_store
    STEP/data_state.json, config.json
    STEP/manifest.json                                    written last

The manifest lists every other file with its size and CRC-32, and the versions of JAX and others
that wrote it. A folder without one was never finished and is no checkpoint.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping

from etils import epath

from kontext_jax.runtime.atomic import is_local
from kontext_jax.runtime.versions import versions
from kontext_jax.storage import checksums

FORMAT = 1
CHECKPOINTS = "checkpoints"  # RUN/checkpoints/STEP
MANIFEST, ARRAYS, DATA_STATE, CONFIG = "manifest.json", "arrays", "data_state.json", "config.json"
MADE_WITH = ("jax", "jaxlib", "flax", "numpy")  # packages that decide the last bits of a step


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read."""


def list_steps(directory: epath.PathLike) -> tuple[list[int], list[int]]:
    """Steps in `directory` that were finished, and that were not, ascending; files go unchecked."""
    directory = epath.Path(directory)
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    finished, unfinished = [], []
    for step in sorted(int(name) for name in names if name.isdecimal()):
        is_finished = (directory / str(step) / MANIFEST).exists()
        (finished if is_finished else unfinished).append(step)
    return finished, unfinished


def read_manifest(folder: epath.Path) -> checksums.Records:
    """What the files of a finished checkpoint must be.

    Raises:
      CheckpointError: the manifest itself is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["format"]
        files = {
            str(name): (int(size), None if checksum is None else int(checksum, 16))
            for name, (size, checksum) in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: not a manifest: {error!r}") from None
    if version != FORMAT:
        raise CheckpointError(f"{MANIFEST}: format {version!r}, expected {FORMAT}")
    return files


def find_damage(
    folder: epath.Path, items: Iterable[str] | None = None, check_contents: bool = True
) -> list[str]:
    """One line for everything about a finished checkpoint that is not as it was written.

    Args:
      folder: folder of one step.
      items: look only at these items of the arrays, and at the small files; None: at everything.
      check_contents: whether to read the files rather than only their sizes.
    """
    try:
        files = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    if items is not None:
        inside = tuple(f"{ARRAYS}/{item}/" for item in items)
        files = {
            name: entry
            for name, entry in files.items()
            if name.startswith(inside) or name.count("/") < 2
        }
    return checksums.find_damage(folder, files, check_contents)


def as_json(files: checksums.Records) -> dict[str, list]:
    """Records as JSON stores them."""
    return {
        name: [size, None if checksum is None else f"{checksum:08x}"]
        for name, (size, checksum) in files.items()
    }


def manifest_json(step: int, files: Mapping[str, list]) -> str:
    """The text of a manifest, from what `as_json` gave."""
    manifest = {"format": FORMAT, "step": step, "made_with": made_with()}
    return json.dumps(manifest | {"files": dict(sorted(files.items()))}, indent=1)


def made_with() -> dict[str, str]:
    """Versions of the packages that decide the last bits of a step."""
    return {name: version for name, version in versions(MADE_WITH).items() if name in MADE_WITH}


def version_difference(folder: epath.Path) -> str:
    """What a checkpoint was made with and what is here instead; "" if nothing is known to differ.

    Checkpoints of before versions were noted have none to compare.
    """
    now = made_with()
    then = json.loads((folder / MANIFEST).read_text()).get("made_with", now)
    names = [name for name in MADE_WITH if then.get(name) != now.get(name)]
    if not names:
        return ""
    was, here = (", ".join(f"{name} {found.get(name)}" for name in names) for found in (then, now))
    return (
        f"{folder.name} was made with {was}; here are {here}: the next loss should be the same, "
        "later steps may differ by about 1e-7 of their values"
    )


def absolute(path: epath.PathLike) -> epath.Path:
    """The path, from the root where it is local."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def remove(folder: epath.Path) -> None:
    """Removes a folder, or as much of it as can be."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.rmtree()
