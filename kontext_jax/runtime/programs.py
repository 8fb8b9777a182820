"""Programs compiled once: kept on disk between runs, in memory within one, and timed apart."""

import collections
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental.compilation_cache import compilation_cache

from kontext_jax.runtime.program_files import ExecutableFiles

CACHE_VARIABLE = "KONTEXT_JAX_CACHE"


def default_cache_dir() -> Path:
    """$KONTEXT_JAX_CACHE, or compiled/ in this platform's folder for caches."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kontext_jax" / "compiled"


def keep_compiled_programs(directory: str | os.PathLike) -> Path:
    """Makes JAX keep every compiled program in `directory` and look there first.

    Raises:
      ValueError: the directory cannot be written.
    """
    directory = Path(directory).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"compiled programs cannot be kept in {directory}: {error.strerror or error}; set "
            f"{CACHE_VARIABLE} to another folder, or use --no-cache"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # The default keeps only what took a second; a run here is made of several shorter ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


class Timings:
    """Wall time in seconds by stage, summed over a run."""

    def __init__(self):
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def table(self) -> str:
        """One line a stage and their sum, in the order in which they first ran."""
        rows = [*self.seconds.items(), ("total", sum(self.seconds.values()))]
        width = max(len(stage) for stage, _ in rows)
        return "\n".join(f"  {stage:<{width}}  {seconds:8.2f} s" for stage, seconds in rows)


class Clock(Protocol):
    """What times a stage."""

    def measure(self, stage: str) -> contextlib.AbstractContextManager[None]: ...


OnCompiled = Callable[[Hashable, Any, float], None]
"""`on_compiled(key, compiled, seconds)`, called for each program that was made."""


class Executables:
    """Functions compiled ahead of time, one program for each set of shapes.

    Args:
      compiler_options: for XLA, see `kontext_jax.compiler_options`.
      files: where programs are kept and looked for, if they donate nothing and nothing is said of
        their results' shardings; None for nowhere.
    """

    def __init__(
        self,
        timings: Clock,
        on_compiled: OnCompiled | None = None,
        compiler_options: Mapping[str, bool | int | str] | None = None,
        files: ExecutableFiles | None = None,
    ):
        self._timings = timings
        self._files = files
        self._on_compiled = on_compiled
        self._compiler_options = dict(compiler_options or {})
        self._compiled: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def get(
        self,
        key: Hashable,
        make: Callable[[], Callable],
        *args: Any,
        out_shardings: Callable[[Callable], Any] | None = None,
        donate_argnums: int | tuple[int, ...] = (),
    ) -> Callable:
        """The program of `make()` for arguments like `args`, whose call takes just such arguments.

        Args:
          key: names the function with all that it closes over: equal keys, equal functions.
          out_shardings: function → where its results go; asked once, before compiling.
          donate_argnums: see `jax.jit`.
        """
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((jax.numpy.shape(x), _dtype(x)) for x in leaves)
        full_key = (key, tree, shapes)
        if full_key not in self._compiled:
            start = time.perf_counter()
            with self._timings.measure("compile"):
                if self._files is not None and out_shardings is None and donate_argnums == ():
                    compiled = self._kept(self._files, key, make, *args)
                else:
                    function, options = make(), {"donate_argnums": donate_argnums}
                    if out_shardings is not None:
                        options["out_shardings"] = out_shardings(function)
                    compiled = self._compile(function, options, args)
            self._compiled[full_key] = compiled
            if self._on_compiled is not None:
                self._on_compiled(key, compiled, time.perf_counter() - start)
        return self._compiled[full_key]

    def _kept(self, files: ExecutableFiles, key, make, *args) -> Callable:
        """The program from its file, or made and kept."""
        facts = files.facts(key, args, self._compiler_options)
        compiled = files.load(facts)
        if compiled is None:
            with _really_compiling():
                compiled = self._compile(make(), {"keep_unused": True}, args)
            files.save(facts, compiled)
            # The same kind of program at the first start as at the next ones.
            compiled = files.load(facts) or compiled
        return compiled

    def _compile(self, function: Callable, options: dict[str, Any], args) -> jax.stages.Compiled:
        lowered = jax.jit(function, **options).lower(*args)
        return lowered.compile(compiler_options=self._compiler_options)


@contextlib.contextmanager
def _really_compiling() -> Iterator[None]:
    """Without JAX's cache of programs.

    XLA for CPUs serializes what it compiled, but only a part of what it deserialized: a program
    out of that cache would be kept without some of its functions, and fail when it runs.
    """
    was_enabled = jax.config.jax_enable_compilation_cache
    compilation_cache.reset_cache()  # or the setting is not read again
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_enabled)
        compilation_cache.reset_cache()


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jax.numpy.result_type(x)
