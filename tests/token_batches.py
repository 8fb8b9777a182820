"""A batch of tokens with random values, small enough to compile in moments."""

import math

import numpy as np

from kontext_jax.batches import TokenBatch
from kontext_jax.ops.rope import rope_table
from kontext_jax.pictures import latents

CHANNELS, TARGET, NUM_TEXT = 4, (2, 2), 2


def make_batch(samples=6, references=((2, 2),), seed=0, axes_dim=(4, 6, 6)) -> TokenBatch:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    ids = [latents.text_ids(NUM_TEXT), latents.image_ids(*TARGET)]
    num_ctx = sum(rows * columns for rows, columns in references)
    if references:
        ids.append(latents.context_ids(list(references)))
    return TokenBatch(
        x0=draw(samples, math.prod(TARGET), CHANNELS),
        ctx=draw(samples, num_ctx, CHANNELS) if references else None,
        txt=draw(samples, NUM_TEXT, 6),
        vec=draw(samples, 5),
        null_txt=draw(NUM_TEXT, 6),
        null_vec=draw(5),
        pe=rope_table(np.concatenate(ids), axes_dim, 10_000),
    )
