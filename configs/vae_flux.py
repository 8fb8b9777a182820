"""FLUX.1's autoencoder from nothing: 8× down, 16 channels, 84 million parameters.

    python -m kontext_jax.evaluation.fetch_perceptual
    python train.py --config configs/vae_flux.py --coordinator auto \\
        --config.data.sources=gs://bucket/pictures

Reproduces what is known of it: the topology, and "a convolutional autoencoder with an adversarial
objective from scratch" after latent diffusion (Kontext, arXiv:2506.15742, section 2), whose loss
this is: L1 + LPIPS + 1e-6·KL, and from step 50,001 on a PatchGAN of adaptive weight 0.5, at 256²
(arXiv:2112.10752). Data, length and batch were never published; those here are ours. LPIPS is
AlexNet's, so that VGG16's is left to measure with (--config.autoencoder.perceptual_net=vgg16 did
better on small pictures, docs/autoencoder.md); the discriminator normalises by groups
(kontext_jax/models/judges/discriminators.py says why). Other rates:
--config.autoencoder.z_channels=4.

Hardware: TPU v5p, 32 chips or a multiple; other numbers by --config.batch_size. What a step needs
`python -m kontext_jax.plan` tells (docs/autoencoder.md); nothing was measured on a chip.
Expect: the paper's table 1, PSNR 31.1 dB and SSIM 0.896 on ImageNet at 256², in no known time.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.autoencoder import AutoencoderConfig
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import REQUIRED, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="autoencoder",
        preset="kontext-dev",
        num_steps=500_000,
        batch_size=512,
        remat="none",
        ema_decay=0.9999,
        autoencoder=AutoencoderConfig(
            l1_weight=1.0,
            kl_weight=1e-6,
            perceptual_weight=1.0,
            adversarial_weight=0.5,
            adversarial_start_step=50_000,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5000, b1=0.5, b2=0.9),
        discriminator_optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=1000, b1=0.5, b2=0.9
        ),
        data=DataConfig(
            sources=(REQUIRED,),
            buckets=("256x256",),
            random_crop=True,
            flip=True,
            fraction_with_references=0.0,
            workers=16,
        ),
        mesh=MeshConfig(data=-1, fsdp=1),
        checkpoint=CheckpointConfig(every_steps=1000, keep_every=50_000),
        log=LogConfig(every_steps=10),
    )
