"""The programs of an edit: text, encode, prepare, run, decode; for arrays or for shapes alike.

text      token ids            → txt, vec
encode    picture              → latents
prepare   text and times       → modulation vectors of every step
run       noise, and the above → tokens after steps [start, stop)
decode    latents              → picture
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kontext_jax.batches import Conditioning
from kontext_jax.flow.names import Sampler
from kontext_jax.flow.samplers import guided_velocity_fn, make_sampler
from kontext_jax.models import conditioning
from kontext_jax.models.block_stack import BlockForm
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.mmdit import MMDiT, make_velocity_fn, prepare_steps
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.tokenizing import TextIds
from kontext_jax.models.vae import VAE
from kontext_jax.numerics import Numerics
from kontext_jax.runtime.placement import Placement
from kontext_jax.runtime.programs import Program, precision_of
from kontext_jax.runtime.sharding import traced_on
from kontext_jax.sampling.denoising import DenoiseArrays, Text
from kontext_jax.types import Params, VelocityFn


class StagePrograms:
    """Makes the programs of one model; their arguments are arrays, or shapes with shardings.

    Args:
      configs: configs of the networks, by kind.
      dtype: compute dtype of the text encoders and the transformer.
      placement: devices that a program is for.
      block_form: form of the transformer's parameters, see `models.block_stack`.
    """

    def __init__(
        self,
        configs: Mapping[str, Any],
        dtype: Any,
        placement: Placement,
        block_form: BlockForm,
    ):
        self._configs, self.dtype = configs, dtype
        self._placement, self._block_form = placement, block_form

    @functools.cached_property
    def mmdit(self) -> MMDiT:
        return MMDiT(self._configs["mmdit"], dtype=self.dtype, block_form=self._block_form)

    def vae(self, dtype: Literal["float32", "compute"]) -> VAE:
        """The autoencoder in a dtype that `numerics` names."""
        return VAE(self._configs["vae"], jnp.float32 if dtype == "float32" else self.dtype)

    def unscale_dtype(self, numerics: Numerics) -> Any:
        """Dtype of the latents that the autoencoder decodes."""
        return jnp.float32 if numerics.unscale_dtype == "float32" else self.dtype

    def text(self, t5_params: Params, clip_params: Params, ids: TextIds, mask: bool) -> Program:
        t5 = T5Encoder(self._configs["t5"], self.dtype)
        clip = CLIPText(self._configs["clip"], self.dtype)

        def make():
            return lambda t5_params, clip_params, ids: conditioning.encode_text(
                t5, clip, t5_params, clip_params, ids, use_mask=mask
            )

        return self._program(("text", t5, clip, mask), make, t5_params, clip_params, ids)

    def encode(self, vae: VAE, params: Params, image: Any) -> Program:
        return self._program(
            ("encode", vae), lambda: _method(vae, "encode"), params, image, dtype=vae.dtype
        )

    def prepare(self, params: Params, arrays: DenoiseArrays, numerics: Numerics) -> Program:
        model = self.mmdit

        def make():
            def prepare(params, cond, negative, timesteps):
                steps = prepare_steps(model, params, cond, timesteps, numerics)
                if negative is None:
                    return steps
                cond = _with_text(cond, negative)
                return steps, prepare_steps(model, params, cond, timesteps, numerics)

            return prepare

        args = params, arrays.cond, arrays.negative, arrays.timesteps
        return self._program(("prepare", (model, numerics)), make, *args, batch_axis=1)

    def run(
        self,
        params: Params,
        arrays: DenoiseArrays,
        steps: Any,
        bounds: tuple[Any, Any],
        sampler: Sampler,
        numerics: Numerics,
    ) -> Program:
        """The sampler's steps from the first of `bounds` to before the second.

        Args:
          steps: results of `prepare`.
        """
        model = self.mmdit

        def make():
            def run(params, cond, negative, scale, words, x, timesteps, steps, start, stop):
                velocity_fn = _guided(model, params, cond, negative, scale)
                return make_sampler(sampler, words)(
                    velocity_fn,
                    x,
                    timesteps,
                    steps,
                    start=start,
                    stop=stop,
                    euler_dtype=numerics.euler_dtype,
                )

            return run

        key = "run", (model, numerics, sampler)
        return self._program(key, make, params, *arrays, steps, *bounds, batch_axis=0)

    @functools.cached_property
    def velocity(self) -> Callable[..., jax.Array]:
        """(params, cond, negative, true_cfg_scale, x_t, t, step_input) → velocity as in `run`.

        To be traced by any program: it brings its mesh and the precision of its products.
        """
        model, mesh, precision = self.mmdit, self._placement.mesh, precision_of(self.dtype)

        def velocity(params, cond, negative, scale, x_t, t, step_input=None):
            on_mesh = contextlib.nullcontext() if mesh is None else traced_on(mesh)
            with on_mesh, jax.default_matmul_precision(precision):
                velocity_fn = _guided(model, params, cond, negative, scale)
                return velocity_fn(x_t, t, step_input)

        return velocity

    def decode(self, vae: VAE, params: Params, x: Any, batch_axis: int | None) -> Program:
        """See `_program` for `batch_axis`."""
        key = "decode", vae, batch_axis
        return self._program(
            key, lambda: _method(vae, "decode"), params, x, dtype=vae.dtype, batch_axis=batch_axis
        )

    def _program(
        self,
        key: Hashable,
        make: Callable[[], Callable],
        *args: Any,
        dtype: Any = None,
        batch_axis: int | None = None,
    ) -> Program:
        """A program for the devices of `placement`.

        Args:
          dtype: dtype as precise as which products are; None for the model's.
          batch_axis: axis of the results that is split over the batch devices; None for results
            that every device gets.
        """
        return Program(
            key,
            make,
            args,
            self._placement.split(batch_axis),
            precision=precision_of(self.dtype if dtype is None else dtype),
            mesh=self._placement.mesh,
        )


def _guided(
    model: MMDiT, params: Params, cond: Conditioning, negative: Text | None, scale: Any
) -> VelocityFn:
    """The network's velocity; guided away from `negative` where there is such a text."""
    velocity_fn = make_velocity_fn(model, params, cond)
    if negative is None:
        return velocity_fn
    other = make_velocity_fn(model, params, _with_text(cond, negative))
    return guided_velocity_fn(velocity_fn, other, scale)


def _with_text(cond: Conditioning, text: Text) -> Conditioning:
    txt, vec = text
    return cond.replace(txt=txt, vec=vec)


def _method(module: VAE, name: str) -> Callable:
    return lambda params, x: module.apply({"params": params}, x, method=name)
