"""Compiles programs, and keeps what the compiler said: an interrupted sweep goes on where it was.

    CACHE/KEY.json.gz      sizes, seconds, text of the compiled program, or why it did not compile
    CACHE/asked/KEY        the same program, found without tracing it again

A program's key is over its text as JAX lowers it, the devices, the compiler's options and versions;
that of a question is over everything it was asked with and the sources of this package.
"""

import dataclasses
import gzip
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kontext_jax.plan.programs import Planned
from kontext_jax.plan.targets import Target
from kontext_jax.runtime import compiler_options
from kontext_jax.runtime.atomic import write_bytes
from kontext_jax.runtime.programs import default_cache_dir
from kontext_jax.runtime.versions import source_hash
from kontext_jax.runtime.versions import versions as versions_of

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) (hbm|vmem|smem)", re.I)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program on one device.

    Attributes:
      error: why there is no program; then the rest is empty but for `needed_bytes`, if it says.
      needed_bytes: size of what did not fit.
      text: text of the program, without the bodies of its kernels.
      from_cache: it was not compiled now.
    """

    argument_bytes: int = 0
    temporary_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    seconds: float = 0.0
    text: str = ""
    error: str = ""
    needed_bytes: float = 0.0
    from_cache: bool = False


def versions() -> dict[str, str]:
    """Versions of the packages that affect a compiled program, and of this package's source."""
    return versions_of(PACKAGES) | {"kontext_jax": source_hash()[:12]}


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Cache:
    """Compiled programs on disk.

    Args:
      folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def read(self, key: str) -> Compiled | None:
        if self._folder is None:
            return None
        try:
            with gzip.open(self._folder / f"{key}.json.gz", "rt") as file:
                return Compiled(**json.load(file), from_cache=True)
        except (OSError, EOFError, ValueError, TypeError):
            return None  # not there, or not whole: it is made again

    def write(self, key: str, compiled: Compiled) -> None:
        if self._folder is None:
            return
        values = dataclasses.asdict(compiled)
        del values["from_cache"]
        self._replace(f"{key}.json.gz", gzip.compress(json.dumps(values).encode()))

    def asked(self, question: str) -> str | None:
        """The key of the program that a question led to before."""
        try:
            return (self._folder / "asked" / question).read_text() if self._folder else None
        except OSError:
            return None

    def remember(self, question: str, key: str) -> None:
        if self._folder is not None:
            self._replace(f"asked/{question}", key.encode())

    def _replace(self, name: str, contents: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, contents)


def default_cache() -> Cache:
    return Cache(default_cache_dir() / "plan")


def compile_program(
    planned: Planned,
    target: Target,
    cache: Cache,
    question: Any = None,
) -> Compiled:
    """What the compiler says of a program, compiled now or before.

    Args:
      question: what the program was made from, in JSON's types, to find it without tracing it.
    """
    options = compiler_options.options(target.chip.platform, planned.purpose, target.chip.name)
    asked = question and _key(question, target.name, options, versions())
    if asked and (key := cache.asked(asked)) and (found := cache.read(key)):
        return found
    start = time.perf_counter()
    try:
        lowered = planned.program.lower()
    except NotImplementedError as error:
        return Compiled(error=str(error))
    compilers = {name: v for name, v in versions().items() if name in PACKAGES}
    key = _key(lowered.as_text(), target.name, dict(planned.mesh.shape), options, compilers)
    found = cache.read(key)
    if found is None:
        found = _compile(lowered.compile, options, start)
        cache.write(key, found)
    if asked:
        cache.remember(asked, key)
    return found


def _compile(compile_with: Callable, options: dict[str, Any], start: float) -> Compiled:
    try:
        compiled = compile_with(compiler_options=options)
    except Exception as error:
        message = str(error)
        used = _OUT_OF_MEMORY.search(message)
        if "RESOURCE_EXHAUSTED" not in message and used is None:
            raise
        needed = float(used[1]) * _UNITS[used[2].upper()] if used else 0.0
        text = used[0] if used else message.split("\n")[0]
        is_hbm = used is None or used[5].lower() == "hbm"
        return Compiled(
            seconds=time.perf_counter() - start, error=text, needed_bytes=needed * is_hbm
        )
    memory = compiled.memory_analysis()
    text = re.sub(r'("body":)"[^"]*"', r'\1""', compiled.as_text())
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        time.perf_counter() - start,
        text,
    )
