"""Text to image and editing in context together, from a text-to-image checkpoint: Kontext itself.

    python train.py --config configs/kontext_joint.py --coordinator auto \\
        --config.weights=gs://bucket/runs/t2i_pretrain --config.encoders=FLUX.1-Kontext-dev \\
        --config.data.sources=gs://bucket/captions,gs://bucket/edits

Reproduces FLUX.1 Kontext (arXiv:2506.15742, section 3): references are put after the target on the
sequence axis, reference i at positions (i, row, column); "starting from a text-to-image checkpoint,
we jointly fine-tune on image-to-image and text-to-image". How often each came was not published:
half and half here (data.fraction_with_references). Every step is of one kind on all devices.

Hardware: TPU v5p, 64 chips or a multiple. State: 5.6 GiB on each chip with fsdp 32; a step with
1024² pairs, one on a chip at a time, needs 40 GiB of it, by the TPU's compiler (kontext_jax.plan),
whose own estimate is 1.5 s a pair and chip. At an assumed 40 % of the peak an editing example at
1024² takes a chip 2.7 s (495 TFLOP), one from text 1.2 s; not measured.
Expect: the loss of editing steps below that of text to image (`loss_edit`, `loss_t2i`) at once,
since most of a picture is in its reference; `loss_t2i` not above that of the checkpoint.
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
        num_steps=100_000,
        batch_size=256,
        accumulate_steps=4,
        # No product is computed twice (docs/performance.md): a chip has 95 GiB.
        remat="save_products",
        ema_decay=0.9999,
        flow=FlowMatchingConfig(timestep_mode="flux_linear", text_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000),
        data=DataConfig(sources=(REQUIRED,), fraction_with_references=0.5, workers=16),
        # Half of 64 chips: over all of a slice, gradients are summed whole and not scattered.
        mesh=MeshConfig(data=-1, fsdp=32),
        checkpoint=CheckpointConfig(every_steps=1000, keep_every=20_000),
        log=LogConfig(every_steps=10),
    )
