"""A training run of a few lines: real steps, real checkpoints, data with a position; no network.

    python tests/light_training.py RUN NUM_STEPS EVERY

It speaks as `train.py` does where `experiments/fault_table.py` listens.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kontext_jax.objectives.state import TrainState, make_train_state
from kontext_jax.runtime.processes import StopRequest
from kontext_jax.training.checkpoints import CheckpointError, Checkpoints

SHAPE = (1024, 512)
OPTIMIZER = optax.adamw(1e-2)


class Numbers:
    """Data: a stream of rows drawn from a seed and the position."""

    def __init__(self):
        self.position = 0

    def __next__(self) -> np.ndarray:
        self.position += 1
        return np.random.default_rng(self.position).normal(size=SHAPE[1]).astype(np.float32)


def init() -> TrainState:
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    return make_train_state({"kernel": jnp.asarray(values)}, OPTIMIZER, with_ema=True)


def loss_of(params, row: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jnp.tanh(params["kernel"] @ row) - 0.5))


def take_step(state: TrainState, row: jax.Array) -> TrainState:
    updates, opt_state = OPTIMIZER.update(
        jax.grad(loss_of)(state.params, row), state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema_params, 0.1)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema)


def main(run: str, num_steps: int, every: int) -> int:
    data, config = Numbers(), json.dumps({"num_steps": num_steps})
    step_program = jax.jit(take_step, donate_argnums=0)
    with Checkpoints(f"{run}/checkpoints") as checkpoints, StopRequest(print) as stop:
        step, reason = 0, None
        if checkpoints.latest_step() is not None:
            restored = checkpoints.restore(jax.eval_shape(init))
            state, step = restored.state, restored.step
            data.position = restored.data_state["position"]
            print(f"going on from step {step}", flush=True)
        else:
            state = init()
        while step < num_steps and reason is None:
            state = step_program(state, next(data))
            step += 1
            time.sleep(0.005)
            checkpoints.check()
            reason = stop.after(step)
            ends = step == num_steps or reason is not None
            if step % every == 0 or ends:
                checkpoints.save(step, state, {"position": data.position}, config, wait=ends)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
    except CheckpointError as error:
        print(f"error: {error}")
        sys.exit(2)
