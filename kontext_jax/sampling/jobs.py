"""Jobs files: one request a line, as JSON."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kontext_jax.sampling.output import check_outputs, make_pictures, one_line
from kontext_jax.sampling.pipeline import (
    Pipeline,
)
from kontext_jax.sampling.requests import (
    SampleRequest,
    prepare,
    request_from_dict,
)
from kontext_jax.terminal import Tell


@dataclasses.dataclass(frozen=True)
class Job:
    """One of several requests: a line of a jobs file, or a picture of a folder."""

    line: int  # from 1; for pictures their number
    output: str  # file name, within the output folder
    request: SampleRequest | None = None
    error: str | None = None  # what is wrong with the line, instead of a request
    name: str | None = None  # the picture's

    @property
    def label(self) -> str:
        return self.name or f"line {self.line}"

    def about(self, text: str) -> str:
        """A text for the user that says which job it is about."""
        return text if self.name and self.name in text else f"{self.label}: {text}"


def read_jobs(path: str | os.PathLike) -> list[Job]:
    """Reads a file of one JSON object a line: the fields of a request, and "output" if wanted.

    A line that is wrong becomes a Job with `error`; blank lines are skipped.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no text, or has no lines.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"jobs {path} is no UTF-8 text: {error}") from error
    jobs: list[Job] = []
    taken: set[str] = set()
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        output = f"{path.stem}-{number}.png"
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError(f"found {type(values).__name__}, expected an object {{…}}")
            output = _job_output(values.pop("output", output), taken)
            jobs.append(Job(number, output, request_from_dict(values)))
        except ValueError as error:
            jobs.append(Job(number, output, error=str(error)))
        taken.add(output)
    if not jobs:
        raise ValueError(f"jobs {path} has no lines; expected one JSON object a line")
    return jobs


def _job_output(name: Any, taken: set[str]) -> str:
    if not isinstance(name, str) or not name.lower().endswith(".png"):
        raise ValueError(f"output is {name!r}; expected a file name ending in .png")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"output {name!r} leaves the output folder; give a name inside of it")
    if name in taken:
        raise ValueError(f"output {name!r} is taken by an earlier line; give another name")
    return name


def run_jobs(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    folder: Path,
    output_folder: Path,
    *,
    tell: Tell,
    tell_error: Tell,
    progress: bool = False,
) -> int:
    """Makes the pictures of several requests; the number of jobs that failed.

    Args:
      folder: the folder to which names of images are relative.
    """
    failed: set[int] = set()
    prepared, bases, made = [], [], []
    taken: dict[Path, Job] = {}

    def fail(job: Job, error: BaseException) -> None:
        failed.add(job.line)
        tell_error(job.about(one_line(error)))

    for job in jobs:
        try:
            if job.error is not None:
                raise ValueError(job.error)
            base = output_folder / job.output
            paths = check_outputs(base, job.request, folder)
            if clash := next((path for path in paths if path in taken), None):
                raise ValueError(f"output {clash} is also written by {taken[clash].label}")
            request = prepare(job.request, pipeline.preset, folder)
        except (ValueError, OSError) as error:
            fail(job, error)
            continue
        taken |= dict.fromkeys(paths, job)
        for line in (*request.lines(), request.sampling_line()):
            tell(job.about(line))
        prepared.append(request)
        bases.append(base)
        made.append(job)
    if prepared:
        failures = make_pictures(pipeline, prepared, bases, tell=tell, progress=progress)
        for index, error in failures.items():
            fail(made[index], error)
    return len(failed)
