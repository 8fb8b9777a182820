"""Guidance distilled into the transformer: FLUX.1 Kontext [dev] from the jointly trained model.

    python train.py --config configs/guidance_distill.py --coordinator auto \\
        --config.weights=gs://bucket/runs/joint --config.encoders=FLUX.1-Kontext-dev \\
        --config.data.cache=/data/edits-encoded --config.data.synthetic_cache=/data/edits-guided

The student starts as its teacher (the average of the parameters of the run in `weights`), with an
input for guidance whose last layer is zero, and learns to do in one pass what classifier-free
guidance does in two (docs/distillation.md). Guidance is drawn evenly between 1 and 5, where
[dev] is used; editing alone, as [dev] was trained (arXiv:2506.15742). How many steps were taken
and at which rate was not published; half of the examples are the teacher's own, made by
`python -m kontext_jax.data.synthesize --guidance 2.5`, since guided pictures leave the data.

Hardware: TPU v5p, 64 chips or a multiple, the mesh of configs/kontext_joint.py. A step has two
predictions of the teacher beside the training of one: 5/3 of the operations of flow matching.
Expect: `relative_error` below 0.12 where `no_op_error`, that of guidance unlearnt, does not fall.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.guidance_distillation import GuidanceDistillationConfig
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import REQUIRED, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="guidance_distillation",
        preset="kontext-dev",
        weights=REQUIRED,
        encoders=REQUIRED,
        num_steps=10_000,
        batch_size=256,
        accumulate_steps=4,
        remat="save_products",
        ema_decay=0.999,
        guidance_distillation=GuidanceDistillationConfig(timestep_mode="flux_linear"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=500),
        data=DataConfig(cache=REQUIRED, synthetic_cache=REQUIRED, synthetic_share=0.5),
        mesh=MeshConfig(data=-1, fsdp=32),
        checkpoint=CheckpointConfig(every_steps=1000, keep_every=5000),
        log=LogConfig(every_steps=10),
    )
