"""The times and the noise that objectives draw, and their losses by time."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import jax
import jax.numpy as jnp

from kontext_jax.fields import check_acting, option
from kontext_jax.flow import path as flow
from kontext_jax.objectives.base import Metrics, sample_keys, use_key
from kontext_jax.types import Array, Bool, Float, Int, RandomKey


@dataclasses.dataclass(frozen=True)
class TimesConfig:
    """Where on the path a network is trained; a base of objectives' configs.

    Attributes:
      timestep_distribution: "logit_normal" (the paper's), "uniform" or SD3's "mode"; each is
        shifted by e^mu.
      timestep_mode: rule for mu: "flux_linear" (the line of sampling, by target tokens),
        "sqrt_ratio" (SD3's law) or "const".
      timestep_mu: mu of "const".
      timestep_base_tokens: target tokens at which "sqrt_ratio" does not shift.
      timestep_sigma: standard deviation of logit t, of "logit_normal".
      timestep_mode_scale: s of "mode".
      timestep_grid: N puts times on the grid 1/N … 1 as diffusers' trainers do (1000 there); 0
        keeps them continuous.
    """

    SECTION: ClassVar[str] = ""  # name of the settings in a run's config

    timestep_distribution: flow.TimestepDistribution = "logit_normal"
    timestep_mode: flow.TimestepMode = "flux_linear"
    timestep_mu: float = option(0.0, acts_with=("timestep_mode", "const"))
    timestep_base_tokens: int = option(256, acts_with=("timestep_mode", "sqrt_ratio"))
    timestep_sigma: float = option(1.0, acts_with=("timestep_distribution", "logit_normal"))
    timestep_mode_scale: float = option(1.29, acts_with=("timestep_distribution", "mode"))
    timestep_grid: int = 0

    def __post_init__(self):
        self.check_choice("timestep_distribution", flow.TimestepDistribution)
        self.check_choice("timestep_mode", flow.TimestepMode)
        self.check_positive("timestep_sigma", "timestep_base_tokens")
        if self.timestep_grid < 0:
            raise ValueError(
                f"{self.SECTION}.timestep_grid is {self.timestep_grid}; it must be 0 or more"
            )
        if not -1 <= self.timestep_mode_scale <= 1.75:  # 2/(π − 2)
            raise ValueError(
                f"{self.SECTION}.timestep_mode_scale is {self.timestep_mode_scale}; beyond "
                "[-1, 1.75] times would not stay in order"
            )
        check_acting(self, self.SECTION)

    def check_choice(self, field: str, literal: Any) -> None:
        """Raises ValueError unless a field has one of the values of a Literal."""
        value, choices = getattr(self, field), get_args(literal)
        if value not in choices:
            raise ValueError(f"{self.SECTION}.{field} is {value!r}; choose {', '.join(choices)}")

    def check_positive(self, *fields: str) -> None:
        """Raises ValueError if one of the fields is not above 0."""
        for field in fields:
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"{self.SECTION}.{field} is {getattr(self, field)}; it must be positive"
                )

    def check_range(self, field: str) -> None:
        """Raises ValueError unless a field is (low, high) with low < high."""
        low_high = tuple(getattr(self, field))
        if len(low_high) != 2 or not low_high[0] < low_high[1]:
            raise ValueError(f"{self.SECTION}.{field} is {low_high}; give (low, high), low < high")

    def draw_times(
        self, key: RandomKey, sample_index: Int[Array, " B"], num_image_tokens: int
    ) -> Float[Array, " B"]:
        """One time per sample, float32.

        Args:
          key: key of the step.
          sample_index: places in the global batch.
          num_image_tokens: tokens of the target.
        """
        mu = flow.training_mu(
            self.timestep_mode,
            num_image_tokens,
            const_mu=self.timestep_mu,
            base_tokens=self.timestep_base_tokens,
        )
        t = jax.vmap(
            lambda k: flow.sample_training_times(
                k,
                (),
                mu,
                distribution=self.timestep_distribution,
                sigma=self.timestep_sigma,
                mode_scale=self.timestep_mode_scale,
            )
        )(sample_keys(key, "t", sample_index))
        return flow.on_trainer_grid(1 - t, self.timestep_grid)[1] if self.timestep_grid else t


def draw_noise(
    key: RandomKey, sample_index: Int[Array, " B"], shape: tuple[int, ...], use: str = "noise"
) -> Float[Array, "B *shape"]:
    """Standard normal noise of each sample, float32."""
    keys = sample_keys(key, use, sample_index)
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def draw_even(
    key: RandomKey,
    use: str,
    sample_index: Int[Array, " B"],
    low: float | Float[Array, ""] = 0.0,
    high: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """One draw for each sample, even between low and high, float32."""
    keys = sample_keys(key, use, sample_index)
    return jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32, low, high))(keys)


def even_times(key: RandomKey, num_samples: int, bins: int) -> Float[Array, " num_samples"]:
    """Times for evaluation: the middles of equal parts in turn, the first by key."""
    first = jax.random.randint(use_key(key, "t"), (), 0, bins)
    return ((jnp.arange(num_samples) + first) % bins + 0.5) / bins


def mean_of(
    name: str, values: Float[Array, "..."], where: Bool[Array, "..."] | bool = True
) -> Metrics:
    """A pair of metrics: the mean of `values` where `where`, which is as large or repeats."""
    counted = jnp.broadcast_to(where, values.shape)
    return {
        f"{name}/sum": jnp.sum(jnp.where(counted, values, 0)),
        f"{name}/count": jnp.sum(counted).astype(jnp.float32),
    }


def means_by_time(
    t: Float[Array, " B"], values: Mapping[str, Float[Array, " B"]], bins: int
) -> Metrics:
    """Pairs of metrics: each value over the samples whose t lies in each part of [0, 1]."""
    index = jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1)
    is_in_bin = jax.nn.one_hot(index, bins)  # [b, bins]
    counts = jnp.sum(is_in_bin, axis=0)
    metrics: Metrics = {}
    for name, value in values.items():
        sums = jnp.sum(is_in_bin * value[:, None], axis=0)
        for i in range(bins):
            metrics |= {f"{name}/{i}/sum": sums[i], f"{name}/{i}/count": counts[i]}
    return metrics
