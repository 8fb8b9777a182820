"""One to four steps a picture: latent adversarial distillation of FLUX.1 Kontext [dev].

    python -m kontext_jax.data.synthesize --model gs://bucket/runs/guided --cache /data/edits \\
        --out /data/edits-made --guidance 2.5 --steps 28
    python train.py --config configs/ladd.py --coordinator auto \\
        --config.weights=gs://bucket/runs/guided --config.encoders=FLUX.1-Kontext-dev \\
        --config.data.cache=/data/edits-made

The recipe of arXiv:2403.12015, by which FLUX.1 [schnell] was made, on a model that guidance was
distilled into (configs/guidance_distill.py): student and teacher start as the same weights, and
every example is the teacher's own result. What FLUX's own was trained with is not published; the
rates are in the range of other LADD trainers at this size, single steps get 0.7 of the samples, and
eight heads look at evenly spaced blocks (docs/distillation.md). Traced as it stands; not trained.

Hardware: TPU v5p, 64 chips or a multiple, the mesh of configs/kontext_joint.py. Never a batch of
one: below 32 the discriminator wins early.
Sample with the re-noise sampler at t = 1, .75, .5, .25, unshifted.
Expect: `discriminator/loss` near 16 (two for each head) once both networks are even; whether modes
are lost it does not tell, so look at samples and their diversity.
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.objectives.ladd import LADDConfig
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import REQUIRED, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        objective="ladd",
        preset="kontext-dev",
        weights=REQUIRED,
        encoders=REQUIRED,
        num_steps=10_000,
        batch_size=256,
        accumulate_steps=4,
        remat="save_products",
        ema_decay=0.999,
        ladd=LADDConfig(guidance=2.5),
        optimizer=OptimizerConfig(learning_rate=2e-6, warmup_steps=200, b1=0.0, b2=0.99),
        discriminator_optimizer=OptimizerConfig(learning_rate=1e-5, b1=0.0, b2=0.99),
        data=DataConfig(cache=REQUIRED),
        mesh=MeshConfig(data=-1, fsdp=32),
        checkpoint=CheckpointConfig(every_steps=500, keep_every=2000),
        log=LogConfig(every_steps=10),
    )
