"""Editing only, as FLUX.1 Kontext [dev] was trained before its guidance was distilled.

    python train.py --config configs/kontext_dev.py --coordinator auto \\
        --config.weights=gs://bucket/runs/kontext_joint --config.encoders=FLUX.1-Kontext-dev \\
        --config.data.sources=gs://bucket/edits

Reproduces the flow-matching part of Kontext [dev], which "focuses exclusively on image-to-image"
(arXiv:2506.15742, section 3): every example has a reference. Guidance distillation follows it.
Rate and length were not published; those here are ours. To begin with published weights that take
guidance as an input, add --config.preset=kontext-dev: they are then trained at guidance 1, the only
value at which what they learn, the velocity without guidance, means what they were taught.

Hardware: TPU v5p, 64 chips or a multiple, as for kontext_joint: 40 GiB of a chip, by the TPU's
compiler. At an assumed 40 % of the peak a 1024² pair takes a chip 2.7 s (495 TFLOP); not measured.
Expect: `loss_edit` falling slowly from where kontext_joint left it.
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
        weights=REQUIRED,
        encoders=REQUIRED,
        num_steps=50_000,
        batch_size=256,
        accumulate_steps=4,
        # Policy and mesh as in kontext_joint, for its reasons.
        remat="save_products",
        ema_decay=0.9999,
        flow=FlowMatchingConfig(timestep_mode="flux_linear", text_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=1000),
        data=DataConfig(sources=(REQUIRED,), fraction_with_references=1.0, workers=16),
        mesh=MeshConfig(data=-1, fsdp=32),
        checkpoint=CheckpointConfig(every_steps=1000, keep_every=10_000),
        log=LogConfig(every_steps=10),
    )
