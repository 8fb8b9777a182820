"""The autoencoder of the tiny Kontext: 64-pixel pictures to 8×8 latents of 16 channels.

    python train.py --config configs/tiny_vae.py --workdir runs/tiny/vae

First stage of `experiments/tiny_curriculum.py`, which runs it and what follows; docs/learning.md
tells of all. The network is FLUX's with two levels of 64 channels behind 4×4 patches (a million
parameters). It learns from drawn scenes and from crops of the photographs of
`kontext_jax.data.photos`, edited as the transformer will have to edit them. Squared errors count
most: they settle the colours, which edits are graded by.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.autoencoder import AutoencoderConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="autoencoder",
        preset="tiny-kontext",
        num_steps=8000,
        batch_size=16,
        dtype="float32",
        remat="none",
        ema_decay=0.998,
        autoencoder=AutoencoderConfig(l1_weight=0.1, mse_weight=1.0, kl_weight=1e-3),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=100, end_fraction=0.02, b2=0.99
        ),
        data=DataConfig(
            sources=("scenes:easy-crowded:any:12000", "photos:squares-64:train:24000"),
            buckets=("64x64",),
            fraction_with_references=0.0,
        ),
        checkpoint=CheckpointConfig(every_steps=250),
        eval=EvalConfig(
            every_steps=500,
            sources=("photos:squares-64:held_out:64",),
            num_batches=4,
            sample_rows=8,
            sample_every_steps=1000,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
