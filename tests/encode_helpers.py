"""Small data sets, and encoders that can be computed by hand."""

import json

import numpy as np
from PIL import Image

SIZES = ((32, 32), (48, 32))
OPTIONS = ["--model", "untrained", "--buckets", "32x32", "48x32", "--batch_size", "4", "-q"]


class HandEncoders:
    """In place of `encoding.Networks`: latents are means over cells, text is its bytes."""

    def __init__(self, bundle, dtype, batch_size, max_text_tokens, tell):
        self.batch_size, self._dtype = batch_size, dtype

    def encode_pictures(self, pictures):
        assert 0 < len(pictures) <= self.batch_size
        assert len({picture.shape for picture in pictures}) == 1
        return np.stack([latents_of(picture).astype(self._dtype) for picture in pictures])

    def encode_prompts(self, prompts):
        txt = np.stack([text_of(prompt).astype(self._dtype) for prompt in prompts])
        return txt, txt[:, 0]

    def null_text(self):
        txt, vec = self.encode_prompts([""])
        return txt[0], vec[0]


def latents_of(picture):
    height, width, _ = picture.shape
    cells = picture.reshape(height // 8, 8, width // 8, 8, 3).astype(np.float32)
    return cells.mean((1, 3))


def text_of(prompt):
    data = np.frombuffer(prompt.encode().ljust(32), np.uint8)
    return data.astype(np.float32).reshape(4, 8)


def write_pairs(folder, count, start=0):
    """Pairs of pictures of one of SIZES; every third has no reference, every fourth one text."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(start)
    rows = []
    for n in range(start, start + count):
        width, height = SIZES[n % 2]
        row = {"target": f"target{n}.png", "text": "the same" if n % 4 == 0 else f"number {n}"}
        if n % 3:
            row["source"] = f"source{n}.png"
        for name in (row["target"], row.get("source")):
            if name:
                pixels = generator.integers(0, 256, (height + 5, width + 5, 3), np.uint8)
                Image.fromarray(pixels).save(folder / name)
        rows.append(json.dumps(row))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n".join(rows) + "\n")


def use_hand_encoders(setattr_):
    """Puts them into the command; `setattr_` as that of pytest's monkeypatch."""
    from kontext_jax.precompute import encode

    setattr_(encode, "Networks", HandEncoders)
    setattr_(encode, "encoder_facts", lambda _, max_text_tokens: {"max": max_text_tokens})


def run(data, out, *options):
    """The command's exit status."""
    from kontext_jax.precompute import encode

    return encode.main([str(data), "--out", str(out), *OPTIONS, *map(str, options)])


def contents(out):
    """Everything that a folder of encoded samples holds, by id and variant."""
    from kontext_jax.data.encoded.batches import EncodedCache

    cache = EncodedCache(out)
    found = {}
    for sample, id_ in enumerate(cache.ids):
        for variant in range(cache.num_variants(sample)):
            arrays = *cache.latents(sample, variant), *cache.text(sample)
            found[id_, variant] = [a.tobytes() for a in (arrays[0], *arrays[1], *arrays[2:])]
    return found
