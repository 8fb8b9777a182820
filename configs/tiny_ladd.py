"""The tiny Kontext in one to four steps, by adversarial distillation.

    python train.py --config configs/tiny_ladd.py --workdir runs/tiny/ladd

After configs/tiny_guidance_distill.py, whose examples are used again: configs/ladd.py at 1/2300 of
the size. The student and its teacher are the average of the parameters of runs/tiny/guidance. With
16 tokens a picture and edits that a step or two already gets nearly right, what is left to be
judged is small beside noise, so that times of judging are low, and the student's rate is (see
docs/distillation.md, which has what else was tried).
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.models.judges.feature_heads import FeatureHeadsConfig
from kontext_jax.objectives.ladd import LADDConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="ladd",
        preset="tiny-kontext-guided",
        weights="runs/tiny/guidance",
        encoders="runs/tiny/encoders",
        num_steps=700,
        batch_size=48,
        dtype="float32",
        attention_backend="reference",
        remat="none",
        ema_decay=0.99,
        ladd=LADDConfig(
            probabilities=(0.4, 0.2, 0.2, 0.2),
            warmup_steps=0,
            renoise_mean=-2.0,
            negative_share=0.4,
        ),
        heads=FeatureHeadsConfig(blocks=(0, 1, 3, 5), width=64),
        optimizer=OptimizerConfig(learning_rate=2e-5, b1=0.0, b2=0.99),
        discriminator_optimizer=OptimizerConfig(learning_rate=1e-3, b1=0.0, b2=0.99),
        data=DataConfig(cache="runs/tiny/guided", fraction_with_references=0.85),
        checkpoint=CheckpointConfig(every_steps=100, keep_every=500),
        eval=EvalConfig(
            every_steps=350,
            cache="runs/tiny/encoded_eval",
            num_batches=4,
            sample_every_steps=350,
            sample_rows=8,
            sample_num_steps=4,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
