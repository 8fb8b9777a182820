"""Weights of the perceptual networks, kept as safetensors in this machine's folder for caches.

    FOLDER/{vgg16,alexnet}.safetensors      names are paths of `models.perceptual`

Nothing downloads by itself: `python -m kontext_jax.evaluation.fetch_perceptual` writes them once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from kontext_jax.models.judges.perceptual import NETS, Perceptual, PerceptualConfig
from kontext_jax.runtime.programs import default_cache_dir
from kontext_jax.storage.safetensors_reader import SafetensorsFile, TensorFileError, TensorInfo
from kontext_jax.storage.safetensors_writer import SafetensorsWriter
from kontext_jax.trees import flatten
from kontext_jax.weights.bundle import Place, place_leaves

if TYPE_CHECKING:
    import jax

    from kontext_jax.types import Params

FOLDER_VARIABLE = "KONTEXT_JAX_PERCEPTUAL"
COMMAND = "python -m kontext_jax.evaluation.fetch_perceptual"
SIDE_PX = 64  # of a picture that every network takes


def perceptual_dir() -> Path:
    """$KONTEXT_JAX_PERCEPTUAL, or perceptual/ in the folder for compiled programs."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given).expanduser()
    return default_cache_dir() / "perceptual"


def perceptual_shapes(config: PerceptualConfig) -> Params:
    """`jax.ShapeDtypeStruct`s of a network's parameters."""
    import jax
    import jax.numpy as jnp

    picture = jnp.zeros((1, SIDE_PX, SIDE_PX, 3))
    init = Perceptual(config).init
    return jax.eval_shape(lambda key: init(key, picture, picture), jax.random.key(0))["params"]


def check_leaves(leaves: Mapping[str, Any], config: PerceptualConfig, where: str) -> None:
    """Refuses anything but the float32 leaves of such a network.

    Raises:
      TensorFileError: every difference is listed.
    """
    expected = dict(flatten(perceptual_shapes(config)))
    lines = [f"- {path}" for path in sorted(expected.keys() - leaves.keys())]
    lines += [f"+ {path}" for path in sorted(leaves.keys() - expected.keys())]
    for path in sorted(expected.keys() & leaves.keys()):
        have = np.dtype(leaves[path].dtype).name, tuple(leaves[path].shape)
        if have != ("float32", expected[path].shape):
            wanted = list(expected[path].shape)
            lines.append(f"{path}: {have[0]} {list(have[1])}, expected float32 {wanted}")
    if lines:
        raise TensorFileError(
            f"{where}: not the weights of this network (- missing, + unexpected):\n  "
            + "\n  ".join(lines)
        )


def save_perceptual(
    folder: Path, net: str, leaves: Mapping[str, Float[np.ndarray, "*shape"]], source: str
) -> Path:
    """Writes FOLDER/NET.safetensors, beside and then renamed.

    Raises:
      TensorFileError: these are not its leaves.
    """
    check_leaves(leaves, NETS[net], source)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{net}.safetensors"
    infos = {name: TensorInfo(x.dtype, x.shape) for name, x in sorted(leaves.items())}
    with SafetensorsWriter(path, infos, {"net": net, "source": source}) as writer:
        for name in infos:
            writer.write(name, leaves[name])
    return path


def load_perceptual(
    net: str,
    device: jax.Device | jax.sharding.Sharding | Place | None = None,
    folder: Path | None = None,
) -> Params:
    """The float32 weights of "vgg16" or "alexnet", each leaf straight to its device.

    Args:
      device: destination of the leaves, see `weights.bundle.place_leaves`.
      folder: their folder; None: `perceptual_dir()`.

    Raises:
      TensorFileError: they are not there (the command that fetches them is named), or damaged.
    """
    path = (folder or perceptual_dir()) / f"{net}.safetensors"
    if not path.is_file():
        raise TensorFileError(
            f"the perceptual network {net} is not on this machine (no {path}); fetch it once with "
            f"`{COMMAND}`, or name its folder in ${FOLDER_VARIABLE}"
        )
    with SafetensorsFile(path) as file:
        check_leaves(file.tensors, NETS[net], str(path))
        return place_leaves(file.tensors, file.read, device)
