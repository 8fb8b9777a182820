"""Values are taken or refused by the declared type of their field."""

from typing import Any, Literal

import pytest

from kontext_jax.fields import checked, fits


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
