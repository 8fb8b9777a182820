"""What `plan` compiles is the step that the training loop runs: the same text for the compiler."""

import jax
import pytest
from config_tasks import read_config

from kontext_jax.plan import programs
from kontext_jax.plan.targets import Target
from kontext_jax.runtime.chips import CHIPS
from kontext_jax.training import loop


class Lowered(Exception):
    """Raised in place of a step's compilation."""


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_plan_and_loop_lower_the_same_step(dtype, tmp_path, monkeypatch):
    settings = {"batch_size": "2", "mesh.fsdp": "1", "dtype": dtype}
    settings["attention_backend"] = "chunked"  # "auto" depends on the platform
    settings |= {"eval.every_steps": "0", "eval.sample_every_steps": "0", "eval.sources": ""}
    config = read_config("tiny", settings.items())
    make_program, seen = loop.step_program, {}

    def watched(task, state, frozen, batch, *rest):
        program = make_program(task, state, frozen, batch, *rest)
        seen["text"], seen["references"] = program.lower().as_text(), batch.ctx is not None
        raise Lowered

    monkeypatch.setattr(loop, "step_program", watched)
    with pytest.raises(Lowered):
        loop.train(config, str(tmp_path), open_weights=None, tell=lambda line: None)
    target = Target("h100", CHIPS["h100"], tuple(jax.devices()[:1]), 1)
    planned = programs.training_step(config, target, (64, 64), int(seen["references"]))
    assert planned.program.lower().as_text() == seen["text"]
    assert planned.program.donate_argnums == 0
