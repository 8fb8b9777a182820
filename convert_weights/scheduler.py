"""How a published folder asks to be sampled, both ways.

FLUX is sampled on a uniform grid that is either shifted by the number of target tokens
(`kontext_jax.flow.timestep_mu`) or not at all (schnell). A diffusers folder says so in
`scheduler/scheduler_config.json`, and there too whether each step ends in new noise
(`stochastic_sampling`, our "renoise"). A folder that asks for any other grid is refused, since its
pictures would not be those of diffusers. No published layout has a place for what else a model's
card says (`kontext_jax.model_card`); it stands in a file of ours beside them, and is read there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_weights.layouts import read_json_object
from convert_weights.rules import WeightMismatchError
from kontext_jax.flow.names import Sampler
from kontext_jax.runtime.atomic import write_json
from kontext_jax.weights import card as model_card

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
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
# What diffusers takes for a key that is absent is what we sample with, in every case.


def scheduler_config(shift_timesteps: bool, sampler: Sampler = "euler") -> dict[str, Any]:
    """What diffusers reads for a sampler on the grid with or without the shift."""
    return {
        **_EITHER,
        **_SHIFTED,
        "shift": 3.0 if shift_timesteps else 1.0,  # without effect where the shift is dynamic
        "stochastic_sampling": sampler == "renoise",
        "use_dynamic_shifting": shift_timesteps,
    }


def read_sampling(folder: Path) -> dict[str, Any]:
    """Fields of the preset that the folder decides, by its scheduler and by its defaults of ours.

    Raises:
      WeightMismatchError: it asks for a grid that we do not sample on, every such key is listed; or
        the defaults are damaged.
    """
    defaults = folder / model_card.FILE
    found = {}
    if defaults.is_file():
        try:
            found = model_card.check_defaults(read_json_object(defaults))
        except ValueError as error:
            raise WeightMismatchError(f"{defaults}: {error}") from error
    return _read_scheduler(folder / FILE) | found


def _read_scheduler(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
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
    stochastic = bool(config.get("stochastic_sampling", False))
    return {"shift_timesteps": dynamic} | ({"default_sampler": "renoise"} if stochastic else {})


def write_defaults(folder: Path, defaults: Mapping[str, Any]) -> None:
    """Writes defaults of a model's card where `read_sampling` finds them, if there are any."""
    if defaults:
        write_json(folder / model_card.FILE, dict(defaults))
