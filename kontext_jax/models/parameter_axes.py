"""Axes of every parameter by its path: which count layers, which are contracted, which are made.

    kernel [*stack, *inputs, *outputs]     y[*outputs] = Σ over inputs of x[*inputs] · kernel
    bias   [*stack, *outputs]

Everyone who treats a kernel as a matrix, or splits it over a mesh, reads this table: sharding
(`parameter_sharding`), Muon (`training/optimizer.py`) and LoRA (`lora`). The axes have the logical
names of `runtime.sharding.MESH_AXES`. Paths are matched at their end, so that optimizer moments and
averages have the axes of their parameter.
"""

import re
from typing import NamedTuple

BLOCK_STACKS = ("double_blocks", "single_blocks")
"""The transformer's stacks of blocks; on GPUs they are lists of layers (`block_stack`)."""


class ParameterAxes(NamedTuple):
    """Logical names of a parameter's axes, in their order; all empty: copied to every device.

    Attributes:
      inputs: axes of a kernel that are contracted with what the layer is given.
      outputs: axes of what the layer returns.
      stack: ("layers",) if the parameters of several layers are stacked.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    stack: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All axes from first to last."""
        return self.stack + self.inputs + self.outputs


_LAYERS = ("layers",)
_HEADS = ("heads", "head_dim")
COPIED = ParameterAxes()

# End of a parameter's path → its axes; the first match counts.
PARAMETER_AXES: tuple[tuple[str, ParameterAxes], ...] = (
    # MMDiT
    (r"(img|txt)_in/kernel", ParameterAxes(("features",), ("embed",))),
    (r"(time|guidance|vector)_in/in_layer/kernel", ParameterAxes(("features",), ("embed",))),
    (r"(time|guidance|vector)_in/out_layer/kernel", ParameterAxes(("embed",), ("width",))),
    (
        r"(double_mod/(img|txt)|single_mod)/kernel",
        ParameterAxes(("embed",), ("chunks", "modulated"), _LAYERS),
    ),
    (r"final_mod/kernel", ParameterAxes(("embed",), ("chunks", "modulated"))),
    (
        r"(double_blocks/(img|txt)_attn|single_blocks)/[qkv]/kernel",
        ParameterAxes(("embed",), _HEADS, _LAYERS),
    ),
    (
        r"(double_blocks/(img|txt)_attn|single_blocks)/[qkv]/bias",
        ParameterAxes((), _HEADS, _LAYERS),
    ),
    (
        r"(double_blocks/(img|txt)_attn/proj|single_blocks/attn_out)/kernel",
        ParameterAxes(_HEADS, ("embed",), _LAYERS),
    ),
    (
        r"(double_blocks/(img|txt)_mlp/in_layer|single_blocks/mlp_in)/kernel",
        ParameterAxes(("embed",), ("mlp",), _LAYERS),
    ),
    (
        r"(double_blocks/(img|txt)_mlp/in_layer|single_blocks/mlp_in)/bias",
        ParameterAxes((), ("mlp",), _LAYERS),
    ),
    (
        r"(double_blocks/(img|txt)_mlp/out_layer|single_blocks/mlp_out)/kernel",
        ParameterAxes(("mlp",), ("embed",), _LAYERS),
    ),
    (r"final_layer/kernel", ParameterAxes(("embed",), ("features",))),
    # T5
    (r"shared/embedding", ParameterAxes(("features",), ("embed",))),
    (r"blocks/[qkv]/kernel", ParameterAxes(("embed",), _HEADS, _LAYERS)),
    (r"blocks/o/kernel", ParameterAxes(_HEADS, ("embed",), _LAYERS)),
    (r"blocks/wi_[01]/kernel", ParameterAxes(("embed",), ("mlp",), _LAYERS)),
    (r"blocks/wo/kernel", ParameterAxes(("mlp",), ("embed",), _LAYERS)),
    (r"relative_attention_bias/embedding", COPIED),
    # CLIP and the autoencoder are small (0.12 and 0.08 billion): gathering them would cost more
    # than it saves.
    (r"(token_embedding|position_embedding)/embedding", COPIED),
    (r"blocks/([qkv]_proj|out_proj|fc1|fc2)/(kernel|bias)", COPIED),
    (r"(encoder|decoder)/.*(kernel|bias|scale)", COPIED),
    # So are discriminators and the perceptual networks.
    (r"(conv_\d+|head_\d+/project)/kernel", COPIED),
    # Other biases and scales of norms: a few million in all, and a gather for each would be slow.
    (r"(bias|scale)", COPIED),
)
_PATTERNS = tuple((re.compile(rf"(?:^|.*/){pattern}$"), axes) for pattern, axes in PARAMETER_AXES)
# "single_blocks/3/q/kernel" is one layer of "single_blocks/q/kernel".
_LAYER_OF_A_LIST = re.compile(rf"({'|'.join(BLOCK_STACKS)})/\d+/")


def parameter_axes(path: str) -> ParameterAxes | None:
    """Axes of the parameter at the end of a path such as "opt_state/0/mu/img_in/kernel".

    Returns:
      `COPIED` for a parameter that lies whole on every device; None if no rule names it.
    """
    stacked = _LAYER_OF_A_LIST.sub(r"\1/", path)
    axes = next((axes for pattern, axes in _PATTERNS if pattern.match(stacked)), None)
    return axes._replace(stack=()) if axes and stacked != path else axes


def adapter_axes(path: str) -> ParameterAxes | None:
    """Axes of a low-rank adapter: a [*stack, *inputs, rank] or b [*stack, rank, *outputs].

    Returns:
      None if the path is not that of an adapter, or no rule names the adapted kernel.
    """
    module, _, name = path.rpartition("/")
    kernel = parameter_axes(f"{module}/kernel") if name in ("a", "b") else None
    if kernel is None or kernel == COPIED:
        return kernel
    if name == "a":
        return kernel._replace(outputs=("rank",))
    return kernel._replace(inputs=("rank",))


def kernel_axes(module: str) -> ParameterAxes:
    """Axes of a linear module's kernel, for those who need to know its sides.

    Raises:
      ValueError: no rule names inputs and outputs of the kernel.
    """
    axes = parameter_axes(f"{module}/kernel")
    if axes is None or not axes.inputs:
        raise ValueError(
            f"{module}/kernel has no inputs and outputs in PARAMETER_AXES of "
            "kontext_jax/models/parameter_axes.py; add a rule that names them"
        )
    return axes
