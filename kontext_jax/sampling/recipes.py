"""A picture made again from its metadata."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kontext_jax.models.presets import Preset
from kontext_jax.pictures import files as images
from kontext_jax.runtime.placement import format_mesh, num_batch_parts, parse_mesh
from kontext_jax.sampling.pipeline import (
    MAX_BATCH,
    METADATA_FORMAT,
    Place,
    versions,
)
from kontext_jax.sampling.requests import (
    PreparedRequest,
    SampleRequest,
    prepare,
    request_from_dict,
)
from kontext_jax.weights.bundle import AppliedAdapter


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a picture was made, from its metadata."""

    path: Path
    request: SampleRequest
    image_hashes: tuple[str, ...]
    place: Place
    model: str
    weights: str
    dtype: str
    tiling: str
    device: str
    versions: Mapping[str, str]
    mesh: Mapping[str, int]
    loras: tuple[AppliedAdapter, ...] = ()


def read_recipe(path: Path) -> Recipe:
    """Reads how a picture was made.

    Raises:
      FileNotFoundError, ValueError: see `images.read_metadata`; or its metadata is damaged or of
        another format.
    """
    metadata = images.read_metadata(path)
    if metadata.get("format") != METADATA_FORMAT:
        raise ValueError(
            f"image {path} has metadata of format {metadata.get('format')!r}; this version reads "
            f"format {METADATA_FORMAT}"
        )
    try:
        request = request_from_dict(metadata["request"])
        place = Place(int(metadata["place"]["batch_size"]), int(metadata["place"]["row"]))
        mesh = parse_mesh(format_mesh(metadata.get("mesh", {})))
        if not 0 <= place.row < place.batch_size <= MAX_BATCH * num_batch_parts(mesh):
            raise ValueError(f"place {place} is impossible")
        texts = {
            name: str(metadata[name]) for name in ("model", "weights", "dtype", "tiling", "device")
        }
        hashes = tuple(str(image["sha256"]) for image in metadata["images"])
        if len(hashes) != len(request.images):
            raise ValueError(f"{len(request.images)} images with {len(hashes)} hashes")
        loras = tuple(
            AppliedAdapter(str(lora["name"]), str(lora["sha256"]), float(lora["scale"]))
            for lora in metadata.get("loras", ())
        )
        return Recipe(
            *(path, request, hashes, place),
            versions=dict(metadata["versions"]),
            mesh=mesh,
            loras=loras,
            **texts,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"image {path}: its kontext_jax metadata is damaged: {error}") from error


def prepare_again(
    recipe: Recipe, preset: Preset, overrides: Mapping[str, Any]
) -> tuple[PreparedRequest, bool]:
    """The request of a recipe, and whether it is still the same after the overrides.

    An override of `images` by files of the same contents says where they lie now and changes
    nothing.

    Raises:
      FileNotFoundError, ValueError: an image is missing or not the one that was used.
    """
    if "num_steps" in overrides:  # instead of the times of as many steps as there were
        overrides = {"timesteps": None, **overrides}
    elif "timesteps" in overrides:
        overrides = {"num_steps": None, **overrides}
    request = dataclasses.replace(recipe.request, **overrides)
    try:
        prepared = prepare(request, preset)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; {recipe.path} was made from it, say with --image where it is now"
        ) from error
    found = tuple(picture.sha256 for picture in prepared.pictures)
    if found == recipe.image_hashes:
        # The names in the metadata stay as they were.
        moved = [
            dataclasses.replace(picture, name=name)
            for picture, name in zip(prepared.pictures, recipe.request.images, strict=True)
        ]
        request = dataclasses.replace(prepared.request, images=recipe.request.images)
        prepared = dataclasses.replace(prepared, request=request, pictures=tuple(moved))
    elif "images" not in overrides:
        pairs = zip(request.images, found, recipe.image_hashes, strict=True)
        name, now, before = next(pair for pair in pairs if pair[1] != pair[2])
        raise ValueError(
            f"image {name} is not the picture that {recipe.path} was made from: its SHA-256 is "
            f"{now[:12]}…, expected {before[:12]}…; give the right one with --image"
        )
    return prepared, prepared.request == recipe.request


def find_loras(recipe: Recipe) -> list[tuple[str, float]]:
    """Path and scale of every LoRA that a picture was made with, from where they were.

    Raises:
      FileNotFoundError: some are no longer there; all of them are named.
    """
    missing = [lora for lora in recipe.loras if not Path(lora.name).exists()]
    if missing:
        lines = [f"{x.name} (SHA-256 {x.sha256[:12]}…, scale {x.scale})" for x in missing]
        flags = " ".join(f"--lora {x.name}:{x.scale}" for x in recipe.loras)
        raise FileNotFoundError(
            f"{recipe.path} was made with LoRAs that are not where they were: {', '.join(lines)}; "
            f"give all of them where they are now, in this order: {flags}"
        )
    return [(lora.name, lora.scale) for lora in recipe.loras]


def same_loras(these: Sequence[AppliedAdapter], those: Sequence[AppliedAdapter]) -> bool:
    """Whether they are the same contents at the same scales, wherever they lie."""
    return [(x.sha256, x.scale) for x in these] == [(x.sha256, x.scale) for x in those]


def check_loras(recipe: Recipe, found: Sequence[AppliedAdapter]) -> None:
    """Raises `ValueError` if a LoRA is another one than the picture was made with."""
    for then, now in zip(recipe.loras, found, strict=True):
        if then.sha256 != now.sha256:
            raise ValueError(
                f"LoRA {now.name} is not the one that {recipe.path} was made with: its SHA-256 is "
                f"{now.sha256[:12]}…, expected {then.sha256[:12]}…; give the right ones with --lora"
            )


def differences_here(recipe: Recipe) -> list[str]:
    """What may change the last bits: another device or other versions than the picture's."""
    here = {"device": jax.devices()[0].device_kind, **versions()}
    there = {"device": recipe.device, **recipe.versions}
    return [
        f"{name} {there.get(name)} then, {here.get(name)} now"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
