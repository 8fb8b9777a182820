"""Settings of a run: every config file, the command line over it, and what contradicts itself."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from kontext_jax.data.config import DataConfig
from kontext_jax.models.presets import PRESETS
from kontext_jax.objectives.flow_matching import FlowMatchingConfig
from kontext_jax.training import config as train_config
from kontext_jax.training.config import EvalConfig, LogConfig, TrainConfig
from kontext_jax.training.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
TINY = TrainConfig(preset="tiny", data=DataConfig(sources=("pairs",)))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def command():
    return load(ROOT / "train.py").main


@pytest.fixture
def cli(command, capsys):
    """Runs train.py in this process: (status, stdout, last line of stderr)."""

    def run(*arguments):
        try:
            status = command([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err.strip()

    return run


def test_the_configs_of_the_page_are_there():
    assert {"t2i_pretrain", "kontext_joint", "kontext_dev", "finetune", "lora", "tiny"} <= {
        *CONFIGS
    }


def test_a_retired_value_says_what_to_use(cli):
    status, _, error = cli("--config", "configs/tiny.py", "--config.attention_backend=pallas_gpu")
    assert status == 2
    assert "'pallas_gpu', which is gone (use auto); expected one of auto, reference" in error


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_are_whole_and_the_same_as_a_config_dict(name):
    module = load(ROOT / "configs" / f"{name}.py")
    config = module.get_config()
    assert isinstance(config, TrainConfig)
    assert train_config.parse(config) == config
    assert train_config.from_json(train_config.to_json(config)) == config
    as_dict = train_config.config_dict(config)
    assert train_config.parse(as_dict) == config
    assert as_dict.is_locked
    with pytest.raises(AttributeError, match="learning_rate"):
        as_dict.optimizer.learning_rat = 1.0
    assert f"python train.py --config configs/{name}.py" in module.__doc__


MINE = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(
        {"preset": "tiny", "encoders": "untrained", "num_steps": 50, "ema_decay": 0.5,
         "optimizer": {"learning_rate": 0.25}, "data": {"sources": ("scenes:easy:train:8",)}}
    )
"""


def test_a_users_own_file_may_return_a_config_dict(cli, tmp_path):
    """Settings and whole sections that it leaves out have their defaults."""
    (tmp_path / "mine.py").write_text(MINE)
    status, out, error = cli(
        *("--config", tmp_path / "mine.py", "--print-config"),
        *("--config.seed=3", "--config.eval.num_batches=2", "--config.optimizer.b1=0.5"),
    )
    assert status == 0, error
    optimizer = OptimizerConfig(learning_rate=0.25, b1=0.5)
    expected = dataclasses.replace(
        TINY, encoders="untrained", num_steps=50, ema_decay=0.5, seed=3, optimizer=optimizer,
        data=DataConfig(sources=("scenes:easy:train:8",)), eval=EvalConfig(num_batches=2),
    )  # fmt: skip
    assert train_config.from_json(out) == expected
    status, _, error = cli("--config", tmp_path / "mine.py", "--config.lora.rank=16")
    assert status == 2 and "lora.rank is set, but train is 'full'" in error


def test_both_kinds_of_config_are_refused_alike():
    """An option of another choice, in the file or by a flag; taken back by a flag it is none."""
    config = dataclasses.replace(TINY, flow=FlowMatchingConfig(text_dropout=0.3))
    settings = [("objective", "autoencoder")]
    for given in (config, train_config.config_dict(config)):
        with pytest.raises(ValueError, match=r"flow\.text_dropout is set, but objective is"):
            train_config.parse(given, settings)
        back = [*settings, ("flow.text_dropout", "0.1")]
        assert train_config.parse(given, back).flow == FlowMatchingConfig()
        with pytest.raises(ValueError, match=r"flow\.num_loss_bins is set, but objective is"):
            train_config.parse(given, [*back, ("flow.num_loss_bins", "8")])


@pytest.mark.parametrize(
    "name", ["t2i_pretrain", "kontext_joint", "kontext_dev", "finetune", "lora"]
)
def test_what_only_the_user_knows_must_be_given(name, cli):
    status, _, error = cli("--config", ROOT / "configs" / f"{name}.py", "--dry-run")
    assert status == 2
    assert re.search(r"error: .*data\.sources must be given: .*--config\.data\.sources=…", error)


def test_recipes_say_what_their_pages_say():
    parsed = {
        name: train_config.parse(load(ROOT / f"configs/{name}.py").get_config()) for name in CONFIGS
    }
    pretrain, joint = parsed["t2i_pretrain"], parsed["kontext_joint"]
    assert (pretrain.optimizer.learning_rate, pretrain.optimizer.warmup_steps) == (1e-4, 3000)
    assert (pretrain.flow.text_dropout, pretrain.ema_decay) == (0.1, 0.9999)
    fractions = [c.data.fraction_with_references for c in (pretrain, joint, parsed["kontext_dev"])]
    assert fractions == [0.0, 0.5, 1.0]
    assert (parsed["finetune"].flow.guidance, parsed["finetune"].flow.guidance_value) == (
        "fixed",
        1,
    )
    assert parsed["finetune"].optimizer.learning_rate == 1e-5
    assert parsed["lora"].train == "lora"


def test_printed_config_is_the_config_with_changes(cli):
    status, out, _ = cli(
        *("--config", ROOT / "configs" / "tiny.py", "--print-config"),
        *("--config.optimizer.learning_rate=0.5", "--config.seed", "7"),
        "--config.eval.sources=a,b",
    )
    values = json.loads(out)
    assert status == 0
    assert (values["optimizer"]["learning_rate"], values["seed"]) == (0.5, 7)
    assert values["eval"]["sources"] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.lr=1"], "'optimizer.lr'; did you mean optimizer.learning_rate?"),
        (["--config.batchsize", "4"], "'batchsize'; did you mean batch_size?"),
        (["--config.dtype=bf16"], "dtype is 'bf16' (did you mean bfloat16?)"),
        (["--config.num_steps=many"], "num_steps is 'many'; expected a whole number"),
        (["--config.lora.rank=16"], "lora.rank is set, but train is 'full'"),
        (["--config.autoencoder.kl_weight=1"], "autoencoder.kl_weight is set, but objective is"),
        (["--config.train=lora"], "train is 'lora', but there are no weights to adapt"),
        (["--config.preset=kontxt-dev"], "did you mean kontext-dev?"),
        (["--config.seed"], "--config.seed has no value; write --config.seed=VALUE"),
        (["--print_config"], "did you mean --print-config?"),
        (["--num-processes", "2"], "need --coordinator HOST:PORT"),
        (["--coordinator", "here"], "expected HOST:PORT, or auto"),
        (["--coordinator", "a:1"], "needs --num-processes and --process-id"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "expected 0 to 1"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_change(arguments, message, cli):
    status, out, error = cli("--config", ROOT / "configs" / "tiny.py", *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("configs/tiney.py", "did you mean configs/tiny.py?"),
        ("README.md", "README.md is no Python file"),
        ("sample.py", "sample.py has no function get_config()"),
    ],
)
def test_a_config_file_that_is_none(path, message, cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, _, error = cli("--config", path)
    assert status == 2 and message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "accumulate_steps": 4}, "6 is not divisible by accumulate_steps 4"),
        ({"ema_decay": 1.0}, "ema_decay is 1; expected a number from 0"),
        ({"num_steps": 0}, "num_steps is 0; expected at least 1"),
        (
            {"num_steps": 10, "optimizer": OptimizerConfig(warmup_steps=10)},
            "warmup_steps is 10, but the run has 10 steps",
        ),
        (
            {"preset": "kontext-base", "flow": FlowMatchingConfig(guidance="fixed")},
            "kontext-base takes no guidance",
        ),
        (
            {"preset": "kontext-base", "eval": EvalConfig(sample_guidance=3.5)},
            "eval.sample_guidance is 3.5, but kontext-base takes no guidance",
        ),
        (
            {"objective": "autoencoder", "encoders": "x"},
            "encoders is 'x', but the objective autoencoder uses no frozen networks",
        ),
        (
            {"objective": "autoencoder", "data": DataConfig(cache="x")},
            "an autoencoder needs pictures",
        ),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvalConfig(every_steps=5), "eval.every_steps is 5, but there are no held-out"),
        (lambda: EvalConfig(sources=("a",), cache="b"), "contradict each other"),
        (lambda: LogConfig(profile_num_steps=9), "log.profile_from_step is 0"),
        (lambda: LogConfig(every_steps=0), "log.every_steps is 0; expected at least 1"),
    ],
)
def test_sections_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_flag_may_take_back_what_does_not_apply(cli):
    status, out, error = cli(
        *("--config", ROOT / "configs" / "tiny.py", "--print-config"),
        *("--config.objective=autoencoder", "--config.encoders="),
        "--config.flow.timestep_mode=flux_linear",
    )
    assert status == 0, error
    assert json.loads(out)["objective"] == "autoencoder"


def test_a_cache_and_options_of_pictures_contradict(cli):
    status, _, error = cli(
        *("--config", ROOT / "configs" / "tiny.py", "--dry-run"),
        *("--config.data.cache=x", "--config.data.sources=[]"),
    )
    assert status == 2
    assert "data.buckets cannot apply" in error


def test_held_out_examples_are_read_the_same_way_each_time():
    data = DataConfig(sources=("a",), weights=(2.0,), random_crop=True, flip=True, workers=4)
    config = TrainConfig(preset="tiny", data=data, eval=EvalConfig(sources=("b",)))
    read = config.eval_data
    assert (read.sources, read.weights, read.random_crop, read.flip) == (("b",), (), False, False)


def test_presets_are_those_of_the_models():
    for name, preset in PRESETS.items():
        own = {}
        if preset.num_velocities > 1:
            own = {"objective": "policy_distillation", "weights": "teacher"}
            with pytest.raises(ValueError, match="gives several velocities a step, and the"):
                TrainConfig(preset=name)
        assert TrainConfig(preset=name, **own).model.name == name
