"""The tiny Kontext in one to four steps, by adversarial distillation.

    python -m kontext_jax.data.synthesize --model runs/tiny/guidance --cache runs/tiny/encoded \\
        --out runs/tiny/made --guidance 2.5 --limit 6000
    python train.py --config configs/tiny_ladd.py --workdir runs/tiny/ladd

After configs/tiny_guidance_distill.py: configs/ladd.py at 1/2300 of the size. The student and its
teacher are the average of the parameters of runs/tiny/guidance, the examples what that makes of the
training set's references and prompts.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.models.feature_heads import FeatureHeadsConfig
from kontext_jax.objectives.ladd import LADDConfig
from kontext_jax.optimizer import OptimizerConfig
from kontext_jax.train_config import EvalConfig, LogConfig, TrainConfig, config_dict
from kontext_jax.training_checkpoints import CheckpointConfig


def get_config():
    return config_dict(
        TrainConfig(
            objective="ladd",
            preset="tiny-kontext-guided",
            weights="runs/tiny/guidance",
            encoders="runs/tiny/encoders",
            num_steps=3000,
            batch_size=48,
            dtype="float32",
            attention_backend="reference",
            remat="none",
            ema_decay=0.99,
            ladd=LADDConfig(guidance=2.5, warmup_steps=300),
            heads=FeatureHeadsConfig(blocks=(0, 1, 3, 5), width=64),
            optimizer=OptimizerConfig(learning_rate=1e-4, b1=0.0, b2=0.99),
            discriminator_optimizer=OptimizerConfig(learning_rate=5e-4, b1=0.0, b2=0.99),
            data=DataConfig(cache="runs/tiny/made", fraction_with_references=0.85),
            checkpoint=CheckpointConfig(every_steps=100, keep_every=500),
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
    )
