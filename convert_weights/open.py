"""The weights at a path: our directory, a training run, or a published layout."""

from pathlib import Path

from convert_weights.sources import open_foreign_bundle
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.run import Which, is_run, training_bundle


def open_weights(
    path: str | Path,
    preset: str | None = None,
    *,
    which: Which | None = None,
    step: int | None = None,
    complete: bool = True,
) -> checkpoint.ModelBundle:
    """The model at `path`: our directory, a training run's folder, or a published layout.

    Args:
      path: a folder, a file or a hub id.
      preset: which model published weights are, where names do not tell.
      which, step: tree and step of a run, see `training_bundle.open_run`.
      complete: whether all networks and tokenizers must be there.

    Raises:
      ValueError, OSError: it cannot be opened, or is not what the arguments say.
    """
    if is_run(path):
        bundle = training_bundle(
            path, which, step, open_weights=lambda other: open_weights(other, complete=False)
        )
        missing = [kind for kind in checkpoint.KINDS if kind not in bundle.components]
        missing += [
            f"{k} tokenizer" for k in checkpoint.TOKENIZERS if k not in bundle.tokenizer_dirs
        ]
        if complete and missing:
            raise ValueError(
                f"{path} is a run that trained without {', '.join(missing)}, so it is no whole "
                "model; export what it trained by `python -m convert_weights to-jax`"
            )
    elif which is not None or step is not None:
        raise ValueError(f"{path} is no training run, so there is no step or average to choose")
    elif (Path(path) / checkpoint.MANIFEST).is_file():
        required = checkpoint.KINDS if complete else ()
        bundle = checkpoint.open_bundle(path, required, require_tokenizers=complete)
    else:
        return open_foreign_bundle(path, preset)
    if preset not in (None, bundle.preset.name):
        raise ValueError(f"{path} holds {bundle.preset.name}, not {preset}; leave out --model")
    return bundle
