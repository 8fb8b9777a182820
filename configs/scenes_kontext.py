"""A small Kontext that edits drawn scenes, from nothing, on two CPU cores.

    python train.py --config configs/scenes_kontext.py

Reproduces the paper's recipe at 1/5000 of the size: rectified flow with logit-normal times, edits
and text to image in one run, references as further tokens with positions of their own, text dropout
for guidance, an average of the parameters. Before it, scenes_vae.py and two commands that prepare
its data: docs/learning.md has them all, the time they took and the figures to expect.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        preset="tiny-scenes",
        encoders="runs/scenes_encoders",
        num_steps=2500,
        batch_size=64,
        dtype="float32",
        remat="none",
        ema_decay=0.998,
        flow=FlowMatchingConfig(timestep_mode="const", timestep_mu=0.0, text_dropout=0.1),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, warmup_steps=50, b2=0.99),
        data=DataConfig(cache="runs/scenes_encoded", fraction_with_references=0.85),
        checkpoint=CheckpointConfig(every_steps=250),
        eval=EvalConfig(
            every_steps=250,
            cache="runs/scenes_encoded_seen",
            num_batches=4,
            sample_every_steps=500,
            sample_rows=8,
            sample_num_steps=20,
        ),
        log=LogConfig(every_steps=10, tensorboard=False),
    )
