"""Programs as values, and executors that run or only compile them, once each and timed apart."""

import collections
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from kontext_jax.runtime.program_files import ExecutableFiles, KeptProgram
from kontext_jax.runtime.sharding import activation_rules

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


def precision_of(dtype: Any) -> str | None:
    """Precision of the matrix products of a run that computes in `dtype`.

    float32 means float32: left alone, accelerators round the inputs of its products.
    """
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def precise(dtype: Any) -> contextlib.AbstractContextManager:
    """Context in which functions are traced with the precision of `precision_of(dtype)`."""
    return jax.default_matmul_precision(precision_of(dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function for arguments of certain shapes, with all that decides what it is compiled to.

    Whoever knows the function makes its Program: a stage of sampling, the step of training. An
    executor decides what becomes of it:

        program = Program("double", lambda: lambda x: 2 * x, (x,))
        Executables(timings).get(program)(x)                # compiles it once and runs it
        CompileOnly(Executables(timings)).get(program)(x)   # compiles it; the result is zeros
        program.lower()                                     # for a compiler elsewhere: plan/measure

    Attributes:
      key: name of the function, or a tuple that begins with it, and all that the function closes
        over: equal keys mean equal functions.
      make: gives the function; it is called when the program is traced.
      args: arrays, or shapes with shardings, of the function's arguments.
      out_shardings: shardings of the results, or a function from the shapes of the results to
        those; None leaves them to the compiler.
      donate_argnums: arguments whose memory the results may take, see `jax.jit`.
      precision: precision of float32 products, see `precision_of`.
      mesh: mesh over which activations are split while the function is traced; None for one
        device.
    """

    key: Hashable
    make: Callable[[], Callable]
    args: tuple[Any, ...]
    out_shardings: Any = None
    donate_argnums: int | tuple[int, ...] = ()
    precision: str | None = None
    mesh: Mesh | None = None

    @property
    def name(self) -> str:
        return self.key[0] if isinstance(self.key, tuple) else str(self.key)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Context in which the function has to be traced."""
        rules = contextlib.nullcontext() if self.mesh is None else activation_rules(self.mesh)
        with rules, jax.default_matmul_precision(self.precision):
            yield

    def result_shapes(self) -> Any:
        """Shapes of the results, found by tracing the function."""
        with self.tracing():
            return jax.eval_shape(self.make(), *self.args)

    def lower(self, *, keep_unused: bool = False) -> jax.stages.Lowered:
        """The program as JAX lowers it.

        Args:
          keep_unused: keep arguments that the function does not read, see `jax.jit`.
        """
        options: dict[str, Any] = {"donate_argnums": self.donate_argnums}
        if keep_unused:
            options["keep_unused"] = True
        if self.out_shardings is not None:
            where = self.out_shardings
            options["out_shardings"] = where(self.result_shapes()) if callable(where) else where
        with self.tracing():
            return jax.jit(self.make(), **options).lower(*self.args)


class Executor(Protocol):
    """Decides what becomes of a program.

    Attributes:
      computes: whether the results are computed; otherwise arrays of their shapes stand for them.
    """

    computes: bool

    def get(self, program: Program) -> Callable:
        """A function of the program's arguments that gives its results, or what stands for them."""


OnCompiled = Callable[[Hashable, Any, float], None]
"""`on_compiled(key, compiled, seconds)`, called for each program that was made."""


class Executables:
    """The executor that runs programs: each is compiled ahead of time, once.

    Args:
      timings: measures the stage "compile".
      on_compiled: called for each program that was made.
      compiler_options: options for XLA, see `kontext_jax.runtime.compiler_options`.
      files: folder of programs that are kept; it takes those that donate nothing and leave the
        shardings of their results to the compiler. None keeps nothing.
    """

    computes = True

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

    def get(self, program: Program) -> Callable:
        """The compiled program; its call takes arguments of the program's shapes alone."""
        leaves, tree = jax.tree.flatten(program.args)
        shapes = tuple((jnp.shape(x), _dtype(x)) for x in leaves)
        full_key = (program.key, program.precision, tree, shapes)
        if full_key not in self._compiled:
            start = time.perf_counter()
            with self._timings.measure("compile"):
                if self._files is not None and _can_be_kept(program):
                    compiled = self._kept(self._files, program)
                else:
                    compiled = self._compile(program.lower())
            self._compiled[full_key] = compiled
            if self._on_compiled is not None:
                self._on_compiled(program.key, compiled, time.perf_counter() - start)
        return self._compiled[full_key]

    def _kept(self, files: ExecutableFiles, program: Program) -> Callable:
        """The program from its file, or made and kept."""
        with program.tracing():  # the facts name the precision
            facts = files.facts(program.key, program.args, self._compiler_options)
        compiled = files.load(facts)
        if compiled is None:
            with _really_compiling():
                compiled = self._compile(program.lower(keep_unused=True))
            files.save(facts, compiled)
            # Reload it, so that the first run uses a KeptProgram as later ones do.
            compiled = files.load(facts) or compiled
        return compiled

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        return lowered.compile(compiler_options=self._compiler_options)


def _can_be_kept(program: Program) -> bool:
    return program.out_shardings is None and program.donate_argnums == ()


class CompileOnly:
    """The executor that compiles, and computes nothing: results are zeros.

    Arguments may be shapes with shardings in place of arrays.

    Args:
      executables: compile the programs, and keep them on disk if they do so.
    """

    computes = False

    def __init__(self, executables: Executables):
        self._executables = executables

    def get(self, program: Program) -> Callable:
        compiled = self._executables.get(program)
        where = program.out_shardings
        # Programs made from results on a device differ from those made from results anywhere.
        where = compiled.device if isinstance(compiled, KeptProgram) else where

        def zeros(*args: Any) -> Any:
            results = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), compiled.out_info)
            return jax.device_put(results, where(results) if callable(where) else where)

        return zeros


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
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
