"""Prompts to token ids, by the tokenizers of T5 and CLIP.

T5 carries the detail and reads up to 512 tokens, padded; CLIP reads 77 and gives one vector for the
whole text.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from kontext_jax.models.presets import CLIPConfig, T5Config

MAX_T5_TOKENS = 512
CLIP_TOKENS = 77

T5_PAD, T5_END = "<pad>", "</s>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextIds:
    """Token ids of a batch of prompts, ready for the encoders."""

    t5: np.ndarray  # int32 [B, T]
    clip: np.ndarray  # int32 [B, 77]
    t5_mask: np.ndarray  # bool [B, T], False on padding


class Tokenizers:
    """The T5 and CLIP tokenizers of a model, each loaded when first used.

    Args:
      t5: folder with `tokenizer.json`, or `spiece.model` alone; or the id of a repository on the
        Hugging Face hub.
      clip: folder of CLIP's tokenizer, with `tokenizer.json`, or `vocab.json` and `merges.txt`.
    """

    def __init__(self, t5: str | Path, clip: str | Path):
        self._sources = {"t5": t5, "clip": clip}

    @functools.cached_property
    def _t5(self):
        return _load_tokenizer("t5", find_tokenizer_dir(self._sources["t5"]), (T5_END,))

    @functools.cached_property
    def _clip(self):
        folder = find_tokenizer_dir(self._sources["clip"])
        tokenizer = _load_tokenizer("clip", folder, (CLIP_START, CLIP_END))
        return tokenizer, _pad_id(tokenizer, folder)

    def tokenize(
        self,
        prompts: Sequence[str],
        max_text_tokens: int = MAX_T5_TOKENS,
        t5_prompts: Sequence[str] | None = None,
    ) -> tuple[TextIds, list[str]]:
        """Ids of `prompts`, and one line for every prompt that T5 sees only the beginning of.

        T5's ids are padded to `max_text_tokens`. CLIP's are cut and padded to 77 without a word:
        prompts are often longer, and T5 carries the detail.

        Args:
          t5_prompts: what T5 reads instead, one for each prompt (diffusers' `prompt_2`).

        Raises:
          TypeError: if prompts are one string.
          ValueError: if max_text_tokens is out of range or the two lists differ in length.
        """
        if isinstance(prompts, str) or isinstance(t5_prompts, str):
            raise TypeError("prompts must be a list of strings, found one string; put it in a list")
        if not 1 <= max_text_tokens <= MAX_T5_TOKENS:
            raise ValueError(
                f"max_text_tokens is {max_text_tokens}; the models take 1 to {MAX_T5_TOKENS}"
            )
        t5_prompts = prompts if t5_prompts is None else t5_prompts
        if len(t5_prompts) != len(prompts):
            raise ValueError(f"found {len(prompts)} prompts and {len(t5_prompts)} t5_prompts")

        pad = self._t5.token_to_id(T5_PAD)
        t5_ids = np.full((len(prompts), max_text_tokens), pad, np.int32)
        mask = np.zeros(t5_ids.shape, bool)
        notices = []
        for row, prompt in enumerate(t5_prompts):
            encoded = self._t5.encode(prompt)
            ids = _truncate(encoded.ids, max_text_tokens)
            t5_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
            if len(encoded.ids) > max_text_tokens:
                rest = prompt[encoded.offsets[max_text_tokens - 1][0] :].strip()
                notices.append(_truncation_notice(len(encoded.ids), max_text_tokens, rest))

        clip, clip_pad = self._clip
        clip_ids = np.full((len(prompts), CLIP_TOKENS), clip_pad, np.int32)
        for row, prompt in enumerate(prompts):
            ids = _truncate(clip.encode(prompt).ids, CLIP_TOKENS)
            clip_ids[row, : len(ids)] = ids
        return TextIds(t5_ids, clip_ids, mask), notices

    def fingerprints(self) -> dict[str, str]:
        """Hash of each tokenizer's files, of those that are read."""
        hashes = {}
        for kind, source in self._sources.items():
            digest = hashlib.sha256()
            for path in _tokenizer_files(kind, find_tokenizer_dir(source)):
                digest.update(path.read_bytes())
            if kind == "clip":
                digest.update(str(self._clip[1]).encode())  # padding, which other files tell
            hashes[kind] = digest.hexdigest()
        return hashes

    def check_fit(self, t5: T5Config, clip: CLIPConfig) -> None:
        """Refuses tokenizers that make ids the encoders have no embedding for.

        Raises:
          ValueError: if a vocabulary is larger than its encoder's, or CLIP's pooling looks for
            another end-of-text id than the tokenizer writes.
        """
        tokenizer, _ = self._clip
        for name, vocabulary, config in (("T5", self._t5, t5), ("CLIP", tokenizer, clip)):
            highest = max(vocabulary.get_vocab().values())
            if highest >= config.vocab_size:
                raise ValueError(
                    f"the {name} tokenizer has ids up to {highest}, the {name} encoder embeds "
                    f"{config.vocab_size}: they belong to different models"
                )
        end = tokenizer.token_to_id(CLIP_END)
        legacy_end = max(tokenizer.get_vocab().values())
        wanted = legacy_end if clip.eos_token_id == 2 else clip.eos_token_id
        if end != wanted:
            raise ValueError(
                f"the CLIP tokenizer ends a text with id {end}, the CLIP encoder pools at id "
                f"{wanted} (eos_token_id {clip.eos_token_id}): they belong to different models"
            )


def find_tokenizer_dir(source: str | Path) -> Path:
    """The folder itself, or that of a hub repository's tokenizer files, downloaded on first use.

    Raises:
      FileNotFoundError: if it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    # Slow to import, and not needed for local folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(str(source))
        return Path(snapshot_download(str(source), allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no tokenizer at {str(source)!r}: it is no folder here, and the Hugging Face hub "
            f"says: {error}"
        ) from error


def _tokenizer_files(kind: str, folder: Path) -> list[Path]:
    """What a tokenizer is read from.

    Raises:
      FileNotFoundError: it is not there.
    """
    instead = {"t5": ["spiece.model"], "clip": ["vocab.json", "merges.txt"]}[kind]
    for names in (["tokenizer.json"], instead):
        if all((folder / name).exists() for name in names):
            return [folder / name for name in names]
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"{folder} holds no {kind} tokenizer: expected tokenizer.json, or "
        f"{' and '.join(instead)}; found {', '.join(found) or 'nothing'}"
    )


def _load_tokenizer(kind: str, folder: Path, framing: tuple[str, ...]):
    """A `tokenizers.Tokenizer` that neither cuts nor pads.

    `tokenizer.json` is read by the `tokenizers` library, on which those of transformers are built;
    the other formats are converted by transformers itself, whose import takes seconds.

    Args:
      framing: what the tokenizer must make of an empty text.
    """
    first = _tokenizer_files(kind, folder)[0]
    if first.name == "tokenizer.json":
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(first))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{first} is no tokenizer file: {error}") from error
    else:
        class_name = {"t5": "T5Tokenizer", "clip": "CLIPTokenizer"}[kind]
        tokenizer = _convert_tokenizer(class_name, folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    made = tokenizer.encode("").tokens
    if made != list(framing):
        raise ValueError(
            f"the tokenizer in {folder} is no {kind} tokenizer: it makes {made} of an empty text, "
            f"expected {list(framing)}"
        )
    return tokenizer


def _convert_tokenizer(class_name: str, folder: Path):
    """The backend of a tokenizer that transformers makes of a folder's files."""
    # Or it tells everyone that PyTorch was not found.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    tokenizer_class = getattr(transformers, class_name)  # by name: AutoTokenizer imports torch
    try:
        return tokenizer_class.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # from Rust, and misleading for a damaged spiece.model
        raise ValueError(
            f"the tokenizer files in {folder} cannot be read; they may be damaged, or the package "
            f"sentencepiece missing (transformers says: {error})"
        ) from error


def _pad_id(tokenizer, folder: Path) -> int:
    """CLIP's padding: the token that the folder names, or the end-of-text token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        try:
            fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file: {error}") from error
        if token := fields.get("pad_token"):
            break
    else:
        token = CLIP_END
    if isinstance(token, dict):
        token = token["content"]
    pad_id = tokenizer.token_to_id(token)
    if pad_id is None:
        raise ValueError(f"{path} names the pad_token {token!r}, which the vocabulary lacks")
    return pad_id


def _truncate(ids: list[int], limit: int) -> list[int]:
    """The first ids, with the end-of-text id kept as the last."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def _truncation_notice(num_tokens: int, limit: int, rest: str) -> str:
    if len(rest) > 80:
        rest = rest[:80].rstrip() + "…"
    return f"prompt has {num_tokens} tokens; the last {num_tokens - limit} were cut: “{rest}”"
