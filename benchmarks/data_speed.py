"""Throughput of the input pipeline, and how many cores a training step on 64 chips needs.

    python benchmarks/data_speed.py                        # two minutes
    python benchmarks/data_speed.py --step_time_s 1.5
    python benchmarks/data_speed.py --encoded              # encoding, and reading what it wrote

JPEG pairs (quality 92, photo-like) are written in every format, then read, decoded, cut to the
bucket and stacked by the loader that training uses. Figures are per second of CPU time, over all
threads, so that other work on the machine matters less.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from pathlib import Path

import common
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features

from kontext_jax.data.buckets import Kind
from kontext_jax.data.config import DataConfig
from kontext_jax.data.encoded import batches as cache
from kontext_jax.data.encoded import folder as encoded_folder
from kontext_jax.data.encoded.records import SampleEntry, ShardWriter, lock_part, prompt_key
from kontext_jax.data.loader import make_loader
from kontext_jax.data.sources.array_record import write_array_record
from kontext_jax.data.sources.examples import Example, ImageRef
from kontext_jax.precompute import encode


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG with detail at every scale, as a photo has: noise whose spectrum falls as 1/f."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 10):
        noise = rng.normal(size=(2**octave, 2**octave, 3)).clip(-3, 3)
        small = Image.fromarray((127 + 42 * noise).astype(np.uint8))
        pixels += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = 127 + 1.8 * (pixels / 8 - 127)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def write_sources(root: Path, count: int, width: int, height: int) -> dict[str, str]:
    """The same pairs as a folder, parquet, a tar and ArrayRecord."""
    samples = [
        (photo(2 * i, width, height), photo(2 * i + 1, width, height), f"edit {i}")
        for i in range(count)
    ]
    folder = root / "folder"
    folder.mkdir()
    lines = []
    for i, (target, context, text) in enumerate(samples):
        (folder / f"{i}.jpg").write_bytes(target)
        (folder / f"{i}_context.jpg").write_bytes(context)
        row = {"file_name": f"{i}.jpg", "context": f"{i}_context.jpg", "text": text}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    columns = {
        "target": [{"bytes": target, "path": None} for target, _, _ in samples],
        "context": [{"bytes": context, "path": None} for _, context, _ in samples],
        "text": [text for _, _, text in samples],
    }
    pq.write_table(pa.table(columns), root / "pairs.parquet", row_group_size=16)
    with tarfile.open(root / "pairs.tar", "w") as tar:
        for i, (target, context, text) in enumerate(samples):
            members = {"target.jpg": target, "context.jpg": context, "txt": text.encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    examples = (
        Example(str(i), ImageRef("", data=target), (ImageRef("", data=context),), text)
        for i, (target, context, text) in enumerate(samples)
    )
    write_array_record(examples, root / "pairs.array_record")
    return {
        "folder": str(folder),
        "parquet": str(root / "pairs.parquet"),
        "webdataset": str(root / "pairs.tar"),
        "array_record": str(root / "pairs.array_record"),
    }


def measure(source: str, steps: int, batch_size: int, threads: int) -> dict[str, float]:
    """Pictures a second of CPU time, of wall time, and the cores that were busy."""
    config = DataConfig(sources=(source,), threads=threads, prefetch=2)
    batches = make_loader(config, batch_size=batch_size, seed=0, tell=lambda _: None)
    next(batches)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        next(batches)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    batches.close()
    pictures = 2 * steps * batch_size
    return {
        "pictures_per_cpu_s": round(pictures / cpu, 1),
        "pictures_per_wall_s": round(pictures / wall, 1),
        "busy_cores": round(cpu / wall, 2),
    }


def measure_cached(count: int, steps: int, batch_size: int, threads: int) -> dict[str, float]:
    """Reading of encoded pairs at 1024² with 512 text tokens of T5-XXL, as training does."""
    generator = np.random.default_rng(0)
    kind = Kind((1024, 1024), ((1024, 1024),))

    def draw(*shape):
        return generator.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with lock_part(root, 0):
            null_text = draw(512, 4096), draw(768)
            made_by = encoded_folder.start_folder(root, {}, {}, lambda: null_text)
            writer = ShardWriter(root, 0, made_by, 512_000_000)
            for i in range(count):
                writer.add_text(f"edit {i}", draw(512, 4096), draw(768))
                entry = SampleEntry(str(i), 0, kind, prompt_key(f"edit {i}"))
                writer.add_sample(entry, draw(128, 128, 16), (draw(128, 128, 16),))
            writer.finish_shard()
            encoded_folder.write_done(root, 0, 1, count)
        batches = cache.CachedBatches(
            cache.EncodedCache(root), batch_size=batch_size, seed=0, threads=threads, prefetch=2
        )
        next(batches)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            next(batches)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        batches.close()
    pairs = steps * batch_size
    return {
        "pairs_per_cpu_s": round(pairs / cpu, 1),
        "pairs_per_wall_s": round(pairs / wall, 1),
        "MB_per_cpu_s": round(pairs * 5.24 / cpu),
    }


def measure_encoding(count: int) -> dict[str, float]:
    """Encoding by the untrained tiny model, 64 pixels, once it is compiled; reading included."""
    options = ["--model", "untrained", "--buckets", "64x64", "--batch_size", "16", "-q"]
    options += ["--dtype", "float32"]
    with tempfile.TemporaryDirectory() as folder:
        encode.main(["scenes:easy:train:16", "--out", f"{folder}/first", *options])
        cpu, wall = time.process_time(), time.perf_counter()
        encode.main([f"scenes:easy:train:{count}", "--out", f"{folder}/second", *options])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "samples_per_cpu_s": round(count / cpu, 1),
        "samples_per_wall_s": round(count / wall, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=48, help="pairs that are written")
    parser.add_argument("--sizes", nargs="+", default=["1024x1024", "1600x1200"], help="on disk")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--step_time_s", type=float, default=1.0, help="of the training step")
    parser.add_argument("--pairs_per_step", type=int, default=64, help="one for each chip")
    parser.add_argument(
        "--encoded", action="store_true", help="measure encoded samples (data.encode) instead"
    )
    common.add_json_flag(parser)
    args = parser.parse_args()
    if args.encoded:
        found = {
            "cached pairs at 1024 px": measure_cached(
                64, args.steps, args.batch_size, args.threads
            ),
            "encoding by the tiny model at 64 px": measure_encoding(512),
        }
        finish(args, found, timer="reading encoded pairs; encoding, reading pictures included")
        return
    found, slowest = {}, float("inf")
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            sources = write_sources(Path(folder), args.count, width, height)
            for name, source in sources.items():
                result = measure(source, args.steps, args.batch_size, args.threads)
                found[f"{size} from {name}"] = result
                slowest = min(slowest, result["pictures_per_cpu_s"])
    needed = 2 * args.pairs_per_step / args.step_time_s / slowest
    print(
        f"{args.pairs_per_step} pairs in steps of {args.step_time_s:g} s need {needed:.1f} cores, "
        f"{needed / 16:.2f} of each of 16 hosts"
    )
    finish(
        args,
        found,
        timer="reading, decoding and resizing JPEG pairs to batches, by Lanczos",
        libjpeg_turbo=features.version_feature("libjpeg_turbo"),
        cores_needed=round(needed, 1),
    )


def finish(args: argparse.Namespace, found: dict[str, dict[str, float]], **facts) -> None:
    """Prints the figures, and writes them where --json says."""
    rows = [
        common.measurement(f"{what}, {name}", name.split("_per_")[0], [value])
        for what, values in found.items()
        for name, value in values.items()
    ]
    for row in rows:
        print(f"{row['what']}: {row['median']:g}")
    common.write(common.report("data_speed", args, rows, packages=("pillow",), **facts), args.json)


if __name__ == "__main__":
    main()
