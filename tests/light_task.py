"""A task without a network, so that tests of the loop compile in a second: colours of scenes.

From the mean colours of its reference it learns the mean colours of a picture, with noise drawn
from the run's key. Data, state, checkpoints and the journal are those of every task.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kontext_jax.objectives.base import Objective, make_gradient_step, sample_keys
from kontext_jax.objectives.state import make_train_state
from kontext_jax.pictures.latents import pixels_to_model
from kontext_jax.runtime.sharding import shard_batch
from kontext_jax.training.tasks.base import Task, Work


@flax.struct.dataclass
class Colours:
    before: jax.Array  # [B, 3]
    after: jax.Array  # [B, 3]


def light_task(config, open_weights, poison: tuple[str, ...] = ()) -> Task:
    """See the head of this file; a sample whose id ends with one of `poison` makes the loss NaN."""
    del open_weights
    optimizer = optax.adam(config.optimizer.learning_rate)

    def start(params):
        return make_train_state(params, optimizer, with_ema=config.ema_decay > 0)

    def loss_fn(params, frozen, batch, key, sample_index):
        keys = sample_keys(key, "noise", sample_index)
        noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
        error = batch.before @ params["kernel"] + 0.1 * noise - batch.after
        return jnp.mean(error**2), {"noise": jnp.mean(noise)}

    def evaluate(params, frozen, batch, key):
        count = batch.after.shape[0]
        loss, metrics = loss_fn(params, frozen, batch, key, jnp.arange(count))
        return metrics | {"loss/sum": loss * count, "loss/count": jnp.float32(count)}

    objective = Objective(
        init=lambda key: start({"kernel": jax.random.normal(key, (3, 3))}),
        step=make_gradient_step(
            loss_fn,
            optimizer,
            ema_decay=config.ema_decay,
            accumulate_steps=config.accumulate_steps,
        ),
        evaluate=evaluate,
    )
    colours = jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32)
    return Task(
        objective=objective,
        sources=("colours: drawn afresh",),
        load_params=lambda place: None,
        start=start,
        frozen_shapes=dict,
        load_frozen=lambda place: {},
        data_facts=dict,
        make_feed=lambda devices, null_text: ColourFeed(devices, poison),
        abstract_batch=lambda batch_size, size, num_references: Colours(colours, colours),
        peak_flops=lambda mesh: 1e12,
        work=lambda batch: Work(len(batch.after), 3 * len(batch.after), 1e6),
    )


class ColourFeed:
    def __init__(self, devices, poison):
        self._devices, self._poison = devices, poison

    def __call__(self, batch):
        means = [pixels_to_model(x).mean(axis=(1, 2)) for x in (batch.contexts[0], batch.target)]
        poisoned = np.array([i.endswith(tuple(self._poison)) for i in batch.ids])
        means[1][poisoned] = np.nan
        return shard_batch(self._devices.mesh, Colours(*means))

    def sample(self, params, frozen, batch):
        return [pixels_to_model(batch.contexts[0]), pixels_to_model(batch.target)]
