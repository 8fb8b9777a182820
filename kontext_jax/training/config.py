"""Every setting of a training run, and what they rule out for each other.

The frozen dataclasses are the truth. A config file returns them as a locked ConfigDict, made by
`config_dict`; `parse` makes them of it again, with the command line's changes, and checks what can
be checked without reading data or weights.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import ml_collections

from kontext_jax.data.config import DataConfig
from kontext_jax.models.judges.discriminators import DiscriminatorConfig
from kontext_jax.models.judges.feature_heads import FeatureHeadsConfig
from kontext_jax.models.lora import LoraConfig
from kontext_jax.models.mmdit import Remat
from kontext_jax.models.presets import PRESETS, Preset
from kontext_jax.objectives.autoencoder import AutoencoderConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.objectives.guidance_distillation import GuidanceDistillationConfig
from kontext_jax.objectives.ladd import LADDConfig
from kontext_jax.objectives.policy_distillation import PolicyDistillationConfig
from kontext_jax.ops.attention import Backend
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.terminal import did_you_mean
from kontext_jax.training import config_tree
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.optimizer import OptimizerConfig

REQUIRED = "REQUIRED"  # stands in a config file where only the user can know the value

ObjectiveName = Literal[
    "flow_matching", "guidance_distillation", "ladd", "policy_distillation", "autoencoder"
]
# Objectives with a teacher.
DISTILLATIONS = ("guidance_distillation", "ladd", "policy_distillation")

DISCRIMINATOR_DEFAULTS = {
    "discriminator": DiscriminatorConfig(),
    "discriminator_optimizer": OptimizerConfig(b1=0.5, b2=0.9),
}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")


def _unused(config: Any, section: str, names: Iterable[str], unused: bool, why: str) -> None:
    """Raises if one of the settings was changed although it has nothing to act on."""
    fields = type(config).__dataclass_fields__
    for name in names:
        if unused and getattr(config, name) != fields[name].default:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}, but {why}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured on examples that are not trained on; 0 steps: never.

    Attributes:
      every_steps: steps between losses on held-out examples, each with the same noise and times
        every time; for the parameters and for their average.
      sources: where those examples are, read as `data` says; likewise `cache`, for encoded ones.
      cache: see `sources`.
      num_batches: of them.
      batch_size: examples of a batch on all devices; 0 for that of training, by micro-batches.
      sample_every_steps: steps between grids of references, results and targets
        (RUN/samples/STEP.png), from the average of the parameters where there is one.
      sample_rows: pictures in a grid.
      sample_num_steps: Euler steps; 0 for the model's own number.
      sample_guidance: guidance input while sampling, for models that take one.
    """

    every_steps: int = 0
    sources: tuple[str, ...] = ()
    cache: str = ""
    num_batches: int = 4
    batch_size: int = 0
    sample_every_steps: int = 0
    sample_rows: int = 4
    sample_num_steps: int = 0
    sample_guidance: float = 2.5

    def __post_init__(self):
        for name in ("every_steps", "batch_size", "sample_every_steps", "sample_num_steps"):
            _at_least(f"eval.{name}", getattr(self, name), 0)
        for name in ("num_batches", "sample_rows"):
            _at_least(f"eval.{name}", getattr(self, name), 1)
        wanted = [n for n in ("every_steps", "sample_every_steps") if getattr(self, n)]
        if wanted and not (self.sources or self.cache):
            raise ValueError(
                f"eval.{wanted[0]} is {getattr(self, wanted[0])}, but there are no held-out "
                "examples; name them by eval.sources or eval.cache, or set it to 0"
            )
        if self.sources and self.cache:
            raise ValueError("eval.sources and eval.cache contradict each other; drop one")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written down, and how often.

    Attributes:
      every_steps: steps that a line of metrics.jsonl and a point in TensorBoard is the mean of.
      tensorboard: whether to write RUN/tensorboard.
      print_every_s: seconds between progress lines where there is no terminal.
      profile_from_step: step at which `jax.profiler` begins to write to RUN/profile; 0: never.
      profile_num_steps: steps that it records.
    """

    every_steps: int = 10
    tensorboard: bool = True
    print_every_s: float = 10.0
    profile_from_step: int = 0
    profile_num_steps: int = 3

    def __post_init__(self):
        _at_least("log.every_steps", self.every_steps, 1)
        _at_least("log.profile_from_step", self.profile_from_step, 0)
        _at_least("log.profile_num_steps", self.profile_num_steps, 1)
        _unused(self, "log", ("profile_num_steps",), not self.profile_from_step,
                "log.profile_from_step is 0, so nothing is profiled")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      objective: "flow_matching" trains the transformer, "autoencoder" the autoencoder;
        "guidance_distillation" trains a transformer to do in one pass what its teacher does in two,
        "ladd" one to do in few steps what its teacher does in many, and "policy_distillation" one
        whose steps are paths.
      preset: which model, of `kontext_jax.models.presets`.
      weights: what the trained network starts from: a weight directory, a run's folder, or
        published weights; "" draws it afresh.
      teacher: likewise the frozen transformer that the student of a distillation learns from; ""
        for that of `weights`. Of a run, as of `weights`, the average is taken where there is one.
      encoders: likewise where the frozen text encoders and the autoencoder are; "" for where
        `weights` is. The tiny preset alone has untrained ones for nothing.
      autoencoder_weights: where the frozen autoencoder is, if not with the text encoders.
      train: "full", or "lora": adapters beside frozen weights.
      seed: of parameters, noise, times, dropout and the order of the data.
      num_steps: of the run.
      batch_size: examples of a step, on all devices together.
      accumulate_steps: parts of a batch that are computed one after another, to save memory.
      dtype: in which networks compute. Parameters and optimizer are float32 in any case.
      attention_backend: see `kontext_jax.ops.attention`.
      remat: what the backward pass keeps of the forward pass; see `kontext_jax.models.mmdit`. An
        autoencoder has "none" and "full".
      ema_decay: of the average of the parameters; 0 keeps none.
      max_skipped_in_a_row: training stops when so many steps in a row gave no finite numbers.
    """

    objective: ObjectiveName = "flow_matching"
    preset: str = "kontext-dev"
    weights: str = ""
    teacher: str = ""
    encoders: str = ""
    autoencoder_weights: str = ""
    train: Literal["full", "lora"] = "full"
    seed: int = 0
    num_steps: int = 10_000
    batch_size: int = 8
    accumulate_steps: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention_backend: Backend = "auto"
    remat: Remat = "full"
    ema_decay: float = 0.9999
    max_skipped_in_a_row: int = 10
    flow: FlowMatchingConfig = dataclasses.field(default_factory=FlowMatchingConfig)
    guidance_distillation: GuidanceDistillationConfig = dataclasses.field(
        default_factory=GuidanceDistillationConfig
    )
    ladd: LADDConfig = dataclasses.field(default_factory=LADDConfig)
    policy_distillation: PolicyDistillationConfig = dataclasses.field(
        default_factory=PolicyDistillationConfig
    )
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    heads: FeatureHeadsConfig = dataclasses.field(default_factory=FeatureHeadsConfig)
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    discriminator_optimizer: OptimizerConfig = DISCRIMINATOR_DEFAULTS["discriminator_optimizer"]
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(
                f"preset is {self.preset!r}{did_you_mean(self.preset, tuple(PRESETS))}; expected "
                f"one of {', '.join(PRESETS)}"
            )
        for name in ("num_steps", "batch_size", "accumulate_steps", "max_skipped_in_a_row"):
            _at_least(name, getattr(self, name), 1)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay is {self.ema_decay:g}; expected a number from 0 (no average) to below 1"
            )
        if self.batch_size % self.accumulate_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate_steps "
                f"{self.accumulate_steps}"
            )
        if self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, but the run has "
                f"{self.num_steps} steps; shorten it or raise num_steps"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        """Refuses settings of parts that this run does not have."""
        if self.train == "lora" and not self.weights:
            raise ValueError(
                "train is 'lora', but there are no weights to adapt; set weights, or train='full'"
            )
        if self.objective == "autoencoder":
            if self.train == "lora":
                raise ValueError("train is 'lora', which the objective autoencoder has not")
            for name in ("encoders", "autoencoder_weights"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but the objective autoencoder uses no "
                        "frozen networks; its own start is weights"
                    )
            if self.data.cache:
                raise ValueError("data.cache holds encoded examples; an autoencoder needs pictures")
            if self.remat not in ("none", "full"):
                raise ValueError(
                    f"remat is {self.remat!r}, which the transformer alone has; an autoencoder "
                    "takes 'none' or 'full'"
                )
        self._check_distillation()
        self._check_discriminator()
        if self.flow.guidance in ("fixed", "range") and not self.model.mmdit.guidance_embed:
            raise ValueError(
                f"flow.guidance is {self.flow.guidance!r}, but {self.preset} takes no guidance; "
                "leave it at 'auto'"
            )

        sample_guidance = self.eval.sample_guidance
        if sample_guidance != EvalConfig.sample_guidance and not self.model.mmdit.guidance_embed:
            raise ValueError(
                f"eval.sample_guidance is {sample_guidance:g}, but {self.preset} takes no guidance"
            )

    def _check_distillation(self) -> None:
        gives_policy = self.model.num_velocities > 1
        if gives_policy != (self.objective == "policy_distillation"):
            given = "several velocities" if gives_policy else "one velocity"
            wanted = "one" if gives_policy else "several (kontext-dev-policy)"
            raise ValueError(
                f"{self.preset} gives {given} a step, and the objective {self.objective} trains "
                f"{wanted}; set preset to another, or objective"
            )
        if self.objective not in DISTILLATIONS:
            if self.teacher:
                raise ValueError(
                    f"teacher is {self.teacher!r}, but the objective {self.objective} has none"
                )
            return
        if not self.weights:
            raise ValueError(
                f"the objective {self.objective} starts from weights, and there are none; set "
                "weights to those of the teacher"
            )
        if self.train == "lora":
            raise ValueError(f"train is 'lora', which the objective {self.objective} has not")
        if self.objective == "guidance_distillation" and not self.model.mmdit.guidance_embed:
            raise ValueError(
                f"{self.preset} takes no guidance, so none can be distilled into it; set preset to "
                "one that does, of the same size (kontext-dev for kontext-base)"
            )

    def _check_discriminator(self) -> None:
        loss = self.autoencoder
        has_pictures = loss.adversarial_weight > 0
        has_heads = self.objective == "ladd"
        if (has_pictures or has_heads) and self.discriminator_optimizer.name != "adamw":
            raise ValueError(
                f"discriminator_optimizer.name is {self.discriminator_optimizer.name!r}, which is "
                "for the transformer's matrices; choose 'adamw'"
            )
        if has_pictures and loss.adversarial_start_step >= self.num_steps:
            raise ValueError(
                f"autoencoder.adversarial_start_step is {loss.adversarial_start_step}, but the "
                f"run has {self.num_steps} steps, so the discriminator would never begin; "
                "lower it"
            )
        unused = [] if has_pictures else ["discriminator"]
        if not (has_pictures or has_heads):
            unused.append("discriminator_optimizer")
        for section in unused:
            default = config_tree.to_dict(DISCRIMINATOR_DEFAULTS[section])
            for name, value in config_tree.to_dict(getattr(self, section)).items():
                if value != default[name]:
                    raise ValueError(
                        f"{section}.{name} is {value!r}, but there is no discriminator; set "
                        "autoencoder.adversarial_weight (latent diffusion's is 0.5)"
                    )

    @property
    def model(self) -> Preset:
        return PRESETS[self.preset]

    @property
    def eval_data(self) -> DataConfig:
        """How the held-out examples are read: as those of training, but each time the same."""
        return dataclasses.replace(
            self.data,
            sources=self.eval.sources,
            cache=self.eval.cache,
            synthetic_cache="",
            synthetic_share=DataConfig.synthetic_share,
            weights=(),
            random_crop=False,
            flip=False,
            reference_dropout=0.0,
            workers=0,
        )


# Sections that belong to one choice: name of the section → (setting, value it belongs to).
SECTIONS = {
    "lora": ("train", "lora"),
    "flow": ("objective", "flow_matching"),
    "guidance_distillation": ("objective", "guidance_distillation"),
    "ladd": ("objective", "ladd"),
    "policy_distillation": ("objective", "policy_distillation"),
    "heads": ("objective", "ladd"),
    "autoencoder": ("objective", "autoencoder"),
}


def config_dict(config: TrainConfig) -> ml_collections.ConfigDict:
    """The config as a locked ConfigDict, which refuses keys that do not exist."""
    return ml_collections.ConfigDict(config_tree.to_dict(config)).lock()


def parse(
    config: ml_collections.ConfigDict, settings: Sequence[tuple[str, str]] = ()
) -> TrainConfig:
    """The config that a ConfigDict and the command line's `(key, text)` changes mean.

    Raises:
      ValueError: an unknown key (the nearest valid one is named), a value of the wrong type or
        range, or a setting that has nothing to act on in this run.
    """
    written = config.to_dict()
    values = config.to_dict()
    for key, text in settings:
        config_tree.set_key(values, key, config_tree.parse_value(TrainConfig, key, text))
    parsed = config_tree.from_dict(TrainConfig, values)
    given = {key for key, _ in settings}
    for section, (setting, value) in SECTIONS.items():
        if getattr(parsed, setting) == value:
            continue
        default = config_tree.to_dict(TrainConfig.__dataclass_fields__[section].default_factory())
        for name in default:
            now = values.get(section, {}).get(name, default[name])
            before = written.get(section, {}).get(name, default[name])
            # A flag that only takes back what the file says is welcome.
            is_idle = f"{section}.{name}" in given and _plain(before) == default[name]
            if _plain(now) != default[name] or is_idle:
                raise ValueError(
                    f"{section}.{name} is set, but {setting} is {getattr(parsed, setting)!r}; it "
                    f"acts with {setting}={value!r} only"
                )
    return parsed


def _plain(value: Any) -> Any:
    """A value in JSON's types, tuples as lists."""
    return config_tree.to_dict(value)


def check_complete(config: TrainConfig) -> None:
    """Raises ValueError if something that only the user can know is not given yet."""
    missing = [
        key
        for key in config_tree.keys(TrainConfig)
        if REQUIRED in json.dumps(config_tree.get_key(config, key), default=str)
    ]
    if missing:
        flags = " ".join(f"--config.{key}=…" for key in missing)
        raise ValueError(f"{', '.join(missing)} must be given: {flags}")
    config.data.check()
    if config.eval.sources or config.eval.cache:
        config.eval_data.check()


def to_json(config: TrainConfig) -> str:
    """The config as JSON, for people and for RUN/config.json."""
    return json.dumps(config_tree.to_dict(config), indent=2)


def from_json(text: str) -> TrainConfig:
    """Inverse of `to_json`.

    Raises:
      ValueError: as `parse`.
    """
    return config_tree.from_dict(TrainConfig, json.loads(text))
