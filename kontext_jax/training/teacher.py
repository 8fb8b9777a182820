"""A frozen transformer that another one learns from.

    teacher = Teacher(open_weights(path), jnp.bfloat16, backend)      # headers alone are read
    frozen = {"teacher": teacher.load(place)}                         # shapes(): what that gives
    velocity = teacher.velocity(frozen["teacher"], x_t, t, batch)     # [B, L, C], of the target

`open_weights` gives the average of the parameters where the path is a training run that keeps one.
The parameters are stored in the compute dtype, and nothing here stops gradients: by its inputs a
teacher may be differentiated (adversarial distillation needs that); whoever takes a target from it
uses `lax.stop_gradient`.
"""

import jax
import jax.numpy as jnp

from kontext_jax.batches import Conditioning, TokenBatch
from kontext_jax.models import conditioning
from kontext_jax.models.mmdit import MMDiT, Remat, make_velocity_fn
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.ops.attention import Backend
from kontext_jax.types import Array, Float, Params, Tokens
from kontext_jax.weights.bundle import ModelBundle, Place, parameter_shapes

NO_GUIDANCE = 1.0  # what a network that takes guidance is told, to be the conditional one


class Teacher:
    """The transformer of a bundle, its weights still on disk.

    Args:
      dtype: dtype of its parameters and of what it computes.
      remat: results that its blocks keep for a backward pass by its inputs, see `models.mmdit`.

    Attributes:
      model: the module, for whoever needs more of it than the velocity.
      source: one line for the user: where the weights come from.

    Raises:
      ValueError: the bundle has no transformer.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        dtype: jax.typing.DTypeLike,
        attention_backend: Backend,
        remat: Remat = "none",
    ):
        if "mmdit" not in bundle.components:
            raise ValueError(f"{bundle.source} has no transformer, so it can teach nothing")
        self._component = bundle.components["mmdit"]
        self._dtype = jnp.dtype(dtype)
        self.source = bundle.source
        self.model = MMDiT(
            self._component.config, dtype=dtype, attention_backend=attention_backend, remat=remat
        )

    @property
    def config(self) -> MMDiTConfig:
        return self._component.config

    def shapes(self) -> Params:
        """Shapes of what `load` gives."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, self._dtype),
            parameter_shapes("mmdit", self.config),
        )

    def load(self, place: Place) -> Params:
        """The parameters, each leaf straight to its place, in the compute dtype."""
        return self._component.load(dtype=self._dtype, device=place)

    def condition(self, batch: TokenBatch, guidance: float = NO_GUIDANCE) -> Conditioning:
        """What the network takes besides x_t and t.

        Args:
          guidance: guidance input, for a network that has it.
        """
        told = None
        if self.config.guidance_embed:
            told = jnp.full(batch.vec.shape[:1], guidance, jnp.float32)
        return conditioning.of_batch(batch, told)

    def velocity(
        self,
        params: Params,
        x_t: Tokens,
        t: Float[Array, " B"],
        batch: TokenBatch,
        guidance: float = NO_GUIDANCE,
    ) -> Tokens:
        """Velocity of the target tokens x_t at times t."""
        return make_velocity_fn(self.model, params, self.condition(batch, guidance))(x_t, t, None)
