"""Where the parts of a model lie: diffusers' folders, BFL's files, single files, or the hub.

For each part the places below are tried in order, in the folder given or the folder of the file
given:

    transformer    transformer/            flux1-*.safetensors
    autoencoder    vae/                    ae.safetensors
    T5 encoder     text_encoder_2/  t5/    t5xxl*.safetensors
    CLIP encoder   text_encoder/  clip/    clip_l*.safetensors
    T5 tokenizer   tokenizer_2/  tokenizers/t5/    t5/    text_encoder_2/
    CLIP tokenizer tokenizer/    tokenizers/clip/  clip/  text_encoder/

A file that is named itself comes first, for every part that it holds (ComfyUI's all-in-one files
hold them all).
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.io import ForeignComponent, open_components
from convert_weights.layouts import TITLES, guess_preset, preset_for, read_json_object
from convert_weights.rules import WeightMismatchError
from convert_weights.scheduler import read_sampling
from kontext_jax.models.presets import MMDiTConfig, Preset
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.bundle import KINDS

PLACES = {
    "mmdit": ("transformer/", "flux1-*.safetensors"),
    "vae": ("vae/", "ae.safetensors"),
    "t5": ("text_encoder_2/", "t5/", "t5xxl*.safetensors"),
    "clip": ("text_encoder/", "clip/", "clip_l*.safetensors"),
}
TOKENIZER_PLACES = {
    "t5": ("tokenizer_2/", "tokenizers/t5/", "t5/", "text_encoder_2/"),
    "clip": ("tokenizer/", "tokenizers/clip/", "clip/", "text_encoder/"),
}
TOKENIZER_FILES = {
    "t5": ("tokenizer.json", "spiece.model"),
    "clip": ("tokenizer.json", "vocab.json"),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass
class ModelSource:
    """The components found, opened but unread, and where the tokenizers are."""

    components: dict[str, ForeignComponent]
    tokenizer_dirs: dict[str, Path]
    hints: list[str]  # names that may tell which model it is, most telling first
    where: str
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `read_sampling`

    def close(self) -> None:
        """Closes every file."""
        for component in self.components.values():
            component.close()

    def preset(self, name: str | None) -> Preset | None:
        """The preset `name`, or the one the names tell; None without a transformer and a name.

        Raises:
          WeightMismatchError: it cannot be told, or `name` does not fit the transformer.
        """
        configs = {kind: component.config for kind, component in self.components.items()}
        if name is None:
            if not isinstance(mmdit := configs.get("mmdit"), MMDiTConfig):
                return None
            name = guess_preset(mmdit, self.hints, self.where)
        return dataclasses.replace(preset_for(name, configs, self.where), **self.sampling)


def _matches(folder: Path, place: str) -> list[Path]:
    if place.endswith("/"):
        return [folder / place] if (folder / place).is_dir() else []
    return sorted(folder.glob(place))


def _is_weights(path: Path) -> bool:
    return path.is_file() or any(path.glob("*.safetensors"))


def _find(folder: Path, kind: str) -> Path | None:
    for place in PLACES[kind]:
        found = [path for path in _matches(folder, place) if _is_weights(path)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise WeightMismatchError(
                f"{folder}: several files may be the {TITLES[kind]} ({names}); name the one "
                "you mean"
            )
        if found:
            return found[0]
    return None


def find_tokenizers(folder: Path) -> dict[str, Path]:
    """The tokenizer folders beside or in `folder`, by kind."""
    return {
        kind: found[0]
        for kind, places in TOKENIZER_PLACES.items()
        if (
            found := [
                folder / place
                for place in places
                if any((folder / place / name).is_file() for name in TOKENIZER_FILES[kind])
            ]
        )
    }


def tokenizer_kind(folder: Path) -> str | None:
    """Which tokenizer the files directly in `folder` are, told by their vocabulary or class."""
    if (folder / "spiece.model").is_file():
        return "t5"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return "clip"
    if not (folder / "tokenizer.json").is_file():
        return None
    config = folder / "tokenizer_config.json"
    name = str(read_json_object(config).get("tokenizer_class")) if config.is_file() else ""
    return "t5" if "T5" in name else "clip" if "CLIP" in name else None


def naming_hints(path: Path, components: dict[str, ForeignComponent]) -> list[str]:
    """Names that may tell which model the weights at `path` are, most telling first."""
    hints = []
    if (path / "model_index.json").is_file():
        index = read_json_object(path / "model_index.json")
        hints.append(str(index.get("_name_or_path", "")))
        if "Kontext" in str(index.get("_class_name", "")):
            hints.append("kontext")
    if "mmdit" in components:
        mmdit = components["mmdit"]
        hints += [mmdit.reader.metadata.get("modelspec.title", ""), mmdit.path.stem]
    return [*hints, path.resolve().stem, path.resolve().parent.name]


def find_model(
    path: str | Path,
    kinds: Iterable[str] = KINDS,
    complete: bool = True,
    axes_dim: tuple[int, ...] | None = None,
) -> ModelSource:
    """Opens the parts of the model at `path`.

    Args:
      path: a diffusers folder, a folder of BFL's files, one such file, or a hub id `owner/name`.
      kinds: the components wanted.
      complete: whether all of them and both tokenizers must be there.
      axes_dim: channels of the rotary axes, see `layouts.infer_config`.

    Raises:
      WeightMismatchError: something is missing (all of it named, with the places looked at), or is
        not what its place says.
    """
    given, path = str(path), resolve(path)
    folder = path if path.is_dir() else path.parent
    components: dict[str, ForeignComponent] = {}
    try:
        if path.is_file():
            components |= open_components(path, axes_dim=axes_dim)
        for kind in kinds:
            if kind not in components and (place := _find(folder, kind)) is not None:
                components |= open_components(place, kind, axes_dim=axes_dim)
        tokenizers = find_tokenizers(folder)
        if complete:
            _require(folder, kinds, components, tokenizers)
        hints = naming_hints(path, components)
        if not Path(given).exists():
            hints.append(given)  # a hub id; its snapshot's folder is named by a hash
        return ModelSource(components, tokenizers, hints, given, read_sampling(folder))
    except BaseException:
        for component in components.values():
            component.close()
        raise


def _require(folder: Path, kinds: Iterable[str], components: dict, tokenizers: dict) -> None:
    lines = [
        f"- {TITLES[kind]}: none of {', '.join(PLACES[kind])}"
        for kind in kinds
        if kind not in components
    ]
    lines += [
        f"- {kind.upper()} tokenizer: none of {', '.join(places)} "
        f"with {' or '.join(TOKENIZER_FILES[kind])}"
        for kind, places in TOKENIZER_PLACES.items()
        if kind not in tokenizers
    ]
    if lines:
        raise WeightMismatchError(
            f"{folder}: not a whole model; looked here for\n  " + "\n  ".join(lines)
        )


def resolve(path: str | Path) -> Path:
    """`path` if it exists, or the local snapshot of the hub model it names.

    Raises:
      WeightMismatchError: neither; the message says why the hub did not help.
    """
    local = Path(path)
    if local.exists():
        return local
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise WeightMismatchError(
            f"{path}: no such file or folder (and not a hub id, which is owner/name)"
        )
    return download(path)


def download(repo: str) -> Path:
    """The local snapshot of the hub model `repo`: weights, configs and tokenizers, no pickles.

    Where a repository holds a diffusers folder, BFL's single files beside it are not downloaded:
    they are the same weights again.
    """
    import huggingface_hub

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model"]
    # The hub's client lets errors of whatever HTTP library it uses through, so none can be named.
    try:
        siblings = huggingface_hub.HfApi().model_info(repo, timeout=20).siblings or ()
        files = [sibling.rfilename for sibling in siblings]
        ignored = None
        if "model_index.json" in files:
            ignored = [name for name in files if "/" not in name and name.endswith(".safetensors")]
        return Path(
            huggingface_hub.snapshot_download(
                repo, allow_patterns=patterns, ignore_patterns=ignored
            )
        )
    except Exception as error:
        try:  # what was downloaded earlier serves as well
            return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except Exception:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightMismatchError(
                f"{repo}: no such file or folder here, and the Hugging Face hub could not supply "
                f"it: {reason}. Check the name and the network; gated models (FLUX.1 dev, Kontext) "
                "need their licence accepted and `hf auth login`"
            ) from None


def open_foreign_bundle(path: str | Path, preset: str | None = None) -> checkpoint.ModelBundle:
    """A whole model in a published layout, translated while it is read.

    Every leaf is put on its device and its host copy freed before the next one is read, so the host
    never holds more than one stacked parameter.

    Args:
      path: a diffusers folder, BFL's files (a folder, or the transformer's file with the rest
        beside it; the module says where each part is looked for), or a hub id `owner/name`.
      preset: which model it is, where names do not tell.

    Raises:
      TensorFileError, WeightMismatchError: a part is missing, damaged or not what it should be.
    """
    source = find_model(path)
    try:
        chosen = source.preset(preset)
        assert chosen is not None, "a model has a transformer"
        readers = {kind: component.reader for kind, component in source.components.items()}
        identity = checkpoint.fingerprint(readers)
    except BaseException:
        source.close()
        raise
    components = {
        kind: checkpoint.Component(component.config, _loader(component), _identity(component))
        for kind, component in source.components.items()
    }
    namings = ", ".join(sorted({component.naming for component in source.components.values()}))
    line = f"{path} ({chosen.name}, {namings} layout, translated while being read)"
    return checkpoint.ModelBundle(chosen, components, source.tokenizer_dirs, line, identity)


def _loader(component: ForeignComponent):
    def load(dtype=None, device=None, edits=checkpoint.NO_EDITS):
        dtype = checkpoint.as_dtype(dtype)

        def read(path: str) -> np.ndarray:
            stored = component.leaves[path].dtype
            return checkpoint.read_edited(path, component.read_leaf, dtype, stored, edits)

        return checkpoint.place_leaves(component.leaves, read, device)

    return load


def _identity(component: ForeignComponent):
    def identity() -> str:
        shapes = {path: info.shape for path, info in component.leaves.items()}
        float32 = checkpoint.as_dtype("float32")
        return checkpoint.weights_identity(shapes, lambda p: component.read_leaf(p, float32))

    return identity
