"""Policy distillation (π-Flow): one pass of a student for a whole stretch of its teacher's path.

    u_1 … u_N = S(x_r, r, c, y, g)               velocities, a policy π (`flow.policy`)
    x_τ       where π leads from x_r by τ, even between r and the next student time, as a number
    loss      = mean over samples and τ of mean((π(x_τ, τ) − sg v_g(x_τ, τ))²)

(arXiv:2510.14974.) The teacher is asked where the student gets, so that it is imitated in what the
student meets; there is no other network, and no distribution to be matched. v_g is the teacher's
velocity with guidance, told to one that takes it and by two passes of one that does not. x_r is an
example with noise; the examples may be any, since they are only where the student starts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kontext_jax.batches import TokenBatch
from kontext_jax.flow import path as flow
from kontext_jax.flow import policy
from kontext_jax.flow.names import check_timesteps
from kontext_jax.objectives.base import (
    Metrics,
    Objective,
    make_gradient_step,
    num_samples,
    sample_keys,
)
from kontext_jax.objectives.draws import draw_even, draw_noise, mean_of
from kontext_jax.objectives.flow_matching import Predict
from kontext_jax.objectives.guidance_distillation import Teach, relative_error
from kontext_jax.objectives.state import make_train_state
from kontext_jax.types import Params


@dataclasses.dataclass(frozen=True)
class PolicyDistillationConfig:
    """From which times to which the student leads, and where its teacher is asked.

    Attributes:
      timesteps: times of the student's sampler, from 1 (noise) downwards. Each policy leads to the
        next of them, the last to 0.
      teacher_times: τ of each example at which the teacher is asked.
      smallest_time: least τ; smaller draws are raised to it, since velocities there divide by next
        to nothing.
      guidance: guidance of the teacher's velocity, and the guidance input of a student.
    """

    timesteps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    teacher_times: int = 2
    smallest_time: float = 0.02
    guidance: float = 2.5

    def __post_init__(self):
        try:
            times = check_timesteps(self.timesteps)
        except ValueError as error:
            raise ValueError(f"policy_distillation.timesteps: {error}") from error
        if self.teacher_times < 1:
            raise ValueError(
                f"policy_distillation.teacher_times is {self.teacher_times}; it must be at least 1"
            )
        if not 0 < self.smallest_time < times[-1]:
            raise ValueError(
                f"policy_distillation.smallest_time is {self.smallest_time}; it must be above 0 "
                f"and below the last of the timesteps, {times[-1]:g}"
            )


def make_policy_distillation(
    predict: Predict,
    teach: Teach,
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    config: PolicyDistillationConfig,
    *,
    takes_guidance: bool,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Objective:
    """Policy distillation as an `Objective` over `TokenBatch`es.

    Metrics, beside those of `make_gradient_step`: `relative_error/I`, ‖π − v_g‖/‖v_g‖ of policies
    that begin at student time I; a pair (`objectives.base`).

    `evaluate` draws noise from key and sample index alone. For each student time I it gives
    `relative_error/I`, and `no_op_error/I` of a policy whose velocity stays what it is at first, at
    four times spread evenly over the stretch; `loss` is the mean squared error of all.

    Args:
      predict: the student, N velocities a token: [B, L, N·C].
      teach: the guided teacher, which is not differentiated.
      init_params: key → fresh float32 parameters, for shapes; the student starts from weights.
      takes_guidance: whether the student has an input for guidance.
      ema_decay: see `make_gradient_step`, like the rest.
    """
    times = jnp.asarray(config.timesteps, jnp.float32)
    ends = jnp.append(times[1:], 0.0)

    def stretch(params, frozen, batch, noise, index):
        """The policies of each sample from times[index]: x_r, its estimates, r and the end."""
        t, end = times[index], ends[index]
        x = flow.interpolate(batch.x0.astype(jnp.float32), noise, t)
        guidance = jnp.full(t.shape, config.guidance, jnp.float32) if takes_guidance else None
        output = predict(params, frozen, x, t, batch, guidance)
        return x, policy.clean_estimates(output, x, t), t, end

    def compare(frozen, batch, x, estimates, t, end, tau):
        """Squared and relative error of the policy's velocity at τ, and of the first one: [b]."""
        tau = jnp.maximum(tau, config.smallest_time)
        path = lax.stop_gradient(estimates)
        x_tau = policy.position_at(path, x, t, end, tau)
        target = lax.stop_gradient(teach(frozen, x_tau, tau, batch)).astype(jnp.float32)
        by_time = tau[:, None, None]
        velocity = (x_tau - policy.estimate_at(estimates, t, end, tau)) / by_time
        loss = jnp.mean((velocity - target) ** 2, axis=(1, 2))
        relative = relative_error(lax.stop_gradient(velocity), target)
        first = (x - path[:, 0]) / t[:, None, None]
        return loss, relative, relative_error(first, target)

    def loss_fn(params, frozen, batch: TokenBatch, key, sample_index):
        noise = draw_noise(key, sample_index, batch.x0.shape[1:])
        keys = sample_keys(key, "t", sample_index)
        index = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(times)))(keys)
        x, estimates, t, end = stretch(params, frozen, batch, noise, index)

        def ask(i):
            part = draw_even(jax.random.fold_in(key, i), "tau", sample_index)
            return compare(frozen, batch, x, estimates, t, end, end + (t - end) * part)

        losses, relative, _ = lax.map(ask, jnp.arange(config.teacher_times))
        metrics: Metrics = {}
        for i in range(len(times)):
            metrics |= mean_of(f"relative_error/{i}", relative, index == i)
        return jnp.mean(losses), metrics

    def evaluate(params, frozen, batch: TokenBatch, key):
        sample_index = jnp.arange(num_samples(batch), dtype=jnp.int32)
        noise = draw_noise(key, sample_index, batch.x0.shape[1:])

        def at(index):
            index = jnp.full(sample_index.shape, index)
            x, estimates, t, end = stretch(params, frozen, batch, noise, index)

            def ask(part):
                return compare(frozen, batch, x, estimates, t, end, end + (t - end) * part)

            return lax.map(ask, (jnp.arange(4) + 0.5) / 4)

        losses, relative, no_op = lax.map(at, jnp.arange(len(times)))  # [times, 4, b] each
        metrics = mean_of("loss", losses)
        for i in range(len(times)):
            metrics |= mean_of(f"relative_error/{i}", relative[i])
            metrics |= mean_of(f"no_op_error/{i}", no_op[i])
        return metrics

    return Objective(
        init=lambda key: make_train_state(init_params(key), optimizer, with_ema=ema_decay > 0),
        step=make_gradient_step(
            loss_fn,
            optimizer,
            ema_decay=ema_decay,
            accumulate_steps=accumulate_steps,
            learning_rate=learning_rate,
        ),
        evaluate=evaluate,
    )
