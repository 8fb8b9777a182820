"""The model that flags mean: its weights and its LoRAs."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these take JAX or NumPy with them
    from kontext_jax.sampling.recipes import Recipe
    from kontext_jax.weights.bundle import ModelBundle

# What --model can name where there are no --weights, besides the models of the package.
SHIPPED, UNTRAINED = "tiny", "untrained"
Flags = Mapping[str, Any]


def choose_weights(flags: Flags, recipe: "Recipe | None") -> "ModelBundle":
    """The bundle that the flags mean, or else the one that a picture was made with.

    Raises:
      ValueError, OSError: there is none, or it is not the picture's.
    """
    model = model_named(flags, recipe)
    bundle = open_weights(
        *(flags.get("weights"), model, flags.get("raw_params", False), flags.get("checkpoint")),
        shapes_suffice=flags.get("compile_only", False),
    )
    if recipe and bundle.identity != recipe.weights:
        raise ValueError(
            f"{recipe.path} was made with {recipe.model} weights {recipe.weights[:12]}…, found "
            f"{bundle.preset.name} {bundle.identity[:12]}…; give the same with --weights"
        )
    return bundle


def model_named(flags: Flags, recipe: "Recipe | None") -> str | None:
    """The model of --model, or else the one of the package that a picture was made by."""
    if recipe and not flags.get("weights"):
        return flags.get("model") or model_of(recipe)
    return flags.get("model")


def open_weights(
    weights: str | None,
    model: str | None,
    raw_params: bool = False,
    step: int | None = None,
    shapes_suffice: bool = False,
) -> "ModelBundle":
    """The bundle that --weights, --model, --raw-params and --checkpoint mean."""
    from kontext_jax.models.presets import PRESETS
    from kontext_jax.terminal import did_you_mean
    from kontext_jax.weights import bundle as checkpoint
    from kontext_jax.weights.untrained import untrained_bundle

    model_or_shipped = model or SHIPPED
    if weights is None and model_or_shipped in checkpoint.PACKAGED:
        return checkpoint.shipped_bundle(model_or_shipped)
    if weights is None and model == UNTRAINED:
        return untrained_bundle("tiny")
    names = tuple(PRESETS)
    if weights is None:
        names = tuple(dict.fromkeys((*checkpoint.PACKAGED, *PRESETS, UNTRAINED)))
    if model is not None and model not in names:
        raise ValueError(
            f"there is no model {model!r}{did_you_mean(model, names)}; models are "
            f"{', '.join(names)}"
        )
    if weights is None and shapes_suffice:
        return untrained_bundle(model)
    if weights is None:
        raise ValueError(
            f"{model} needs its weights; give --weights PATH, or use --model {SHIPPED} without any"
        )
    from convert_weights.open import open_weights as open_any

    return open_any(weights, model, which="params" if raw_params else None, step=step)


def packaged() -> tuple[str, ...]:
    """Names of the models of the package."""
    from kontext_jax.weights.bundle import PACKAGED

    return tuple(PACKAGED)


def model_of(recipe: "Recipe") -> str:
    """The model that a picture was made by, if it needed no --weights; else its preset."""
    from kontext_jax.weights import bundle as checkpoint

    for name, folder in checkpoint.PACKAGED.items():
        if folder.is_dir() and recipe.weights == checkpoint.shipped_bundle(name).identity:
            return name
    return UNTRAINED if recipe.model == "tiny" else recipe.model


def parse_lora(text: str) -> tuple[str, float]:
    """Path and scale of `FILE[:SCALE]`.

    Raises:
      ValueError: there is no such file, or the scale is no finite number.
    """
    path, scale = text, 1.0
    if not Path(text).exists() and ":" in text:
        path, _, number = text.rpartition(":")
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ValueError(f"--lora {text}: the scale is {number!r}; expected one such as 0.7")
    if not Path(path).exists():
        raise ValueError(f"--lora {text}: there is no file {path}")
    return path, scale


def add_loras(
    bundle: "ModelBundle", given: list[str] | None, recipe: "Recipe | None"
) -> "tuple[ModelBundle, bool]":
    """The bundle with the LoRAs of --lora, or else those that a picture was made with.

    Returns:
      (bundle, whether they are those of the picture).
    """
    from convert_weights.lora.read import open_adapter
    from kontext_jax.sampling.recipes import (
        check_loras,
        find_loras,
        same_loras,
    )
    from kontext_jax.weights import adapters

    if given is not None:
        wanted = [parse_lora(text) for text in given]
    else:
        wanted = find_loras(recipe) if recipe else []
    configs = {kind: component.config for kind, component in bundle.components.items()}
    loras = [(open_adapter(path, configs), scale) for path, scale in wanted]
    bundle = adapters.with_adapters(bundle, loras)
    if recipe is None:
        return bundle, True
    if given is None:
        check_loras(recipe, bundle.adapters)
    if not same_loras(recipe.loras, bundle.adapters):
        return bundle, False
    # The names in the metadata stay as they were, wherever the files lie now.
    return dataclasses.replace(bundle, adapters=recipe.loras), True
