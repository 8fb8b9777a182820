"""The tiny Kontext in four steps, by policies.

    python train.py --config configs/tiny_policy.py --workdir runs/tiny/policy

After configs/tiny_guidance_distill.py: configs/policy_distill.py at 1/2300 of the size, and beside
configs/tiny_ladd.py the other way to few steps. The student and its teacher are the average of the
parameters of runs/tiny/guidance.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.policy_distillation import PolicyDistillationConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="policy_distillation",
        preset="tiny-kontext-policy",
        weights="runs/tiny/guidance",
        encoders="runs/tiny/encoders",
        num_steps=1000,
        batch_size=64,
        dtype="float32",
        attention_backend="reference",
        remat="none",
        ema_decay=0.99,
        policy_distillation=PolicyDistillationConfig(guidance=2.5),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=50, schedule="linear", b2=0.99),
        data=DataConfig(cache="runs/tiny/encoded", fraction_with_references=0.85),
        checkpoint=CheckpointConfig(every_steps=100, keep_every=1000),
        eval=EvalConfig(
            every_steps=250,
            cache="runs/tiny/encoded_eval",
            num_batches=4,
            sample_every_steps=500,
            sample_rows=8,
            sample_num_steps=4,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
