"""All parameters of a published Kontext on your own edits.

    python train.py --config configs/finetune.py \\
        --config.weights=FLUX.1-Kontext-dev --config.data.sources=my_edits

Reproduces the usual full fine-tuning of FLUX.1 (maxdiffusion: AdamW, 1e-5); average of the
parameters 0.999 for runs of some thousand steps. The guidance input of the distilled model is held
at 1: the flow-matching loss teaches the velocity without guidance, and at 2.5 or 3.5 it would make
those values mean "none" too, which destroys the effect of guidance. What remains at other values is
not trained, and drifts with the rest: keep the rate low and the run short.

Hardware: 8 GPUs of 80 GB, or a TPU v5p-16. State: 22.2 GiB on each of 8 devices (computed by
--dry-run). At an assumed 40 % of the peak a 1024² pair takes an H100 1.25 s (495 TFLOP); not
measured.
Expect: `loss_edit` to fall by some per cent only; look at RUN/samples and at held-out edits
(--config.eval.sources=held_out --config.eval.every_steps=200 --config.eval.sample_every_steps=200).
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import REQUIRED, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        preset="kontext-dev",
        weights=REQUIRED,
        num_steps=4000,
        batch_size=32,
        accumulate_steps=4,
        ema_decay=0.999,
        flow=FlowMatchingConfig(
            timestep_mode="flux_linear", text_dropout=0.1, guidance="fixed", guidance_value=1.0
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=100),
        data=DataConfig(sources=(REQUIRED,), fraction_with_references=1.0),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every_steps=500, keep_last=2),
        log=LogConfig(every_steps=10),
    )
