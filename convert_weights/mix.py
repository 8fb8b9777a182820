"""Two models whose transformers are of one size, mixed: a point on the line between their weights.

What a fine-tune or a distillation learnt from narrow data is mostly kept, and much of what it
forgot comes back (Wortsman et al., arXiv:2109.01903); docs/distillation.md has figures.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert_weights import notice
from convert_weights.compare import config_differences
from convert_weights.layouts import TITLES
from convert_weights.open import open_weights
from convert_weights.rules import WeightMismatchError
from convert_weights.to_jax import Advance, Summary, copy_tokenizer, require_room
from kontext_jax.runtime.atomic import write_folder
from kontext_jax.storage.safetensors_reader import dtype_name
from kontext_jax.trees import flatten
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.bundle import Component, ModelBundle
from kontext_jax.weights.run import own_defaults


def mix(
    a: str,
    b: str,
    share: float,
    out: Path,
    dtype: np.dtype | None = None,
    start: Callable[[int], Advance] = lambda total: lambda count: None,
) -> Summary:
    """Writes the weight directory `out`: its transformer is (1 − share)·a + share·b, all else b's.

    Sums are in float32 and rounded once. Both transformers are in memory, in the dtypes they are
    stored in or `dtype`.

    Args:
      a, b: whatever `open_weights` takes.
      share: share of b, between 0 and 1.
      dtype: dtype of all parameters; None keeps b's.
      start: told the number of the transformer's bytes, returns the progress callback.

    Raises:
      ValueError, OSError: and nothing is left on disk.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share:g}; expected a number between 0 (all A) and 1 (all B)")
    first, second = open_weights(a, complete=False), open_weights(b, complete=False)
    theirs, ours = _transformer(first, a), _transformer(second, b)
    differing = config_differences(theirs.config, ours.config)
    if differing:
        raise WeightMismatchError(
            f"{a} and {b} hold transformers of different sizes: {'; '.join(differing)}"
        )
    others = dict(flatten(theirs.load()))
    require_room(out, sum(leaf.nbytes for leaf in others.values()))
    advance = start(4 * sum(leaf.size for leaf in others.values()))

    def between(path: str) -> Callable[[np.ndarray], np.ndarray]:
        def edit(own: np.ndarray) -> np.ndarray:
            other = np.asarray(others.pop(path), np.float32)
            advance(own.nbytes)
            return other + np.float32(share) * (own - other)

        return edit

    preset, kinds = second.preset, list(second.components)
    defaults = own_defaults(preset)
    shift = defaults.pop("shift_timesteps", None)
    licence = notice.licence_of(preset, has_transformer=True)
    source = f"{1 - share:g} × {first.source} + {share:g} × {second.source}"
    count, written = 0, 0
    dtypes: set[str] = set()

    def fill(folder: Path) -> None:
        nonlocal count, written
        for kind in kinds:
            component = second.components[kind]
            edits = {path: between(path) for path in others} if component is ours else {}
            params = component.load(dtype=dtype, edits=edits)
            checkpoint.save_component(folder, kind, component.config, params)
            leaves = [leaf for _, leaf in flatten(params)]
            count += sum(leaf.size for leaf in leaves)
            written += sum(leaf.nbytes for leaf in leaves)
            dtypes.update(dtype_name(np.dtype(leaf.dtype)) for leaf in leaves)
        for name, files in second.tokenizer_dirs.items():
            copy_tokenizer(files, folder / "tokenizers" / name)
        what = "transformers mixed by kontext_jax, all else of the second"
        (folder / "NOTICE").write_text(notice.notice_text(source, what, licence), "utf-8")
        checkpoint.write_manifest(folder, preset.name, kinds, source, licence, shift, defaults)

    write_folder(out, fill)
    return Summary(kinds, count, written, preset.name, sorted(dtypes), [source])


def _transformer(bundle: ModelBundle, path: str) -> Component:
    if "mmdit" not in bundle.components:
        raise WeightMismatchError(f"{path} holds no {TITLES['mmdit']}, and only these are mixed")
    return bundle.components["mmdit"]
