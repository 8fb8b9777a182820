"""Names of hardware → devices to compile for."""

import dataclasses
import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from kontext_jax.runtime.chips import CHIPS, Chip
from kontext_jax.terminal import did_you_mean

TPUS = ("v5e", "v5p", "v6e")
GPUS = ("h100", "h200")
GPUS_OF_A_NODE = 8
# The smallest slice that the compiler knows; one chip is the first of it.
_SMALLEST = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
FORMS = "v5p (one chip), v5p:4x4x4, v5e:16x16, v6e:8x8, v5p:4x4x4*2 (two slices), h100, h100x8"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: name that was asked for.
      slice_size: number of devices on one fast network; a slow one joins such slices.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    slice_size: int

    @property
    def num_slices(self) -> int:
        return len(self.devices) // self.slice_size


def find_target(name: str) -> Target:
    """The devices that a name stands for; see `FORMS`.

    Raises:
      ValueError: the name is not understood, or the compiler for it is not installed.
    """
    word = re.match(r"[a-z0-9]*", name)[0]
    kind = re.sub(r"(?<=\d)x\d+$", "", word)  # a count stands behind a digit: not in rtx4090
    if kind not in (*TPUS, *GPUS):
        known = (*TPUS, *GPUS)
        raise ValueError(
            f"topology {name!r} is unknown{did_you_mean(kind, known)}; expected {FORMS}"
        )
    return (_tpu if kind in TPUS else _gpu)(name, CHIPS[kind])


def _tpu(name: str, chip: Chip) -> Target:
    form = re.fullmatch(rf"{chip.name}(?::(\d+(?:x\d+)+))?(?:\*(\d+))?", name)
    if form is None or (form[2] and not form[1]):
        raise ValueError(f"topology {name!r} is not understood; expected {FORMS}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"compiling for {chip.name} needs libtpu: pip install 'jax[tpu]'")
    layout, num_slices = form[1] or _SMALLEST[chip.name], int(form[2] or 1)
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        found = topologies.get_topology_desc(f"{chip.name}:{layout}", "tpu", **options).devices
    except Exception as error:
        raise ValueError(
            f"the compiler knows no slice {chip.name}:{layout}: {_first_line(error)}; v5p slices "
            "have three sides and v5e and v6e two, each a multiple of 2 or 4"
        ) from error
    devices = tuple(found if form[1] else found[:1])
    return Target(name, chip, devices, len(devices) // num_slices)


def _gpu(name: str, chip: Chip) -> Target:
    form = re.fullmatch(rf"{chip.name}(?:x(\d+))?", name)
    if form is None:
        raise ValueError(f"topology {name!r} is not understood; expected {FORMS}")
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        version = metadata.version("jax")
        raise ValueError(
            f"compiling for {chip.name} needs JAX's plug-in for CUDA: pip install --no-deps "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} nvidia-cudnn-cu12"
        )
    count = int(form[1] or 1)
    if count > GPUS_OF_A_NODE and count % GPUS_OF_A_NODE:
        raise ValueError(f"{name}: beyond one node, give a multiple of {GPUS_OF_A_NODE} GPUs")
    per_node = min(count, GPUS_OF_A_NODE)
    options = {
        "target_config": (Path(__file__).parent / f"{chip.name}.txtpb").read_text(),
        "topology": f"1x{count // per_node}x{per_node}",
    }
    try:
        found = topologies.get_topology_desc(chip.name, "cuda", **options).devices
    except Exception as error:
        raise ValueError(f"JAX's plug-in refuses {name}: {_first_line(error)}") from error
    return Target(name, chip, tuple(found), per_node)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
