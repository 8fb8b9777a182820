"""The autoencoder's whole objective in small: pixels, LPIPS, KL, and a discriminator at the end.

    python -m kontext_jax.evaluation.fetch_perceptual
    python train.py --config configs/vae_tiny.py --config.weights=RUN

Second stage of a small autoencoder: RUN is one that learnt by pixels alone (configs/scenes_vae.py,
35.6 dB); AlexNet's LPIPS, and from step 100 on a two-layer PatchGAN, sharpen it. What that buys is
in docs/autoencoder.md. Without --config.weights this trains from nothing.

Hardware: any. On two CPU cores about 0.5 s a step (batch 16, 64² pixels).
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.models.judges.discriminators import DiscriminatorConfig
from kontext_jax.objectives.autoencoder import AutoencoderConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="autoencoder",
        preset="tiny-scenes",
        num_steps=800,
        batch_size=16,
        dtype="float32",
        remat="none",
        ema_decay=0.99,
        autoencoder=AutoencoderConfig(
            l1_weight=1.0,
            kl_weight=1e-3,
            perceptual_weight=1.0,
            adversarial_weight=0.5,
            adversarial_start_step=100,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, b1=0.5, b2=0.9),
        discriminator=DiscriminatorConfig(width=32, num_layers=2),
        discriminator_optimizer=OptimizerConfig(learning_rate=1e-4, b1=0.5, b2=0.9),
        data=DataConfig(
            sources=("scenes:easy-crowded:any:12000",),
            buckets=("64x64",),
            fraction_with_references=0.0,
        ),
        checkpoint=CheckpointConfig(every_steps=200),
        eval=EvalConfig(
            every_steps=100,
            sources=("scenes:easy-crowded:seen:64",),
            num_batches=4,
            sample_rows=8,
            sample_every_steps=400,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
