"""Four steps a picture without a discriminator: policies distilled from FLUX.1 Kontext [dev].

    python train.py --config configs/policy_distill.py --coordinator auto \\
        --config.weights=gs://bucket/runs/guided --config.encoders=FLUX.1-Kontext-dev \\
        --config.data.cache=/data/edits-encoded

π-Flow (arXiv:2510.14974): each step of the student gives ten velocities for each token, a path that
is followed to the next step without asking the network again, and that is compared with its
teacher's velocities on the way. Examples are only where students start, so that any will do. As
published for FLUX.1: four steps at shift 3.2, guidance 3.5 for text to image; here Kontext's 2.5.
The authors train adapters of rank 256; this trains all parameters, at a tenth of their rate. Traced
as it stands; not trained (docs/distillation.md shows it in a plane).

Hardware: TPU v5p, 64 chips or a multiple, the mesh of configs/kontext_joint.py.
Sample as the run's own card says: sampler "policy" at the times below, no other number of steps.
Expect: `relative_error/I` below `no_op_error/I` of the first evaluation, least at the last time.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.flow.path import shift_timesteps
from kontext_jax.objectives.policy_distillation import PolicyDistillationConfig
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import REQUIRED, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig

TIMES = tuple(float(shift_timesteps(t, 3.2)) for t in (1.0, 0.75, 0.5, 0.25))


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="policy_distillation",
        preset="kontext-dev-policy",
        weights=REQUIRED,
        encoders=REQUIRED,
        num_steps=3000,
        batch_size=256,
        accumulate_steps=4,
        remat="save_products",
        ema_decay=0.999,
        policy_distillation=PolicyDistillationConfig(timesteps=TIMES, guidance=2.5),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=100),
        data=DataConfig(cache=REQUIRED),
        mesh=MeshConfig(data=-1, fsdp=32),
        checkpoint=CheckpointConfig(every_steps=250, keep_every=1000),
        log=LogConfig(every_steps=10),
    )
