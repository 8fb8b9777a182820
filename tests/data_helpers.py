"""Small data sets on disk, the same samples in every format."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kontext_jax.data.sources.array_record import write_array_record
from kontext_jax.data.sources.examples import Example, ImageRef

SIZES = ((64, 64), (96, 48), (48, 80), (64, 60))


def picture(seed: int, width: int, height: int) -> np.ndarray:
    """Smooth pixels uint8 [height, width, 3] that nothing else has."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pairs(count: int, num_contexts: int = 1) -> list[tuple[bytes, list[bytes], str]]:
    """Target, references and instruction of each sample."""
    made = []
    for i in range(count):
        size = SIZES[i % len(SIZES)]
        contexts = [png(picture(1000 * (k + 1) + i, *size)) for k in range(num_contexts)]
        made.append((png(picture(i, *size)), contexts, f"edit number {i}"))
    return made


def write_folder(folder: Path, samples, captions=()) -> Path:
    """metadata.jsonl beside its pictures; captions have no reference."""
    folder.mkdir(parents=True)
    lines = []
    for i, (target, contexts, text) in enumerate([*samples, *((t, [], c) for t, c in captions)]):
        (folder / f"{i}.png").write_bytes(target)
        row = {"file_name": f"{i}.png", "instruction": text, "origin": "test"}
        for k, context in enumerate(contexts):
            (folder / f"{i}_context{k}.png").write_bytes(context)
        if contexts:
            row["contexts"] = [f"{i}_context{k}.png" for k in range(len(contexts))]
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path, samples) -> Path:
    """Two files of row groups of three, pictures as Hugging Face keeps them."""
    folder.mkdir(parents=True)
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        columns = {
            "edited_image": [{"bytes": t, "path": None} for t, _, _ in part],
            "source_image": [{"bytes": c[0], "path": None} for _, c, _ in part],
            "edit_prompt": [text for _, _, text in part],
            "score": [0.5] * len(part),
        }
        pq.write_table(pa.table(columns), folder / f"train-{number}.parquet", row_group_size=3)
    return folder


def write_tars(folder: Path, samples) -> Path:
    folder.mkdir(parents=True)
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for i, (target, contexts, text) in enumerate(part):
                members = {f"{i:04d}.target.png": target, f"{i:04d}.txt": text.encode()}
                members |= {f"{i:04d}.context{k}.png": c for k, c in enumerate(contexts)}
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def write_records(folder: Path, samples) -> Path:
    folder.mkdir(parents=True)
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        examples = [
            Example(
                f"{number}/{i}",
                ImageRef("target", data=target),
                tuple(ImageRef("context", data=context) for context in contexts),
                text,
                {"origin": "test"},
            )
            for i, (target, contexts, text) in enumerate(part)
        ]
        write_array_record(examples, folder / f"{number}.array_record")
    return folder


WRITERS = {
    "folder": write_folder,
    "parquet": write_parquet,
    "tars": write_tars,
    "array_record": write_records,
}


def broken_folder(path: Path, captions=()) -> Path:
    """Samples 1 to 5 are bad, each in another way; 6 only shows it when it is decoded."""
    folder = write_folder(path, pairs(12), captions)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "1_context0.png").unlink()
    lines[2]["instruction"] = "  "
    (folder / "3.png").write_bytes(b"no picture")
    del lines[4]["contexts"]
    (folder / "5.png").write_bytes(png(picture(5, 64, 64)))
    cut = (folder / "6.png").read_bytes()
    (folder / "6.png").write_bytes(cut[: len(cut) // 2])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder
