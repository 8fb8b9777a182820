"""The programs of a sampling request, found by letting the stages run without computing.

`Stages` goes through a request as ever, but what it would compile is written down, with the shapes
and places of its arguments, and zeros are what comes out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.flow.names import Sampler
from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.mmdit import block_form_for, unstacked
from kontext_jax.models.parameter_sharding import state_shardings
from kontext_jax.models.presets import PRESETS
from kontext_jax.models.vae import VAE
from kontext_jax.models.vae_tiling import vae_peak_bytes
from kontext_jax.pictures import latents
from kontext_jax.plan.programs import Planned
from kontext_jax.plan.targets import Target
from kontext_jax.runtime import placement, sharding
from kontext_jax.runtime.programs import Program, precision_of
from kontext_jax.runtime.sharding import MeshConfig, tree_bytes
from kontext_jax.sampling.stages import Stages
from kontext_jax.sampling.warming import BlankTokenizers
from kontext_jax.weights.bundle import parameter_shapes
from kontext_jax.weights.untrained import untrained_bundle

WEIGHTS_USED_BY = {  # program → networks whose weights are its arguments
    "text": ("t5", "clip"),
    "encode": ("vae",),
    "prepare": ("mmdit",),
    "run": ("mmdit",),
    "decode": ("vae",),
}
NETWORK_NAMES = {"mmdit": "transformer", "vae": "autoencoder", "t5": "T5", "clip": "CLIP"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be sampled.

    Attributes:
      size: (width, height) in pixels, of the target and of each reference.
      mesh: sizes by axis, as `placement.parse_mesh` reads them; {}: one device.
    """

    preset: str = "kontext-dev"
    size: tuple[int, int] = (1024, 1024)
    num_references: int = 1
    num_steps: int = 28
    sampler: Sampler = "euler"
    batch_size: int = 1
    dtype: str = "bfloat16"
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program of a request, and how often it runs in one."""

    name: str
    planned: Planned
    times: int = 1
    repeats: int = 1  # of its loop of unknown length
    in_tiles: bool = False  # it would not fit whole; what runs are tiles, which are not compiled


def sampling_stages(request: Request, target: Target) -> list[Stage]:
    """The programs of a request in the order in which they run.

    Raises:
      ValueError: the preset takes no references, or the mesh does not fit the devices.
    """
    preset = PRESETS[request.preset]
    if request.num_references and not preset.takes_references:
        raise ValueError(f"{request.preset} takes no references; set --references 0")
    mesh = placement.sampling_mesh(request.mesh, list(target.devices))
    if mesh is None:
        one = MeshConfig(fsdp=1)
        mesh = sharding.make_mesh(one, target.devices[:1])
    stages = _PlannedStages(request, mesh, target)
    width, height = request.size
    grid = height // preset.vae.downsampling, width // preset.vae.downsampling
    batch, dtype = request.batch_size, jnp.dtype(request.dtype)
    noise = jnp.zeros((batch, *grid, preset.vae.z_channels), np.float32)
    txt, vec = stages.encode_text("a prompt")
    txt, vec = (jnp.zeros((batch, *x.shape[1:]), dtype) for x in (txt, vec))
    references = ()
    if request.num_references:
        stages.encode_picture(np.zeros((height, width, 3), np.uint8))
        references = (noise,) * request.num_references
    guidance = np.ones(batch, np.float32) if preset.mmdit.guidance_embed else None
    x = stages.denoise(
        noise,
        txt,
        vec,
        num_steps=request.num_steps,
        sampler=request.sampler,
        seeds=range(batch),
        guidance=guidance,
        references=references,
    )
    at_once = stages.num_batch_parts
    stages.decode(x[:at_once])

    times = {"encode": request.num_references, "decode": batch // at_once}
    repeats = {"run": request.num_steps}
    return [
        Stage(name, planned, times.get(name, 1), repeats.get(name, 1), name in stages.in_tiles)
        for name, planned in stages.programs().items()
    ]


class _NoPlacement(placement.Placement):
    """Leaves arrays where they are, and remembers where they should have gone."""

    def __init__(self, mesh: Mesh):
        super().__init__(mesh)
        object.__setattr__(self, "remembered", {})

    def split(self, axis: int | None = 0) -> None:
        return None

    def place(self, batch: Any) -> Any:
        self.remember(batch, sharding.batch_shardings(self.mesh, batch))
        return batch

    def remember(self, tree: Any, places: Any) -> None:
        for leaf, where in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
            self.remembered[id(leaf)] = leaf, where


class _PlannedStages(Stages):
    """Stages that write down what they would compile."""

    def __init__(self, request: Request, mesh: Mesh, target: Target):
        super().__init__(untrained_bundle(request.preset), dtype=request.dtype)
        self._request, self._target, self._mesh = request, target, mesh
        self._placement = _NoPlacement(mesh)
        self._block_form = block_form_for(target.chip.platform)
        self._tokenizers = BlankTokenizers(self.preset)
        self._found: dict[str, Planned] = {}
        self.in_tiles: set[str] = set()

    @property
    def num_batch_parts(self) -> int:
        return self._placement.num_batch_parts

    def programs(self) -> dict[str, Planned]:
        """By name, each with the weights of all networks, which stay in memory."""
        held = {NETWORK_NAMES[kind]: tree_bytes(self._load(kind)) for kind in NETWORK_NAMES}
        found = {}
        for name, planned in self._found.items():
            used = {NETWORK_NAMES[kind] for kind in WEIGHTS_USED_BY[name]}
            inputs = tree_bytes(planned.program.args) - sum(held[network] for network in used)
            found[name] = dataclasses.replace(
                planned,
                held=held | {"inputs": inputs},
                beside=tuple(network for network in held if network not in used),
            )
        return found

    def _load(self, kind: str) -> Any:
        if kind not in self._params:
            dtype = jnp.float32 if kind == "vae" else self._compute_dtype
            shapes = parameter_shapes(kind, self.bundle.components[kind].config)
            if kind == "mmdit" and self._block_form == "list":
                shapes = jax.eval_shape(unstacked, shapes)
            self._params[kind] = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where),
                shapes,
                state_shardings(self._mesh, shapes),
            )
        return self._params[kind]

    def _tile_px(self, vae: VAE, height_px: int, width_px: int) -> int | None:
        held = sum(tree_bytes(self._load(kind)) for kind in NETWORK_NAMES)
        free = self._target.chip.hbm_bytes - held
        self._needs_tiles = vae_peak_bytes(vae.config, height_px, width_px, vae.dtype) > 0.9 * free
        return None

    def _compile(self, key, make, *args, dtype: Any = None, batch_axis: int | None = None):
        name = key[0]
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        real, is_split = placement.Placement(self._mesh), self._mesh.size > 1

        def shape_of(x: Any) -> jax.ShapeDtypeStruct:
            if isinstance(x, jax.ShapeDtypeStruct):
                return x
            _, where = self._placement.remembered.get(id(x), (x, everywhere))
            return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=where)

        if name in ("encode", "decode") and self._needs_tiles:
            self.in_tiles.add(name)
        shapes = jax.tree.map(shape_of, args)
        program = Program(
            key,
            make,
            shapes,
            out_shardings=real.split(batch_axis) if is_split else None,
            precision=precision_of(self._compute_dtype if dtype is None else dtype),
            mesh=self._mesh if is_split else None,
        )
        self._found[name] = Planned(
            title=self._title(name, args),
            program=program,
            mesh=self._mesh,
            purpose="sample",
            flops=self._flops() if name == "run" else None,
            images=self._request.batch_size,
        )

        def run(*args):
            results = program.result_shapes()
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
            self._placement.remember(zeros, jax.tree.map(lambda _: real.split(batch_axis), zeros))
            return zeros

        return run

    def _finite(self, x: Any, what: str) -> Any:
        return x

    def _num_tokens(self) -> int:
        width, height = self._request.size
        tokens = latents.num_tokens(width, height) * (1 + self._request.num_references)
        return tokens + self.preset.max_text_tokens

    def _flops(self) -> float:
        num_text = self.preset.max_text_tokens
        once = mmdit_flops(self.preset.mmdit, num_text, self._num_tokens() - num_text).forward
        return once * self._request.num_steps * self._request.batch_size

    def _title(self, name: str, args: tuple) -> str:
        request = self._request
        width, height = request.size
        return {
            "text": "text encoders: one prompt",
            "encode": f"autoencoder: a {width}×{height} reference to latents",
            "prepare": f"modulation of all {request.num_steps} steps",
            "run": f"denoiser: {request.batch_size} × {width}×{height}, {request.num_references} "
            f"reference(s), {self._num_tokens()} tokens, {request.num_steps} steps",
            "decode": f"autoencoder: latents to a {width}×{height} picture",
        }[name]
