"""`python -m kontext_jax.plan`: flags, targets, reports and sweeps; a TPU's where libtpu is."""

import dataclasses
import importlib.util
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from tpu_program import TPU

from kontext_jax import charts
from kontext_jax.plan import __main__ as plan
from kontext_jax.plan import chart, commands, measure, programs, report, sampling, sweep, targets
from kontext_jax.runtime.chips import CHIPS
from kontext_jax.runtime.placement import mesh_config
from kontext_jax.runtime.programs import Program
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.terminal import load_config
from kontext_jax.training import config as train_config

V5P = CHIPS["v5p"]
GIB = 2**30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5p"], "give either --config FILE.py, to train, or --sample"),
        (["--topology", "v5p", "--config", "configs/tiny.py", "--sample"], "give either --config"),
        (["--topology", "v5p", "--sample", "--sweep"], "--sweep goes with --config"),
        (["--topology", "v5p", "--sample", "--config.seed=1"], "--config.seed goes with --config"),
        (["--topology", "v5p", "--config", "configs/tiny.py", "--steps", "4"], "--steps goes with"),
        (["--topology", "v5p", "--config", "configs/tiny.py", "--remats", "full"], "with --sweep"),
        (["--topology", "v5p", "--config", "configs/tine.py"], "did you mean configs/tiny.py?"),
        (["--topology", "v5q:4x4x4", "--sample"], "'v5q:4x4x4' is unknown (did you mean v5p?)"),
        (["--topology", "h100x12", "--sample", "--size", "100x100"], "not a multiple of 16"),
        (["--topology", "v5p", "--sample", "tinny"], "did you mean tiny?"),
        (["--topology", "v5p", "--sample", "--mesh", "tensr=2"], "expected sizes such as tensor=4"),
        (
            ["--topology", "h100", "--config", "configs/tiny.py", "--sweep", "--meshes", "data:2"],
            "--meshes data:2: found 'data:2'; expected sizes such as data=2,fsdp=32, of the axes",
        ),
        (["--topology", "v5p", "--sample", "--steps", "0"], "--steps is 0; expected at least 1"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_compiled(words, message, capsys):
    assert plan.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("v5p:4x4x4", "pip install 'jax[tpu]'"),
        ("h100x8", f"pip install --no-deps jax-cuda12-plugin=={jax.__version__}"),
    ],
)
def test_a_missing_compiler_is_an_error_that_says_what_to_install(name, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs") as raised:
        targets.find_target(name)
    assert command in str(raised.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("h100", "h100"), ("h100x8", "h100"), ("rtx4090", "rtx4090"), ("rtx4090x8", "rtx4090")],
)
def test_a_chip_may_have_an_x_in_its_name(name, kind, monkeypatch):
    monkeypatch.setattr(targets, "GPUS", ("h100", "rtx4090"))
    monkeypatch.setitem(targets.CHIPS, "rtx4090", dataclasses.replace(V5P, name="rtx4090"))
    monkeypatch.setattr(targets, "_gpu", lambda name, chip: (name, chip.name))
    assert targets.find_target(name) == (name, kind)


def test_a_config_needs_no_weights_to_be_planned():
    config = train_config.parse(load_config("configs/lora.py"))
    ready = programs.without_weights(config, "tpu")
    assert (ready.weights, ready.encoders) == ("untrained", "untrained")
    assert ready.attention_backend == "splash"
    assert programs.without_weights(config, "cuda").attention_backend != "splash"


def test_inputs_are_the_largest_of_a_config():
    def inputs(name):
        return programs.default_inputs(train_config.parse(load_config(f"configs/{name}.py")))

    assert inputs("kontext_joint") == ((1024, 1024), 1)
    assert inputs("t2i_pretrain") == ((1024, 1024), 0)
    assert inputs("tiny") == ((64, 64), 1)
    assert inputs("scenes_vae") == ((64, 64), 0)


def make_planned(flops=4e12, beside=("encoders",), **held) -> programs.Planned:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    return programs.Planned(
        *("a step", Program("step", lambda: lambda: None, ()), mesh, "train"),
        held=held or {"parameters": 2 * GIB, "encoders": GIB},
        beside=beside,
        flops=flops,
        images=8,
    )


def make_report(temporary=3 * GIB, error="", needed=0.0, planned=None) -> report.Report:
    target = targets.Target("v5p", V5P, tuple(jax.devices()[:1]), 1)
    compiled = measure.Compiled(2 * GIB, temporary, 5, 5, 60.0, TPU, error, needed)
    return report.make_report(planned or make_planned(), target, compiled)


def test_a_report_adds_up():
    found = make_report()
    assert found.peak_bytes == 2 * GIB + 3 * GIB + GIB  # with what lies beside the program
    assert found.fits
    assert not make_report(temporary=93 * GIB).fits
    assert sum(found.shares().values()) == pytest.approx(found.estimate.total_s)
    assert found.limit_s == pytest.approx(4e12 / 459e12)
    assert found.ratio == pytest.approx(found.estimate.compute_s / found.limit_s)
    assert found.images_per_s == pytest.approx(8 / found.estimate.total_s)
    as_json = json.loads(json.dumps(found.to_json()))
    assert as_json["mfu"] == pytest.approx(found.limit_s / found.estimate.total_s)
    assert as_json["shares_s"]["collectives"] == pytest.approx(found.estimate.exposed_s)


def test_arguments_that_a_program_does_not_read_are_in_memory_all_the_same():
    planned = make_planned(parameters=7 * GIB, encoders=GIB)  # of which it reads 2
    assert make_report(planned=planned).peak_bytes == 7 * GIB + 3 * GIB + GIB
    padded = make_report(planned=make_planned(parameters=GIB))
    assert padded.memory()["padding"] == GIB


def test_a_report_is_printed_with_its_verdict():
    console = Console(width=120, record=True, file=io.StringIO())
    report.print_report(console, make_report(), num_ops=2)
    failed = make_report(error="Used 98.3G of 95.7G hbm", needed=98.3 * GIB)
    report.print_report(console, failed, num_ops=2)
    report.print_report(console, make_report(error="Used 17M of 16M vmem"), num_ops=2)
    shown = console.export_text()
    assert "fits: 6.00 GiB of 95.00 GiB" in shown
    assert "attention (at peak)" in shown
    assert "all-reduce" in shown and "waited for" in shown
    assert "does not fit: Used 98.3G of 95.7G hbm" in shown
    assert "cannot be compiled: Used 17M of 16M vmem" in shown


def test_wrong_dtypes_of_collectives_are_found():
    assert commands.dtype_failures(make_report(), "bfloat16") == []
    gathered = TPU.replace("bf16[64,64]{1,0} all-gather", "f32[60000000]{0} all-gather")
    wrong = dataclasses.replace(make_report(), estimate=report.hlo_cost.estimate(gathered, "v5p"))
    assert commands.dtype_failures(wrong, "bfloat16") == [
        "0.45 GiB of all-gather in f32, expected bf16"
    ]


class FakeLowered:
    """Compiles like JAX, or fails like a TPU's compiler."""

    calls = 0

    def __init__(self, text: str, error: str = ""):
        self._text, self._error = text, error

    def as_text(self):
        return self._text

    def compile(self, compiler_options):
        FakeLowered.calls += 1
        if self._error:
            raise RuntimeError(self._error)
        return jax.jit(lambda x: x + 1).lower(np.float32(1)).compile()


def compile_fake(tmp_path, lowered, question=None):
    planned = make_planned()
    object.__setattr__(planned.program, "lower", lambda: lowered)
    target = targets.Target("v5p", V5P, tuple(jax.devices()[:1]), 1)
    return measure.compile_program(planned, target, measure.Cache(tmp_path), question)


def test_a_program_is_compiled_once(tmp_path):
    FakeLowered.calls = 0
    first = compile_fake(tmp_path, FakeLowered("one"))
    again = compile_fake(tmp_path, FakeLowered("one"))
    assert FakeLowered.calls == 1
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.text == first.text and again.argument_bytes == first.argument_bytes
    compile_fake(tmp_path, FakeLowered("another"))
    assert FakeLowered.calls == 2
    compile_fake(tmp_path, FakeLowered("another"), question=["step", 1])
    asked = compile_fake(tmp_path, None, question=["step", 1])  # not even traced
    assert asked.from_cache and FakeLowered.calls == 2


def test_a_damaged_entry_is_made_again(tmp_path):
    compile_fake(tmp_path, FakeLowered("one"))
    (entry,) = tmp_path.glob("*.gz")
    entry.write_bytes(entry.read_bytes()[:40])
    FakeLowered.calls = 0
    assert not compile_fake(tmp_path, FakeLowered("one")).from_cache
    assert FakeLowered.calls == 1


def test_running_out_of_memory_is_a_result_and_other_failures_are_errors(tmp_path):
    message = "RESOURCE_EXHAUSTED: XLA:TPU: Ran out of memory. Used 98.50G of 95.74G hbm. More."
    found = compile_fake(tmp_path, FakeLowered("big", message))
    assert found.error == "Used 98.50G of 95.74G hbm"
    assert found.needed_bytes == 98.5 * GIB
    assert compile_fake(tmp_path, FakeLowered("big", message)).from_cache
    with pytest.raises(RuntimeError, match="INTERNAL"):
        compile_fake(tmp_path, FakeLowered("bad", "INTERNAL: a bug"))


def test_a_sweep_prunes_what_cannot_fit_and_ranks_the_rest():
    mesh = MeshConfig(fsdp=8)
    wanted = sweep.choices([mesh, MeshConfig(fsdp=3)], [1, 2], ["save_qkv", "full"])
    assert [(c.batch, c.remat) for c in wanted[:3]] == [(1, "full"), (1, "save_qkv"), (2, "full")]

    def measured(choice):
        if choice.mesh.fsdp == 3:
            raise ValueError("does not divide")
        if choice.batch == 2:
            return make_report(error="Used 98.5G of 95.7G hbm", needed=98.5 * GIB)
        images = 8 if choice.remat == "full" else 16
        return make_report(planned=dataclasses.replace(make_planned(), images=images))

    outcomes = list(sweep.sweep(wanted, measured, Console(file=io.StringIO())))
    best = sweep.ranked(outcomes)
    assert [(o.choice.remat, o.fits) for o in best[:3]] == [
        ("save_qkv", True),
        ("full", True),
        ("full", False),
    ]
    reasons = {(o.choice.mesh.fsdp, o.choice.batch, o.choice.remat): o.reason for o in outcomes}
    assert reasons[8, 2, "full"] == "needs 98.5 GiB of 95"
    assert reasons[8, 2, "save_qkv"] == "not tried: full keeps less and does not fit"
    assert reasons[3, 1, "full"] == "does not divide"
    console = Console(width=120, record=True, file=io.StringIO())
    sweep.print_outcomes(console, outcomes)
    assert "left out:" in console.export_text()


def test_a_choice_sets_the_batch_of_all_chips():
    config = train_config.parse(load_config("configs/kontext_joint.py"))
    mesh = mesh_config({"data": 2, "fsdp": 16, "tensor": 2})
    choice = sweep.Choice(mesh, 2, "full")
    changed = choice.apply(config, 64)
    assert changed.batch_size == 2 * 32 * config.accumulate_steps
    assert changed.remat == "full"


def test_charts_show_their_figures():
    pytest.importorskip("matplotlib")
    bar = chart.Bar("one", {"matmul": 2.0, "attention": 1.0}, "3 ms")
    pixels = charts.to_pixels(chart.bars("a title", [bar])).reshape(-1, 3)
    colours = [bytes.fromhex(chart.COLOURS[name][1:]) for name in ("matmul", "attention")]
    widths = [(pixels == np.frombuffer(colour, np.uint8)).all(1).sum() for colour in colours]
    assert 1.7 < widths[0] / widths[1] < 2.1  # legend boxes included
    panel = chart.Panel("time", ("1", "2"), {"step": (1.0, 2.0), "limit": (0.5, 0.7)})
    assert charts.to_pixels(chart.curves("growth", [panel, panel])).std() > 0


def test_a_chart_without_matplotlib_names_the_extra_before_anything_is_compiled(
    monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan.main(["--topology", "v5p", "--sample", "tiny", "--plot", "a.png"]) == 2
    assert "charts need matplotlib: pip install 'kontext-jax[plot]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_and_a_request_for_a_tpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("KONTEXT_JAX_CACHE", str(tmp_path / "cache"))
    words = ["--config", "configs/tiny.py", "--config.dtype=bfloat16", "--topology", "v5e:2x2"]
    files = ["--json", str(tmp_path / "step.json"), "--plot", str(tmp_path / "step.png")]
    assert plan.main([*words, *files, "--size", "256x256", "--check-dtypes"]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["fits"] and not found["from_cache"]
    assert found["mesh"]["fsdp"] == 4
    assert found["estimate"]["seconds_by_category"]["matmul"] > 0
    assert all(loop["exact"] for loop in found["estimate"]["loops"])
    assert (tmp_path / "step.png").stat().st_size > 1000
    capsys.readouterr()
    assert plan.main([*words, "--size", "256x256", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["from_cache"]

    words = ["--sample", "tiny", "--topology", "v5e:2x2", "--size", "256x256"]
    assert plan.main([*words, "--mesh", "context=2", "--stages", "prepare", "run"]) == 0
    shown = capsys.readouterr().out
    assert "640 tokens, 28 steps" in shown and "all-to-all" in shown


@pytest.mark.slow
def test_the_stages_of_a_request_are_those_that_run():
    target = targets.Target("v5e:2x2", CHIPS["v5e"], tuple(jax.devices()[:1]), 1)
    request = sampling.Request(
        "tiny", (64, 64), num_references=2, num_steps=8, sampler="renoise", batch_size=2
    )
    stages = {stage.name: stage for stage in sampling.sampling_stages(request, target)}
    assert list(stages) == ["text", "encode", "prepare", "run", "decode"]
    assert (stages["encode"].times, stages["decode"].times, stages["run"].repeats) == (2, 2, 8)
    run = stages["run"].planned
    assert set(run.beside) == {"autoencoder", "T5", "CLIP"}
    results = run.program.result_shapes()
    assert results.shape == (2, 16, 64)
    assert jax.ShapeDtypeStruct((2, 2), np.uint32) in [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(run.program.args)
    ]  # the seeds, for the noise of each step
