"""Guidance distilled into the tiny Kontext, which then edits in one pass a step instead of two.

    python -m kontext_jax.data.synthesize --model runs/tiny/final --cache runs/tiny/encoded \\
        --out runs/tiny/guided --guidance 2.5 --limit 6000
    python train.py --config configs/tiny_guidance_distill.py --workdir runs/tiny/guidance

After the stages of `experiments/tiny_curriculum.py`. configs/guidance_distill.py at 1/2300 of the
size: the teacher is the average of the parameters of runs/tiny/final, half of the examples are its
own, and what text to image makes up of them stays as in the joint training.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.guidance_distillation import GuidanceDistillationConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="guidance_distillation",
        preset="tiny-kontext-guided",
        weights="runs/tiny/final",
        encoders="runs/tiny/encoders",
        num_steps=1500,
        batch_size=64,
        dtype="float32",
        attention_backend="reference",
        remat="none",
        ema_decay=0.99,
        guidance_distillation=GuidanceDistillationConfig(
            timestep_mode="const",
            guidance_range=(1.0, 3.0),
            eval_guidance=(1.0, 1.7, 2.5, 3.0),
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=50, schedule="linear", b2=0.99),
        data=DataConfig(
            cache="runs/tiny/encoded",
            synthetic_cache="runs/tiny/guided",
            fraction_with_references=0.85,
        ),
        checkpoint=CheckpointConfig(every_steps=100, keep_every=1000),
        eval=EvalConfig(
            every_steps=250,
            cache="runs/tiny/encoded_eval",
            num_batches=4,
            sample_every_steps=500,
            sample_rows=8,
            sample_num_steps=20,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
