"""Settings from dicts and from the command line: read by type, refused with the nearest key."""

import dataclasses
import json
from typing import Literal

import pytest

from kontext_jax.training import config_tree


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    clip_norm: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 0
    shuffle: bool = True
    sizes: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = Optimizer()


FULL = Settings(
    seed=3,
    shuffle=False,
    sizes=((64, 64), (96, 32)),
    names=("a", "b"),
    sources=(Source("x", 2.0), Source("y")),
    columns={"target": "edited"},
    optimizer=Optimizer(name="muon", clip_norm=None),
)


def test_dicts_in_jsons_types_and_back():
    assert (
        config_tree.from_dict(Settings, json.loads(json.dumps(config_tree.to_dict(FULL)))) == FULL
    )
    assert config_tree.from_dict(Settings, {}) == Settings()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("seed", "1e3", 1000),
        ("shuffle", "false", False),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.clip_norm", "none", None),
        ("optimizer.clip_norm", "0.5", 0.5),
        ("optimizer.name", "muon", "muon"),
        ("names", "a, b", ("a", "b")),
        ("names", '["a,b"]', ("a,b",)),
        ("sizes", "[(64, 64), (96, 32)]", ((64, 64), (96, 32))),
        ("sources", '[{"path": "x"}]', (Source("x"),)),
        ("columns", '{"target": "edited"}', {"target": "edited"}),
    ],
)
def test_flags_are_read_by_the_fields_type(key, text, value):
    parsed = config_tree.parse_value(Settings, key, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizr.warmup_steps", "optimizer.warmup_steps"),
        ("sed", "seed"),
        ("shufle", "shuffle"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, near):
    with pytest.raises(ValueError, match=f"no setting '{key}'; did you mean {near}\\?"):
        config_tree.parse_value(Settings, key, "1")


def test_a_key_like_no_other_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'zzz' \(there are columns, names, optimizer, seed"):
        config_tree.parse_value(Settings, "zzz", "1")


def test_all_unknown_keys_of_a_dict_are_named():
    values = {"sed": 1, "optimizer": {"lr": 1}}
    with pytest.raises(ValueError, match=r"'sed'; did you mean seed.*'optimizer.lr'; did you mean"):
        config_tree.from_dict(Settings, values)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("seed", "1.5", "seed is 1.5; expected a whole number"),
        ("seed", "true", "seed is True; expected a whole number"),
        ("shuffle", "maybe", "shuffle is 'maybe'; expected true or false"),
        ("optimizer.learning_rate", "nan", "learning_rate is nan; expected a number"),
        ("optimizer.name", "adam", r"'adam' \(did you mean adamw\?\); expected one of adamw, muon"),
        ("optimizer", "adamw", "optimizer is a section; set one of its settings"),
        ("sizes", "[(64, 64, 3)]", r"sizes\[0\] is .* expected a list of 2"),
        ("sources", '[{"pth": "x"}]', r"did you mean path\?"),
        ("sources", "[{}]", r"sources\[0\].path must be given"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(key, text, message):
    with pytest.raises(ValueError, match=message):
        config_tree.parse_value(Settings, key, text)
