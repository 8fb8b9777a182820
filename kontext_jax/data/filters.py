"""Filters: code of the user's that sees a sample and keeps or drops it.

The paper filters its data by classifiers. Either a function in Python,

    def keep(image, text, metadata):        # package.module:keep
        return True                         # or False, or (False, "watermark")

with the target as uint8 [height, width, 3], the text, and a dict of "id", "contexts" (the
references likewise) and the sample's other columns. Or a command, started once, that reads one JSON
object a line and answers each with one line:

    {"id": …, "text": …, "image": base64 of the file, "contexts": [base64 …], "metadata": {…}}
    {"id": …, "keep": false, "reason": "watermark"}

Decisions are made while the index is built and kept in it, so the order of training does not depend
on the filter being asked again. A filter that fails stops the run.
"""

import base64
import hashlib
import importlib
import inspect
import json
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kontext_jax.data.sources.examples import Example, digest


class FilterError(RuntimeError):
    """The filter itself failed, or answered something else than asked."""


class Filter(Protocol):
    """What the index asks of a filter; called from several threads."""

    def identity(self) -> str:
        """Changes when decisions may."""

    def __call__(
        self, example: Example, files: Sequence[bytes], pixels: Sequence[np.ndarray]
    ) -> str | None:
        """Why the example is dropped, or None to keep it; target first, then references.

        Raises:
          FilterError: no decision.
        """

    def close(self) -> None: ...


def make_filter(function: str, command: str) -> Filter | None:
    """The filter that the config names, or None.

    Raises:
      ValueError: there is no such function or command.
    """
    if function:
        return FunctionFilter(function)
    return CommandFilter(command) if command else None


class FunctionFilter:
    """Asks a function given as `package.module:function`, one sample at a time."""

    def __init__(self, name: str):
        self._name = name
        self._lock = threading.Lock()
        module, _, function = name.partition(":")
        try:
            self._function: Callable[..., Any] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"data.filter_function {name} cannot be imported: {error}; expected "
                "package.module:function, importable from here"
            ) from error

    def identity(self) -> str:
        source = inspect.getsourcefile(self._function)
        content = Path(source).read_bytes() if source else b""
        return digest(self._name, hashlib.sha256(content).hexdigest())

    def __call__(
        self, example: Example, files: Sequence[bytes], pixels: Sequence[np.ndarray]
    ) -> str | None:
        metadata = {**example.metadata, "id": example.id, "contexts": tuple(pixels[1:])}
        try:
            with self._lock:
                answer = self._function(pixels[0], example.text, metadata)
        except Exception as error:
            raise FilterError(
                f"data.filter_function {self._name} failed at sample {example.id}: {error!r}"
            ) from error
        keep, reason = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, "")
        if not isinstance(keep, bool | np.bool_) or not isinstance(reason, str):
            raise FilterError(
                f"data.filter_function {self._name} returned {answer!r} for sample {example.id}; "
                "expected a bool, or (bool, reason)"
            )
        return None if keep else reason or "dropped"

    def close(self) -> None:
        pass


class CommandFilter:
    """Asks a command over its standard input and output, one sample at a time."""

    def __init__(self, command: str):
        self._command = command
        self._lock = threading.Lock()
        self._failure: FilterError | None = None
        try:
            self._process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"data.filter_command {command} cannot be run: {error}") from error

    def identity(self) -> str:
        return digest(self._command)

    def __call__(
        self, example: Example, files: Sequence[bytes], pixels: Sequence[np.ndarray]
    ) -> str | None:
        encoded = [base64.b64encode(file).decode() for file in files]
        request = {
            "id": example.id,
            "text": example.text,
            "image": encoded[0],
            "contexts": encoded[1:],
            "metadata": dict(example.metadata),
        }
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._lock:
            if self._failure is None:
                try:
                    return self._ask(example.id, line)
                except FilterError as error:
                    self._failure = error
            raise self._failure  # the first one, whichever thread comes next

    def _ask(self, sample: str, line: bytes) -> str | None:
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            raise FilterError(
                f"data.filter_command {self._command} ended with exit status "
                f"{self._process.wait()} at sample {sample}"
            )
        try:
            fields = json.loads(answer)
            keep, reason = fields["keep"], fields.get("reason", "")
            if fields["id"] != sample or not isinstance(keep, bool):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FilterError(
                f"data.filter_command {self._command} answered {answer[:200]!r} to sample "
                f'{sample}; expected {{"id": "{sample}", "keep": true or false}}'
            ) from None
        return None if keep else str(reason) or "dropped"

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
