"""How a model is sampled unless a request says otherwise: the defaults beside its weights.

    "shift_timesteps": false,
    "defaults": {"default_num_steps": 4, "default_sampler": "renoise", "default_guidance": 2.5,
                 "default_timesteps": [1, 0.75, 0.5, 0.25], "default_true_cfg_scale": 1,
                 "megapixels": 0.004}

They stand in a weight directory's `kontext_jax.json`, in a file of their own beside published
layouts, which have no place for them, and follow from what a training run was for. Each is a field
of `kontext_jax.models.presets.Preset`; what is absent is as the preset has it.
"""

import math
from collections.abc import Mapping
from typing import Any

from kontext_jax.flow.names import SAMPLERS, Sampler, check_timesteps

FEW_STEPS: dict[str, Sampler] = {"ladd": "renoise", "policy_distillation": "policy"}  # objectives
FILE = "sampling_defaults.json"  # beside published layouts


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
        raise ValueError("expected a whole number from 1 to 1000")
    return value


def _number(least: float):
    def check(value: Any) -> float:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or not least <= value <= 1000:
            raise ValueError(f"expected a number from {least:g} to 1000")
        return value

    return check


def _sampler(value: Any) -> str:
    if value not in SAMPLERS:
        raise ValueError(f"expected one of {', '.join(SAMPLERS)}")
    return value


def _timesteps(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(t, int | float) for t in value):
        raise ValueError("expected a list of numbers")
    return check_timesteps(value)


CHECKS = {
    "default_num_steps": _count,
    "default_sampler": _sampler,
    "default_timesteps": _timesteps,
    "default_guidance": _number(0),
    "default_true_cfg_scale": _number(1),
    "megapixels": _number(1e-4),
}


def check_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults as a preset holds them.

    Raises:
      ValueError: there is no such default, or its value is none.
    """
    if unknown := sorted(set(defaults) - set(CHECKS)):
        raise ValueError(f"no default {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    found = {}
    for name, value in defaults.items():
        try:
            found[name] = CHECKS[name](value)
        except ValueError as error:
            raise ValueError(f"{name} is {value!r}: {error}") from error
    return found


def defaults_of_run(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults implied by a run's objective and its start weights.

    Guidance that has been distilled into a network is not applied again, but what its base was
    guided by is what its input is given. What was distilled to few steps takes those, at the times
    and with the guidance that it was trained for.

    Args:
      settings: settings of the run.
      base: sampling defaults of the weights that it began from.
    """
    found = dict(base)
    objective = settings["objective"]
    if objective in ("guidance_distillation", *FEW_STEPS):
        if scale := found.pop("default_true_cfg_scale", None):
            found.setdefault("default_guidance", scale)
        found["default_true_cfg_scale"] = 1.0
    if objective in FEW_STEPS:
        own = settings[objective]
        times = check_timesteps(own["timesteps"])
        found |= {
            "shift_timesteps": False,
            "default_num_steps": len(times),
            "default_sampler": FEW_STEPS[objective],
            "default_timesteps": times,
            "default_guidance": own["guidance"],
        }
    return found


def sampling_rule(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the preset that a weight directory decides.

    Args:
      manifest: with "shift_timesteps" and "defaults", or without.

    Raises:
      ValueError: see `check_defaults`.
    """
    shift, defaults = manifest.get("shift_timesteps"), manifest.get("defaults") or {}
    return ({} if shift is None else {"shift_timesteps": bool(shift)}) | check_defaults(defaults)
