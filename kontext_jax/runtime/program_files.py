"""Compiled programs in files of our own: loaded again without being traced, lowered or compiled.

    first line   JSON: what the program was made from and for, the tree of its results, the hash
                 of the rest
    the rest     the executable, as this platform's runtime serializes it

A file is named by the hash of everything a program depends on (`ExecutableFiles.facts`): the
function's name with all it closes over, the shapes of its arguments, the source of this package,
versions, device, compiler options. Whatever differs makes another name, so that nothing old is ever
run; a file that is damaged or not what its name says is refused, and the program made anew.

Nothing is unpickled. But an executable is machine code: whoever can write these files can make
this user run anything, as with JAX's own cache of compiled programs. So the folder has to belong to
the user and be writable by nobody else; never copy such files from others.

Programs of one device only, without donated arguments.

What it buys: a start of `kontext edit` with the small model in 1.8 s in place of 6.7 s, since JAX's
own cache saves compiling alone, and tracing and lowering take the rest. It stands on parts of JAX
that are not public (`runtime_executable`, `serialize_executable`, `DeviceList`); a version that
lacks them makes programs anew, and says so. Delete this file, and `files` in `programs.Executables`
with it, once JAX's cache spares tracing, or once its exported programs load as fast.
"""

import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kontext_jax.runtime.atomic import write_bytes
from kontext_jax.runtime.versions import source_hash, versions

FORMAT = 1
MOST_FILES = 500  # the oldest go first
_CONFIG = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_threefry_partitionable",
)
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


class ExecutableFiles:
    """A folder of programs.

    Args:
      directory: made if it is not there.
      result_types: classes of named tuples that may occur in results of programs.
      tell: called with a line for the user where a file cannot be used or kept.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        result_types: Sequence[type] = (),
        tell: Callable[[str], None] = lambda line: None,
    ):
        self._directory = Path(directory)
        self._types = {kind.__name__: kind for kind in result_types}
        self._tell = tell
        self._usable = True
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self._directory.stat()
        except OSError as error:
            self._give_up(f"{self._directory} cannot be used: {error.strerror or error}")
            return
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            self._give_up(
                f"others can write to {self._directory}, and could make you run anything; give it "
                "to yourself alone: chmod go-w"
            )

    def facts(self, key: Any, args: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the program `key` for arguments like `args` depends on, for JSON.

        Args:
          key: names the function with all that it closes over, by its repr.
          options: options of XLA.

        Raises:
          ValueError: the repr of `key` is another in every process.
        """
        name = repr(key)
        if " at 0x" in name:
            raise ValueError(f"a program cannot be kept by the name {name}, which has an address")
        leaves, tree = jax.tree.flatten(args)
        device = jax.devices()[0]
        return {
            "format": FORMAT,
            "key": name,
            "arguments": str(tree),
            "shapes": [_shape(x) for x in leaves],
            "options": {name: str(value) for name, value in sorted(options.items())},
            "config": {name: _setting(name) for name in _CONFIG},
            "environment": {name: os.environ.get(name, "") for name in _ENVIRONMENT},
            "device": [device.platform, device.device_kind, device.client.platform_version],
            "processor": _processor() if device.platform == "cpu" else "",
            "versions": versions(_PACKAGES),
            "source": source_hash(),
        }

    def load(self, facts: Mapping[str, Any]) -> Callable | None:
        """The program of these facts, or None if there is none that can be used."""
        path = self._path(facts)
        if not self._usable or not path.exists():
            return None
        try:
            header, _, payload = path.read_bytes().partition(b"\n")
            stored = json.loads(header)
            if hashlib.sha256(payload).hexdigest() != stored["sha256"]:
                raise ValueError("it is not what was written")
            if stored["facts"] != facts:
                raise ValueError("it holds another program than its name says")
            results = self._decode(stored["results"])
            shapes = [jax.ShapeDtypeStruct(*x) for x in stored["result_shapes"]]
            client = jax.devices()[0].client
            loaded = client.deserialize_executable(payload, executable_devices=_devices())
        except Exception as error:  # runtimes raise what they like
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self._tell(f"the kept program {path} cannot be used ({first}); it is made anew")
            return None
        os.utime(path)
        out_info = jax.tree.map(lambda i: shapes[i], results)
        return KeptProgram(loaded, facts["shapes"], results, out_info)

    def save(self, facts: Mapping[str, Any], compiled: jax.stages.Compiled) -> None:
        """Keeps a program that was compiled with `keep_unused=True`."""
        if not self._usable:
            return
        loaded = compiled.runtime_executable()
        num_results = compiled.out_tree.num_leaves
        results = self._encode(jax.tree.unflatten(compiled.out_tree, range(num_results)))
        try:
            payload = bytes(jax.devices()[0].client.serialize_executable(loaded))
        except Exception as error:  # runtimes raise what they like
            self._give_up(f"this platform's programs cannot be kept: {str(error).splitlines()[0]}")
            return
        header = {
            "facts": facts,
            "results": results,
            "result_shapes": [_shape(x) for x in jax.tree.leaves(compiled.out_info)],
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
        path = self._path(facts)
        try:
            write_bytes(path, json.dumps(header).encode() + b"\n" + payload)
            files = sorted(self._directory.glob("*.program"), key=lambda p: p.stat().st_mtime)
            for old in files[:-MOST_FILES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(f"programs cannot be kept in {self._directory}: {error.strerror}")

    def _path(self, facts: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._directory / f"{digest[:40]}.program"

    def _give_up(self, why: str) -> None:
        self._usable = False
        self._tell(f"programs are traced anew at every start: {why}")

    def _encode(self, tree: Any) -> Any:
        """A tree of results, whose leaves are their numbers, for JSON."""
        if tree is None or isinstance(tree, int):
            return tree
        if isinstance(tree, tuple) and type(tree).__name__ in self._types:
            return {type(tree).__name__: [self._encode(x) for x in tree]}
        if type(tree) is tuple:
            return {"tuple": [self._encode(x) for x in tree]}
        raise TypeError(f"results of a kept program are arrays, None and tuples; found {tree!r}")

    def _decode(self, tree: Any) -> Any:
        if tree is None or isinstance(tree, int):
            return tree
        ((name, parts),) = tree.items()
        parts = [self._decode(x) for x in parts]
        return tuple(parts) if name == "tuple" else self._types[name](*parts)


class KeptProgram:
    """An executable that takes and returns trees of arrays, as `jax.stages.Compiled` does.

    Its results are committed to its device, as those of a compiled function are not: programs made
    from them later are others then.
    """

    def __init__(self, loaded: Any, shapes: list, results: Any, out_info: Any):
        self._loaded, self._shapes, self._results = loaded, shapes, results
        self.out_info = out_info  # shapes and dtypes of its results
        self.device = jax.devices()[0]

    def __call__(self, *args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        found = [_shape(x) for x in leaves]
        if found != self._shapes:
            raise TypeError(f"the program takes arrays {self._shapes}, found {found}")
        leaves = [x if isinstance(x, jax.Array) else jax.device_put(x) for x in leaves]
        done = self._loaded.execute_sharded(leaves).disassemble_into_single_device_arrays()
        return jax.tree.map(lambda i: done[i][0], self._results)


def _shape(x: Any) -> list:
    """Shape and dtype, for JSON."""
    return [list(np.shape(x)), str(x.dtype if hasattr(x, "dtype") else jax.numpy.result_type(x))]


def _setting(name: str) -> str:
    """Of JAX, as it is in this context; some are only known by `values`."""
    return str(getattr(jax.config, name, jax.config.values[name]))


def _devices() -> Any:
    from jaxlib.xla_client import DeviceList

    return DeviceList((jax.devices()[0],))


@functools.cache
def _processor() -> str:
    """What the CPU can do: its machine code is made for that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
