"""The tiny Kontext begins with text alone: captions of drawn scenes.

    python train.py --config configs/tiny_t2i.py --workdir runs/tiny/t2i

Stage of `experiments/tiny_curriculum.py`. Without references a step costs a third less, and what
words mean is learnt here.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        preset="tiny-kontext",
        encoders="runs/tiny/encoders",
        num_steps=2000,
        batch_size=128,
        dtype="float32",
        attention_backend="reference",  # 48 tokens: a fifth faster than blocks of queries
        remat="none",
        ema_decay=0.998,
        flow=FlowMatchingConfig(timestep_mode="const", timestep_mu=0.0, text_dropout=0.1),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, warmup_steps=50, b2=0.99),
        data=DataConfig(cache="runs/tiny/encoded", fraction_with_references=0.0),
        checkpoint=CheckpointConfig(every_steps=100),
        eval=EvalConfig(
            every_steps=250,
            cache="runs/tiny/encoded_eval",
            num_batches=2,
            sample_every_steps=500,
            sample_rows=8,
            sample_num_steps=20,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
