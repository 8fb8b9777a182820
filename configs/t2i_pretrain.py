"""Text to image at 12 billion parameters, from nothing: what a Kontext is trained on top of.

    python train.py --config configs/t2i_pretrain.py --coordinator auto \\
        --config.encoders=FLUX.1-Kontext-dev --config.data.sources=gs://bucket/captions

Reproduces the recipe that is known of FLUX.1: rectified flow with logit-normal times whose mode
follows the number of tokens (Kontext, arXiv:2506.15742, appendix A.2), AdamW at 1e-4 after 3,000
steps of warm-up and text dropout 0.1 (torchtitan's FLUX), float32 parameters with bfloat16 compute.
Data, length and batch were never published; those here are ours. FLUX.1 itself began at smaller
pictures: --config.data.resolution=256, then 512, then 1024, each with --config.weights=RUN of the
one before.

Hardware: TPU v5p, 64 chips or a multiple (fsdp 32; further chips hold copies and more data).
State: 5.6 GiB on each chip; a step with 1024² pictures needs 25 GiB of it, by the TPU's compiler
(kontext_jax.plan), whose own estimate is 0.7 s a picture and chip. At an assumed 40 % of the
peak it takes a chip 1.2 s (222 TFLOP), so 256 on 64 chips take 5 s; not measured.
Expect: the loss over the Gaussian floor below 1 in the bins of small t within some thousand steps;
no picture quality is claimed for any number of steps.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import REQUIRED, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        preset="kontext-base",
        encoders=REQUIRED,
        num_steps=500_000,
        batch_size=256,
        accumulate_steps=4,
        remat="save_products",
        ema_decay=0.9999,
        flow=FlowMatchingConfig(timestep_mode="flux_linear", text_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=3000),
        data=DataConfig(sources=(REQUIRED,), fraction_with_references=0.0, workers=16),
        mesh=MeshConfig(data=-1, fsdp=32),
        checkpoint=CheckpointConfig(every_steps=1000, keep_every=50_000),
        log=LogConfig(every_steps=10),
    )
