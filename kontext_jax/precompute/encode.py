"""Encodes a data set once for all runs: `python -m kontext_jax.data.encode PATH … --out DIR`.

    python -m kontext_jax.data.encode edits/ --weights W --out edits-encoded
    python -m kontext_jax.data.encode a.parquet b.tar --weights W --out DIR --flip --variants 2
    python -m kontext_jax.data.encode edits/ --model untrained --resolution 64 --out DIR
    python train.py --config configs/kontext_dev.py --config.data.cache=DIR

Writes latents and text features as ArrayRecord. A run that was interrupted goes on by the same
command, and one over more data adds what is new. Several machines share the work when each is given
its --process-index of --process-count and all the same DIR.

Space at 1024²: 0.5 MB in bfloat16 for each target and each reference, and 4.2 MB for each different
prompt of 512 tokens, all of which FLUX attends to.
"""

import argparse
import dataclasses
import sys
import time

import jax
import numpy as np
import PIL

from kontext_jax.data.buckets import bucket_sizes
from kontext_jax.data.check import add_options, parse_arguments
from kontext_jax.data.config import DataConfig
from kontext_jax.data.dataset import open_dataset
from kontext_jax.data.encoded import folder as encoded_folder
from kontext_jax.data.encoded.records import ShardWriter, facts_hash, lock_part
from kontext_jax.data.filters import FilterError
from kontext_jax.precompute.encoding import FAILED, STOPPED, Encoding, Networks, check_room
from kontext_jax.precompute.jobs import (
    Cutting,
    ImageProgress,
    bytes_needed,
    list_jobs,
    read_stored,
)
from kontext_jax.terminal import Parser, exit_status, size_text
from kontext_jax.types import DTYPES
from kontext_jax.weights.bundle import ModelBundle
from kontext_jax.weights.encoders import encoder_facts
from kontext_jax.weights.untrained import untrained_bundle

DATA_OPTIONS = (
    *("target_column", "context_columns", "text_column", "id_column"),
    *("resolution", "buckets", "random_crop", "flip", "on_bad_sample", "largest_aspect_mismatch"),
    *("filter_function", "filter_command", "verify", "index_dir", "threads"),
)


PROG = "python -m kontext_jax.data.encode"


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(
        underscores=True,
        prog=prog,
        description=__doc__.replace(PROG, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sources", nargs="+", metavar="PATH", help="folders or files of examples")
    parser.add_argument("--out", required=True, metavar="DIR", help="made if it is not there")
    parser.add_argument("--weights", metavar="PATH", help="with text encoders and autoencoder")
    parser.add_argument(
        "--autoencoder-weights", metavar="PATH", help="another autoencoder than that of --weights"
    )
    parser.add_argument("--model", metavar="NAME", help="untrained: no --weights, to try it out")
    parser.add_argument("--max-text-tokens", type=int, help="of T5; default: what the model takes")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="in which to compute and to store (default bfloat16)",
    )
    parser.add_argument("--variants", type=int, default=1, help="crops of each sample to store")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures encoded at once")
    parser.add_argument("--process-index", type=int, default=0, help="this one, from 0")
    parser.add_argument("--process-count", type=int, default=1, help="that share the samples")
    parser.add_argument("--shard-kb", type=int, default=512_000, help="size of a file, in kB")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_options(parser, DATA_OPTIONS)
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Encodes what is missing in DIR; returns the status: 1 failed, 2 bad input."""
    args = parse_arguments(make_parser(prog), arguments)

    def run() -> int:
        encode(args)
        return 0

    return exit_status(
        run,
        failed=FAILED,
        bad_input=(ValueError, OSError, FilterError),
        interrupted=STOPPED,
    )


def encode(args: argparse.Namespace) -> None:
    """Does what the options say.

    Raises:
      ValueError, OSError: options, data, weights or DIR do not fit each other.
      FloatingPointError: the encoders gave NaN or infinity.
    """

    def tell(line: str) -> None:
        if not args.quiet:
            print(line, flush=True)

    encoded_folder.check_share(args.process_index, args.process_count)
    out, dtype = encoded_folder.local_folder(args.out), DTYPES[args.dtype]
    bundle = open_encoders(args.weights, args.autoencoder_weights, args.model)
    tell(f"encoders: {bundle.source}")
    max_text_tokens = args.max_text_tokens or bundle.preset.max_text_tokens
    cutting = Cutting(args.random_crop, args.flip, args.variants)
    config = DataConfig(
        sources=tuple(args.sources),
        fraction_with_references=0.5,  # which to train on is decided when training
        **{name: getattr(args, name) for name in DATA_OPTIONS},
    )
    config.check()
    facts = {
        **encoder_facts(bundle, max_text_tokens),
        "dtype": args.dtype,
        "pictures": cutting.facts(bucket_sizes(config.resolution, config.buckets)),
    }
    made_by = facts_hash(facts)
    if (out / encoded_folder.MANIFEST).exists():
        encoded_folder.check_facts(out, encoded_folder.read_manifest(out)["facts"], facts)
    out.mkdir(parents=True, exist_ok=True)

    with lock_part(out, args.process_index):
        encoded_folder.withdraw_done(out, args.process_index, args.process_count)
        dataset = open_dataset(config, index_dir=out / "index", tell=tell)
        stored = read_stored(out, made_by)
        share = args.process_index, args.process_count
        jobs, num_done = list_jobs(dataset, stored, args.variants, *share)
        if not jobs and (out / encoded_folder.MANIFEST).exists():
            encoded_folder.read_null_text(out, made_by)
            encoded_folder.write_done(out, *share, num_done)
            tell(f"nothing is missing: {out} holds {num_done:,} crops of this process")
            return
        todo = sum(len(job.variants) for job in jobs)
        itemsize = np.dtype(dtype).itemsize
        latents, text = bytes_needed(bundle.preset, itemsize, max_text_tokens, jobs)
        free = check_room(out, latents + text, "the latents alone take")
        tell(
            f"to encode: {todo:,} crops of {len(jobs):,} samples ({num_done:,} crops done before): "
            f"latents {size_text(latents)}; text {size_text(text)} for each different prompt, "
            f"{size_text(text * len(jobs))} if none repeats; {size_text(free)} free"
        )
        if latents + text * len(jobs) > free:
            tell("that may not fit: the run stops when the disk is full, and keeps what it has")

        networks = Networks(bundle, dtype, args.batch_size, max_text_tokens, tell)
        notes = {
            "encoders": bundle.source,
            "made_with": {"pillow": PIL.__version__, "jax": jax.__version__},
        }
        encoded_folder.start_folder(out, facts, notes, networks.null_text)
        sources = {source.name: source.identity() for source in dataset.sources}
        writer = ShardWriter(out, args.process_index, made_by, args.shard_kb * 1000, sources)
        work = Encoding(
            dataset,
            cutting,
            networks,
            writer,
            stored.texts,
            stop_at_bad=config.on_bad_sample == "stop",
            threads=config.threads,
            tell=tell,
        )
        pictures = sum(len(job.variants) * (1 + len(job.kind.contexts)) for job in jobs)
        crops = sum(max(1, len(job.variants)) for job in jobs)
        start = time.monotonic()
        images_per = pictures / max(1, todo)
        with ImageProgress(crops, images_per, tell=tell, quiet=args.quiet) as progress:
            work.run(jobs, progress)
        seconds = time.monotonic() - start
        num_records = num_done + work.num_written
        encoded_folder.write_done(out, *share, num_records)
    images = work.num_written * pictures / max(1, todo)
    tell(
        f"encoded {work.num_written:,} crops in {seconds:.1f} s ({images / seconds:.3g} images/s); "
        f"{out} holds {num_records:,} of this process; train with --config.data.cache={out} (and "
        "--config.data.sources= if the config names some)"
    )
    for reason, count in sorted(work.counts.items()):
        tell(f"not encoded: {count:,} crops: {reason}")


def open_encoders(
    weights: str | None, autoencoder_weights: str | None, model: str | None
) -> ModelBundle:
    """The bundle whose encoders to use.

    Raises:
      ValueError: none is named, or encoders are missing there.
    """
    from convert_weights.open import open_weights

    if weights is not None:
        bundle = open_weights(weights, model, complete=False)
    elif model == "untrained":
        bundle = untrained_bundle("tiny")
    else:
        raise ValueError(
            "no weights are named, and latents of untrained ones mean nothing; give --weights PATH "
            "(or --model untrained, to try the command out)"
        )
    if autoencoder_weights is None:
        return bundle
    other = open_weights(autoencoder_weights, complete=False)
    if "vae" not in other.components:
        raise ValueError(f"{autoencoder_weights} has no autoencoder")
    vae = other.components["vae"]
    return dataclasses.replace(
        bundle,
        components=bundle.components | {"vae": vae},
        preset=dataclasses.replace(bundle.preset, vae=vae.config),
        source=f"{bundle.source}; autoencoder: {other.source}",
    )


if __name__ == "__main__":
    sys.exit(main())
