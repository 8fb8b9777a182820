"""Rectified flow on the transformer, or on adapters beside it: `objectives.flow_matching`."""

from typing import Any

import jax

from kontext_jax.batches import Conditioning, TokenBatch
from kontext_jax.models.lora import init_lora, scaled
from kontext_jax.models.mmdit import make_velocity_fn
from kontext_jax.objectives.flow_matching import make_flow_matching
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.tasks.base import OpenWeights, Work
from kontext_jax.training.tasks.transformer import TransformerTask
from kontext_jax.types import Params, VelocityFn
from kontext_jax.weights.bundle import Place, parameter_shapes


class FlowMatchingTask(TransformerTask):
    """Trains the transformer, or adapters beside it, on tokens from frozen encoders."""

    def __init__(self, config: TrainConfig, open_weights: OpenWeights):
        super().__init__(config, open_weights)
        self.objective = make_flow_matching(
            self._predict,
            self._init_trained,
            self._optimizer,
            config.flow,
            takes_guidance=self._preset.mmdit.guidance_embed,
            **self._step_options(),
        )

    @property
    def _adapts(self) -> bool:
        return self._config.train == "lora"

    def _init_trained(self, key: jax.Array) -> Params:
        if self._adapts:
            return init_lora(self._config.lora, self._base_shapes(), key)
        return super()._init_trained(key)

    def _base_shapes(self) -> Params:
        return parameter_shapes("mmdit", self._preset.mmdit)

    def _velocity_fn(self, params: Params, frozen: Any, cond: Conditioning) -> VelocityFn:
        if self._adapts:
            adapters = scaled(params, self._config.lora.alpha)
            return make_velocity_fn(self._model, frozen["mmdit"], cond, adapters)
        return super()._velocity_fn(params, frozen, cond)

    def load_params(self, place: Place) -> Params | None:
        return None if self._adapts else super().load_params(place)

    def frozen_shapes(self) -> Any:
        if not self._adapts:
            return {}
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, self._dtype)  # noqa: E731
        return {"mmdit": jax.tree.map(cast, self._base_shapes())}

    def load_frozen(self, place: Place) -> Any:
        if not self._adapts:
            return {}
        mmdit = self._start.components["mmdit"]
        return {"mmdit": mmdit.load(dtype=self._dtype, device=place)}

    def work(self, batch: TokenBatch) -> Work:
        images, tokens, forward = self._forward(batch)
        flops = forward.training(trains_kernels=not self._adapts)
        return Work(images, images * tokens, images * flops)
