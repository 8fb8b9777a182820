"""The whole of training in small, on pictures drawn by the package itself.

    python train.py --config configs/tiny.py

Reproduces nothing: 30 steps of a 2-million-parameter transformer on 64-pixel scenes, with untrained
encoders in front of it. Every part of a large run is there: editing and text to image in one run,
checkpoints, held-out loss, sample grids, going on after an interruption.

Hardware: any. On two CPU cores 77 s of CPU time the first time, nearly all of it compiling, and
20 s once the programs are kept (measured). Expect: a held-out loss (`eval`) below 0.8 of that at
step 15, and pictures that mean nothing, since the autoencoder is untrained.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        preset="tiny",
        encoders="untrained",
        num_steps=30,
        batch_size=4,
        dtype="float32",
        remat="none",
        ema_decay=0.99,
        flow=FlowMatchingConfig(timestep_mode="const", timestep_mu=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
        data=DataConfig(
            sources=("scenes:easy:train:512",),
            buckets=("64x64",),
            fraction_with_references=0.5,
        ),
        checkpoint=CheckpointConfig(every_steps=15),
        eval=EvalConfig(
            every_steps=15,
            sources=("scenes:easy:seen:32",),
            num_batches=2,
            sample_rows=4,
            sample_every_steps=30,
            sample_num_steps=4,
        ),
        log=LogConfig(every_steps=1, print_every_s=2),
    )
