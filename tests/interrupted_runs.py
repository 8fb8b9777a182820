"""A run in one piece, and the same one stopped on the way."""

import dataclasses

import jax

from kontext_jax.runtime.sharding import MeshConfig, make_mesh
from kontext_jax.training import loop as train_loop
from kontext_jax.training import metrics
from kontext_jax.training.checkpoints import Checkpoints
from kontext_jax.training.config import EvalConfig
from kontext_jax.training.tasks.base import abstract_state
from kontext_jax.training.tasks.table import make_task

SAMPLES = EvalConfig(
    sources=("scenes:easy:seen:12",), num_batches=1, sample_every_steps=4, sample_rows=2
)


def run_whole_and_broken(config, folder, open_weights):
    """Four steps of `config`, at once with samples, and as three and one without.

    The learning rate is constant: a decaying one depends on the number of steps, and a run does not
    go on with another.

    Returns:
      The folder of the whole run; of both, the training rows of their metrics, and their states.
    """
    whole, broken = folder / "whole", folder / "broken"
    optimizer = dataclasses.replace(config.optimizer, schedule="constant")
    config, lines = dataclasses.replace(config, optimizer=optimizer), []
    for run, num_steps, held_out in ((whole, 4, SAMPLES), (broken, 3, EvalConfig()),
                                     (broken, 4, EvalConfig())):  # fmt: skip
        changed = dataclasses.replace(config, num_steps=num_steps, eval=held_out)
        train_loop.train(changed, str(run), open_weights=open_weights, tell=lines.append)
    assert any(line.startswith("going on from step 3") for line in lines)
    assert (whole / "samples" / "4.png").exists()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(make_task(config, open_weights), mesh)
    states = []
    for run in (whole, broken):
        with Checkpoints(run / train_loop.CHECKPOINTS) as checkpoints:
            states.append(checkpoints.restore(abstract).state)
    rows = [metrics.read(run / metrics.FILE, "train") for run in (whole, broken)]
    return whole, rows, states
