"""The tiny Kontext: edits of drawn scenes and photographs, and text to image, in one run.

    python train.py --config configs/tiny_kontext.py --workdir runs/tiny/joint

Stage of `experiments/tiny_curriculum.py`, which also lets the rate fall at the end. The paper's
recipe at 1/2300 of the size: rectified flow with logit-normal times, references as further tokens
with positions of their own, text dropout for guidance, an average of the parameters.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        preset="tiny-kontext",
        weights="runs/tiny/t2i",
        encoders="runs/tiny/encoders",
        num_steps=3500,
        batch_size=96,
        dtype="float32",
        attention_backend="reference",
        remat="none",
        ema_decay=0.998,
        flow=FlowMatchingConfig(timestep_mode="const", timestep_mu=0.0, text_dropout=0.1),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, warmup_steps=50, b2=0.99),
        data=DataConfig(cache="runs/tiny/encoded", fraction_with_references=0.85),
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
