"""Values are taken or refused by the declared type of their field, and by what it acts on."""

import dataclasses
import re
from typing import Any, Literal

import pytest

from kontext_jax.fields import check_acting, checked, fits, option


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (float, 3, 3.0),
        (int, 3.0, 3),
        (int | None, None, None),
        (float | str, "auto", "auto"),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[str, float], ["a", 1], ("a", 1.0)),
        (dict[str, int], {"a": 1.0}, {"a": 1}),
        (Literal["a", "b"], "b", "b"),
        (Any, [1], [1]),
    ],
)
def test_a_value_is_held_as_its_field_declares(kind, value, found):
    held = checked(kind, value, "x")
    assert held == found and type(held) is type(found)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, True, "x is True; expected a whole number"),
        (int, float("inf"), "x is inf; expected a whole number"),
        (float, float("nan"), "x is nan; expected a number"),
        (float | None, "1", "x is '1'; expected a number"),
        (tuple[int, ...], [1, "a"], r"x\[1\] is 'a'; expected a whole number"),
        (tuple[str, ...], "ab", "x is 'ab'; expected a list"),
        (Literal["index", "width"], "indx", r"did you mean index\?"),
    ],
)
def test_what_does_not_fit_is_named(kind, value, message):
    with pytest.raises(ValueError, match=message):
        checked(kind, value, "x")


def test_exact_values_stay_as_they_are_given():
    assert type(checked(float, 3, "x", exact=True)) is int
    assert fits(float, 3) and fits(int, 3)
    assert not fits(int, 3.0) and not fits(tuple[int, ...], [1.0]) and not fits(str | None, 3)


@dataclasses.dataclass(frozen=True)
class Part:
    low: float = 0.0
    high: float = 1.0


@dataclasses.dataclass(frozen=True)
class Acting:
    mode: str = "plain"
    weight: float = 0.0
    mu: float = option(0.0, acts_with=("mode", "const", "line"))
    net: str = option("a", acts_with=("weight",), otherwise="{name} is {value!r}: {setting}=0")
    both: int = option(
        3, acts_with=(("weight",), ("mode", "const")), otherwise="{names} of {other} do nothing"
    )
    last: int = option(
        3, acts_with=(("weight",), ("mode", "const")), otherwise="{names} of {other} do nothing"
    )
    part: Part = option(factory=Part, acts_with=("mode", "const"))


@pytest.mark.parametrize(
    "given",
    [
        Acting(),
        Acting(mode="const", mu=1.0, both=4, part=Part(low=0.5)),
        Acting(mode="line", mu=1.0),
        Acting(weight=0.1, net="b", both=4),
    ],
)
def test_options_that_act_or_have_their_default_pass(given):
    check_acting(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            Acting(mu=1.0),
            "s.mu is 1.0, but s.mode is 'plain'; it applies to const and line only: leave it at",
        ),
        (Acting(net="b"), "s.net is 'b': s.weight=0"),
        (Acting(both=4, last=5), "s.both, s.last of 0.0 do nothing"),
        (Acting(part=Part(high=2.0)), "s.part.high is 2.0, but s.mode is 'plain'; it applies"),
    ],
)
def test_an_option_without_effect_is_refused_by_its_own_words(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_acting(given, "s")


def test_what_counts_as_given_is_refused_at_its_default_too():
    with pytest.raises(ValueError, match=r"^part\.low is 0\.0, but mode"):
        check_acting(Acting(), given={"part.low"})
    check_acting(Acting(mu=1.0), names=("net",))
