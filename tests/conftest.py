"""Options and reports of the whole suite.

`--require-parity` turns every skipped parity test into a failure: continuous integration must not
pass because torch or the reference data was missing.
"""

import dataclasses

import hypothesis
import numpy as np
import pytest

# How long an example takes is no property of ours, and depends on what else the machine does.
hypothesis.settings.register_profile("kontext_jax", deadline=None)
hypothesis.settings.load_profile("kontext_jax")


def pytest_addoption(parser):
    parser.addoption(
        "--require-parity",
        action="store_true",
        help="fail instead of skipping a parity test whose references are missing",
    )
    parser.addoption(
        "--parity-seed",
        type=int,
        help="seed of the randomly drawn parity tests; the default is drawn, and printed",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    is_parity = item.get_closest_marker("parity") is not None
    if report.skipped and is_parity and item.config.getoption("--require-parity"):
        reason = call.excinfo.value if call.excinfo else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"--require-parity, but this test was skipped: {reason}"
    return report


@pytest.fixture
def quick_programs(tmp_path, monkeypatch):
    """Commands compile programs that run for milliseconds, and keep them in a folder of the test.

    JAX's settings are afterwards what they were.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from kontext_jax.runtime.programs import CACHE_VARIABLE

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_disable_most_optimizations",
    )
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "compiled"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@dataclasses.dataclass
class Comparisons:
    """What the parity tests measured, printed at the end of the run."""

    pictures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    tensors: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add_picture(
        self, name: str, ours: np.ndarray, theirs: np.ndarray, our_bytes, their_bytes
    ) -> None:
        """Notes the differences of two pictures: values in [0, 1], and the bytes made of them."""
        difference = np.abs(np.asarray(ours, np.float64) - theirs) * 255
        levels = np.abs(np.asarray(our_bytes, np.int16) - their_bytes)
        figures = (
            f"{theirs.size:8d} {difference.max():10.5f} {difference.mean():10.6f} "
            f"{np.count_nonzero(levels):10d} {levels.max():6d}"
        )
        self.pictures.append((name, figures))

    def add_tensor(self, case: str, output: str, share: float) -> None:
        """Notes which share of its tolerance an output used; keeps the largest of a case."""
        if share >= self.tensors.get(case, (-1.0, ""))[0]:
            self.tensors[case] = (share, output)

    def merge(self, other: "Comparisons") -> None:
        """Takes over what another process measured."""
        self.pictures.extend(other.pictures)
        for case, (share, output) in other.tensors.items():
            self.add_tensor(case, output, share)
        self.notes.extend(other.notes)


_COMPARISONS = pytest.StashKey[Comparisons]()


@pytest.fixture(scope="session")
def comparisons(pytestconfig) -> Comparisons:
    """Collects figures for the tables at the end of the run."""
    return pytestconfig.stash.setdefault(_COMPARISONS, Comparisons())


def pytest_sessionfinish(session):
    """In a worker process: hands its figures to the process that prints."""
    if hasattr(session.config, "workeroutput") and _COMPARISONS in session.config.stash:
        measured = dataclasses.asdict(session.config.stash[_COMPARISONS])
        session.config.workeroutput["comparisons"] = measured


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    theirs = getattr(node, "workeroutput", {}).get("comparisons")
    if theirs:
        node.config.stash.setdefault(_COMPARISONS, Comparisons()).merge(Comparisons(**theirs))


def pytest_terminal_summary(terminalreporter, config):
    measured = config.stash.get(_COMPARISONS, None)
    if measured is None:
        return
    write = terminalreporter.write_line
    if measured.tensors:
        terminalreporter.section("largest share of the tolerance used")
        for case, (share, output) in sorted(measured.tensors.items()):
            write(f"{case:<52} {share:7.3f}  {output}")
    if measured.pictures:
        terminalreporter.section("pictures: difference to the reference in 1/255")
        write(f"{'':<56} {'values':>8} {'max':>10} {'mean':>10} {'bytes off':>10} {'by':>6}")
        for name, figures in sorted(measured.pictures):
            write(f"{name:<56} {figures}")
    for note in measured.notes:
        write(note)
