"""The sampling grid a diffusers folder asks for: `scheduler/scheduler_config.json`, both ways.

FLUX is sampled on a uniform grid that is either shifted by the number of target tokens
(`kontext_jax.flow.timestep_mu`) or not at all (schnell). A folder that asks for any other grid is
refused, since its pictures would not be those of diffusers.
"""

from pathlib import Path
from typing import Any

from convert_weights.layouts import read_json_object
from convert_weights.rules import WeightMismatchError

FILE = "scheduler/scheduler_config.json"
CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
_SHIFTED = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
}
_UNSHIFTED = {"shift": 1.0}
_EITHER = {
    "_class_name": CLASS_NAME,
    "invert_sigmas": False,
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
# What diffusers takes for a key that is absent is what we sample with, in every case.


def scheduler_config(shift_timesteps: bool) -> dict[str, Any]:
    """What diffusers reads for the grid with or without the shift."""
    return {
        **_EITHER,
        **_SHIFTED,
        "shift": 3.0 if shift_timesteps else 1.0,  # without effect where the shift is dynamic
        "use_dynamic_shifting": shift_timesteps,
    }


def read_shift_timesteps(folder: Path) -> bool | None:
    """Whether the folder's scheduler shifts its grid; None if it has no scheduler.

    Raises:
      WeightMismatchError: it asks for a grid that we do not sample on; every such key is listed.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    config = read_json_object(path)
    dynamic = bool(config.get("use_dynamic_shifting", False))
    wanted = _EITHER | (_SHIFTED if dynamic else _UNSHIFTED)
    lines = [
        f"{key}: found {config[key]!r}, supported {value!r}"
        for key, value in sorted(wanted.items())
        if config.get(key, value) != value
    ]
    if lines:
        raise WeightMismatchError(
            f"{path}: asks for a sampling grid that kontext_jax does not have:\n  "
            + "\n  ".join(lines)
        )
    return dynamic
