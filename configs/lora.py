"""Low-rank adapters beside a published Kontext, on your own edits.

    python train.py --config configs/lora.py \\
        --config.weights=FLUX.1-Kontext-dev --config.data.sources=my_edits
    python -m convert_weights lora runs/lora --layout peft --out hats.safetensors
    python sample.py --weights FLUX.1-Kontext-dev --lora hats.safetensors --image me.png --prompt …

Reproduces what the usual trainers do: the modules of diffusers' script for Kontext (attention and
MLPs, not the modulation), rank and alpha 16, AdamW at 1e-4 for 3,000 steps of one example, text
dropout 0.05 (ai-toolkit). The guidance input is held at 1, as in finetune.py.

Hardware: one GPU of 80 GB; the frozen transformer and encoders lie in bfloat16 beside it (22 + 9
GiB), adapters and their optimizer take less than 1 GiB (computed by --dry-run). At an assumed 40 %
of the peak a 1024² pair takes an H100 0.9 s; not measured. Checkpoints hold the adapters alone.
Expect: the loss hardly moves; look at RUN/samples (--config.eval.sources=held_out
--config.eval.sample_every_steps=250).
"""

from kontext_jax.data.config import DataConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import REQUIRED, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        preset="kontext-dev",
        weights=REQUIRED,
        train="lora",
        num_steps=3000,
        batch_size=1,
        ema_decay=0.0,
        flow=FlowMatchingConfig(timestep_mode="flux_linear", text_dropout=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
        data=DataConfig(sources=(REQUIRED,), fraction_with_references=1.0),
        lora=LoraConfig(rank=16, alpha=16.0, targets=("kontext",)),
        checkpoint=CheckpointConfig(every_steps=250),
        log=LogConfig(every_steps=10),
    )
