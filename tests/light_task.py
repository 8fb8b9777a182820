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
from kontext_jax.training.tasks.base import Work


@flax.struct.dataclass
class Colours:
    before: jax.Array  # [B, 3]
    after: jax.Array  # [B, 3]


class LightTask:
    """See the head of this file. A sample whose id ends with one of `poison` makes the loss NaN."""

    poison: frozenset[str] = frozenset()

    def __init__(self, config, open_weights):
        del open_weights
        self.sources = ["colours: drawn afresh"]
        self._optimizer = optax.adam(config.optimizer.learning_rate)
        self._ema = config.ema_decay > 0

        def loss_fn(params, frozen, batch, key, sample_index):
            keys = sample_keys(key, "noise", sample_index)
            noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
            error = batch.before @ params["kernel"] + 0.1 * noise - batch.after
            return jnp.mean(error**2), {"noise": jnp.mean(noise)}

        def evaluate(params, frozen, batch, key):
            count = batch.after.shape[0]
            loss, metrics = loss_fn(params, frozen, batch, key, jnp.arange(count))
            return metrics | {"loss/sum": loss * count, "loss/count": jnp.float32(count)}

        self.objective = Objective(
            init=lambda key: self.start({"kernel": jax.random.normal(key, (3, 3))}),
            step=make_gradient_step(
                loss_fn,
                self._optimizer,
                ema_decay=config.ema_decay,
                accumulate_steps=config.accumulate_steps,
            ),
            evaluate=evaluate,
        )

    def load_params(self, place):
        return None

    def start(self, params):
        return make_train_state(params, self._optimizer, with_ema=self._ema)

    def frozen_shapes(self):
        return {}

    def load_frozen(self, place):
        return {}

    def data_facts(self):
        return {}

    def peak_flops(self, mesh):
        return 1e12

    def work(self, batch):
        return Work(len(batch.after), 3 * len(batch.after), 1e6)

    def make_feed(self, devices, null_text):
        return ColourFeed(devices, self.poison)


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
