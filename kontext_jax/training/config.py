"""Every setting of a training run, and what they rule out for each other.

A config file's `get_config()` returns a `TrainConfig`, or a ConfigDict of the same keys. `parse`
makes of it the config of the run, with the command line's changes, and checks what can be checked
without reading data or weights.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

import ml_collections

from kontext_jax.data.config import DataConfig
from kontext_jax.fields import check_acting, option
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
ON_TOKENS = ("flow_matching", *DISTILLATIONS)  # objectives that train the transformer


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured on examples that are not trained on; 0 steps: never.

    Attributes:
      every_steps: steps between losses on held-out examples, each with the same noise and times
        every time; for the parameters and for their average.
      sources: folders or files of held-out examples, read as the section `data` says.
      cache: folder of encoded held-out examples, instead of `sources`.
      num_batches: number of held-out batches.
      batch_size: examples of a batch on all devices; 0 takes a micro-batch of training.
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
      every_steps: steps whose mean is one line of metrics.jsonl and one point in TensorBoard.
      tensorboard: write RUN/tensorboard too.
      print_every_s: seconds between progress lines where there is no terminal.
      profile_from_step: step at which `jax.profiler` begins to write to RUN/profile; 0: never.
      profile_num_steps: steps that it records.
    """

    every_steps: int = 10
    tensorboard: bool = True
    print_every_s: float = 10.0
    profile_from_step: int = 0
    profile_num_steps: int = option(
        3,
        acts_with=("profile_from_step",),
        otherwise="{name} is {value}, but {setting} is 0, so nothing is profiled",
    )

    def __post_init__(self):
        _at_least("log.every_steps", self.every_steps, 1)
        _at_least("log.profile_from_step", self.profile_from_step, 0)
        _at_least("log.profile_num_steps", self.profile_num_steps, 1)
        check_acting(self, "log")


OTHER_CHOICE = "{name} is set, but {setting} is {other!r}; it acts with {setting}={wanted!r} only"
NO_DISCRIMINATOR = (
    "{name} is {value!r}, but there is no discriminator; set autoencoder.adversarial_weight "
    "(latent diffusion's is 0.5)"
)
NOT_FROZEN = (
    "{name} is {value!r}, but the objective autoencoder uses no frozen networks; its own start is "
    "weights"
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      objective: "flow_matching" trains the transformer, "autoencoder" the autoencoder;
        "guidance_distillation" trains a transformer to do in one pass what its teacher does in two,
        "ladd" one to do in few steps what its teacher does in many, and "policy_distillation" one
        whose steps are paths.
      preset: name of the model, one of `kontext_jax.models.presets`.
      weights: path to the weights that the trained network starts from: a weight directory, a run's
        folder, or published weights; "" draws it afresh.
      teacher: path to the frozen transformer of a distillation; "" uses that of `weights`. A run
        gives the average of its parameters, if it keeps one, here and for `weights`.
      encoders: path to the frozen text encoders and autoencoder; "" uses `weights`; "untrained"
        draws random ones, to try things out.
      autoencoder_weights: path to the frozen autoencoder, if it is not with the text encoders.
      train: "full", or "lora": adapters beside frozen weights.
      seed: seed of parameters, noise, times, dropout and the order of the data.
      num_steps: steps of the run.
      batch_size: examples of a step, on all devices together.
      accumulate_steps: parts of a batch, computed one after another to save memory.
      dtype: compute dtype of the networks. Parameters and optimizer are float32 in any case.
      attention_backend: see `kontext_jax.ops.attention`.
      remat: what the backward pass keeps of the forward pass; see `kontext_jax.models.mmdit`. An
        autoencoder has "none" and "full".
      ema_decay: decay of the average of the parameters; 0 keeps none.
      max_skipped_in_a_row: training stops when so many steps in a row gave no finite numbers.
    """

    objective: ObjectiveName = "flow_matching"
    preset: str = "kontext-dev"
    weights: str = ""
    teacher: str = option(
        "",
        acts_with=("objective", *DISTILLATIONS),
        otherwise="{name} is {value!r}, but the objective {other} has none",
    )
    encoders: str = option("", acts_with=("objective", *ON_TOKENS), otherwise=NOT_FROZEN)
    autoencoder_weights: str = option("", acts_with=("objective", *ON_TOKENS), otherwise=NOT_FROZEN)
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
    flow: FlowMatchingConfig = option(
        factory=FlowMatchingConfig, acts_with=("objective", "flow_matching"), otherwise=OTHER_CHOICE
    )
    guidance_distillation: GuidanceDistillationConfig = option(
        factory=GuidanceDistillationConfig,
        acts_with=("objective", "guidance_distillation"),
        otherwise=OTHER_CHOICE,
    )
    ladd: LADDConfig = option(
        factory=LADDConfig, acts_with=("objective", "ladd"), otherwise=OTHER_CHOICE
    )
    policy_distillation: PolicyDistillationConfig = option(
        factory=PolicyDistillationConfig,
        acts_with=("objective", "policy_distillation"),
        otherwise=OTHER_CHOICE,
    )
    autoencoder: AutoencoderConfig = option(
        factory=AutoencoderConfig, acts_with=("objective", "autoencoder"), otherwise=OTHER_CHOICE
    )
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    lora: LoraConfig = option(
        factory=LoraConfig, acts_with=("train", "lora"), otherwise=OTHER_CHOICE
    )
    heads: FeatureHeadsConfig = option(
        factory=FeatureHeadsConfig, acts_with=("objective", "ladd"), otherwise=OTHER_CHOICE
    )
    discriminator: DiscriminatorConfig = option(
        factory=DiscriminatorConfig,
        acts_with=("autoencoder.adversarial_weight",),
        otherwise=NO_DISCRIMINATOR,
    )
    discriminator_optimizer: OptimizerConfig = option(
        factory=lambda: OptimizerConfig(b1=0.5, b2=0.9),
        acts_with=(("autoencoder.adversarial_weight",), ("objective", "ladd")),
        otherwise=NO_DISCRIMINATOR,
    )
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
            if self.data.cache:
                raise ValueError("data.cache holds encoded examples; an autoencoder needs pictures")
            if self.remat not in ("none", "full"):
                raise ValueError(
                    f"remat is {self.remat!r}, which the transformer alone has; an autoencoder "
                    "takes 'none' or 'full'"
                )
        self._check_distillation()
        self._check_discriminator()
        names = {field.name for field in dataclasses.fields(self)} - {*SECTIONS}
        check_acting(self, names=names)
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


# Sections that belong to one choice; the other fields with a condition are checked at once.
SECTIONS = tuple(
    field.name
    for field in dataclasses.fields(TrainConfig)
    if field.metadata.get("otherwise") == OTHER_CHOICE
)


def config_dict(config: TrainConfig) -> ml_collections.ConfigDict:
    """The config as a locked ConfigDict, which refuses keys that do not exist."""
    return ml_collections.ConfigDict(config_tree.to_dict(config)).lock()


def parse(
    config: TrainConfig | ml_collections.ConfigDict, settings: Sequence[tuple[str, str]] = ()
) -> TrainConfig:
    """The config of a run: what a config file returns, with the command line's changes.

    Args:
      config: a ConfigDict may leave settings out, which then have their defaults.
      settings: (dotted key, text) of each change.

    Raises:
      ValueError: an unknown key (the nearest valid one is named), a value of the wrong type or
        range, or a setting that has nothing to act on in this run.
    """
    values = config_tree.to_dict(config if isinstance(config, TrainConfig) else config.to_dict())
    changed = copy.deepcopy(values)
    for key, text in settings:
        config_tree.set_key(changed, key, config_tree.parse_value(TrainConfig, key, text))
    parsed = config_tree.from_dict(TrainConfig, changed)
    # A flag without effect is refused, but one that only takes back what the file says is welcome.
    defaults = config_tree.to_dict(TrainConfig())
    given = set()
    for key, _ in settings:
        default = config_tree.find_key(defaults, key)
        if config_tree.find_key(values, key, default) == default:
            given.add(key)
    check_acting(parsed, names=SECTIONS, given=given)
    return parsed


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
      ValueError: see `parse`.
    """
    return config_tree.from_dict(TrainConfig, json.loads(text))
