"""The programs of a sampling request: those of `sampling.programs`, for shapes on a target."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kontext_jax.flow.names import Sampler
from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.mmdit import block_form_for
from kontext_jax.models.presets import PRESETS
from kontext_jax.numerics import DIFFUSERS, EXACT
from kontext_jax.pictures import latents
from kontext_jax.plan.programs import Planned
from kontext_jax.plan.targets import Target
from kontext_jax.runtime import placement, sharding
from kontext_jax.runtime.placement import Placement
from kontext_jax.runtime.programs import Program
from kontext_jax.runtime.sharding import MeshConfig, tree_bytes
from kontext_jax.sampling.denoising import Denoising, denoise_arrays
from kontext_jax.sampling.networks import NetworkShapes
from kontext_jax.sampling.programs import StagePrograms
from kontext_jax.sampling.stages import blank_ids
from kontext_jax.sampling.tiling import needs_tiles
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
    num_steps: int = DIFFUSERS.default_num_steps
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
    preset, bundle = PRESETS[request.preset], untrained_bundle(request.preset)
    if request.num_references and not preset.takes_references:
        raise ValueError(f"{request.preset} takes no references; set --references 0")
    mesh = placement.sampling_mesh(request.mesh, list(target.devices))
    is_split = mesh is not None
    if mesh is None:  # shapes have to name the device all the same
        mesh = sharding.make_mesh(MeshConfig(fsdp=1), target.devices[:1])
    there, batch, dtype = Placement(mesh), request.batch_size, jnp.dtype(request.dtype)
    block_form = block_form_for(target.chip.platform)
    networks = NetworkShapes(bundle, dtype, mesh, block_form == "list")
    configs = {kind: component.config for kind, component in bundle.components.items()}
    programs = StagePrograms(configs, dtype, there if is_split else Placement(), block_form)
    mmdit, vae_params = networks.get("mmdit"), networks.get("vae")

    found: dict[str, Program] = {}
    ids = _lying(blank_ids(preset), there.split(None))
    found["text"] = programs.text(networks.get("t5"), networks.get("clip"), ids, mask=False)
    txt, vec = found["text"].result_shapes()
    vae = programs.vae(EXACT.vae_encode_dtype)
    width, height = request.size
    if request.num_references:
        picture = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        found["encode"] = programs.encode(vae, vae_params, _lying(picture, there.split(None)))
    grid = height // vae.downsampling, width // vae.downsampling
    noise = jnp.zeros((batch, *grid, vae.config.z_channels), jnp.float32)
    given = Denoising(
        noise,
        (jnp.zeros((batch, *txt.shape[1:]), dtype), jnp.zeros((batch, *vec.shape[1:]), dtype)),
        request.num_steps,
        sampler=request.sampler,
        seeds=range(batch),
        guidance=np.ones(batch, np.float32) if preset.mmdit.guidance_embed else None,
        references=(noise,) * request.num_references,
    )
    arrays = denoise_arrays(given, preset, configs["mmdit"], dtype)
    times = _lying(arrays.timesteps, there.split(None))
    batched = arrays._replace(timesteps=None)
    arrays = _lying(batched, sharding.batch_shardings(mesh, batched))._replace(timesteps=times)
    found["prepare"] = programs.prepare(mmdit, arrays, EXACT)
    steps = _lying(found["prepare"].result_shapes(), there.split(1))
    bounds = _lying((np.int32(0), np.int32(request.num_steps)), there.split(None))
    found["run"] = programs.run(mmdit, arrays, steps, bounds, request.sampler, EXACT)
    at_once = there.num_batch_parts
    vae = programs.vae(EXACT.vae_decode_dtype)
    x = jax.ShapeDtypeStruct((at_once, *noise.shape[1:]), programs.unscale_dtype(EXACT))
    found["decode"] = programs.decode(
        vae, vae_params, _lying(x, there.split(0 if is_split else None)), 0
    )

    held = {NETWORK_NAMES[kind]: tree_bytes(networks.get(kind)) for kind in NETWORK_NAMES}
    free = target.chip.hbm_bytes - sum(held.values())
    in_tiles = {name for name in ("encode", "decode") if needs_tiles(vae, height, width, free)}
    times_of = {"encode": request.num_references, "decode": batch // at_once}
    return [
        Stage(
            name,
            _planned(name, program, request, mesh, held),
            times_of.get(name, 1),
            request.num_steps if name == "run" else 1,
            name in in_tiles,
        )
        for name, program in found.items()
    ]


def _lying(tree: Any, where: Any) -> Any:
    """Shapes of a tree of arrays, with a sharding for all or a tree of them."""
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=place),
        tree,
        where,
    )


def _planned(
    name: str, program: Program, request: Request, mesh: Mesh, held: dict[str, float]
) -> Planned:
    """The program beside the weights of all networks, which stay in memory."""
    used = {NETWORK_NAMES[kind] for kind in WEIGHTS_USED_BY[name]}
    inputs = tree_bytes(program.args) - sum(held[network] for network in used)
    return Planned(
        title=_title(name, request),
        program=program,
        mesh=mesh,
        purpose="sample",
        held=held | {"inputs": inputs},
        beside=tuple(network for network in held if network not in used),
        flops=_flops(request) if name == "run" else None,
        images=request.batch_size,
    )


def _num_image_tokens(request: Request) -> int:
    return latents.num_tokens(*request.size) * (1 + request.num_references)


def _flops(request: Request) -> float:
    """Operations of all steps."""
    preset = PRESETS[request.preset]
    once = mmdit_flops(preset.mmdit, preset.max_text_tokens, _num_image_tokens(request)).forward
    return once * request.num_steps * request.batch_size


def _title(name: str, request: Request) -> str:
    width, height = request.size
    num_tokens = _num_image_tokens(request) + PRESETS[request.preset].max_text_tokens
    return {
        "text": "text encoders: one prompt",
        "encode": f"autoencoder: a {width}×{height} reference to latents",
        "prepare": f"modulation of all {request.num_steps} steps",
        "run": f"denoiser: {request.batch_size} × {width}×{height}, {request.num_references} "
        f"reference(s), {num_tokens} tokens, {request.num_steps} steps",
        "decode": f"autoencoder: latents to a {width}×{height} picture",
    }[name]
