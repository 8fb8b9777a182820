"""The small autoencoder of the scenes: 64-pixel pictures to 8×8 latents of 16 channels.

    python train.py --config configs/scenes_vae.py

First of three steps to a small Kontext that edits drawn scenes; docs/learning.md has the others,
the time they took and their figures. The network is FLUX's with two levels of 48 channels behind
4×4 patches (0.5 million parameters); it learns from pictures of up to nine objects, and by squared
error more than by absolute error, which settles the colours of backgrounds late.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.autoencoder import AutoencoderConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="autoencoder",
        preset="tiny-scenes",
        num_steps=1800,
        batch_size=16,
        dtype="float32",
        remat="none",
        ema_decay=0.99,
        autoencoder=AutoencoderConfig(l1_weight=0.1, mse_weight=1.0, kl_weight=1e-3),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="cosine", warmup_steps=50, end_fraction=0.02, b2=0.99
        ),
        data=DataConfig(
            sources=("scenes:easy-crowded:any:12000",),
            buckets=("64x64",),
            fraction_with_references=0.0,
        ),
        checkpoint=CheckpointConfig(every_steps=250),
        eval=EvalConfig(
            every_steps=250,
            sources=("scenes:easy-crowded:seen:64",),
            num_batches=4,
            sample_rows=8,
            sample_every_steps=500,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
