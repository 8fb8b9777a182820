"""Whether a value fits a field, and whether the field has anything to act on.

    checked(int, 2.5, "seed")         ValueError: seed is 2.5; expected a whole number
    checked(float | None, 3, "rate")  3.0

    mu: float = option(0.0, acts_with=("mode", "const"))
    check_acting(config)              ValueError: mu is 1.0, but mode is 'linear'; …

The declaration of a field is the one description of what it takes: requests, configs, model cards
and weight layouts all ask here. Messages name the value, what was expected and, where a word is
misspelt, the nearest one.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from kontext_jax.terminal import did_you_mean

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

# (field, value of earlier versions) → the value to set in its place.
RETIRED = {("attention_backend", "pallas_gpu"): "auto"}


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name → declared type of a dataclass's fields, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a dataclass, those of its sections in place of sections."""
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def unknown_key(cls: type, key: str) -> str:
    """The message for a key that no field answers to."""
    choices = list(keys(cls))
    section = key.rpartition(".")[0]
    siblings = [choice for choice in choices if choice.rpartition(".")[0] == section]
    form = "; did you mean {}?"
    hint = did_you_mean(key, siblings, form) or did_you_mean(key, choices, form)
    listed = siblings if section and siblings else sorted({c.split(".")[0] for c in choices})
    return f"there is no setting {key!r}{hint} (there are {', '.join(listed)})"


def checked(kind: Any, value: Any, name: str, *, exact: bool = False) -> Any:
    """`value` as a field of declared type `kind` holds it.

    Lists become tuples, mappings become the dataclass that is declared, numbers become floats or
    whole numbers.

    Args:
      kind: a dataclass, a Literal, `int`, `float`, `bool`, `str`, `Any`, or a union, tuple or
        dict of those.
      name: name of the field, for messages; "" for a whole dataclass.
      exact: leave numbers as they are given, and refuse 3.0 for a whole number.

    Raises:
      ValueError: it is something else.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return _dataclass(kind, value, f"{name}." if name else "", exact)
        raise misfit(name, value, f"a section with {', '.join(field_types(kind))}")
    if origin in (typing.Union, types.UnionType):
        return _of_union(parts, value, name, exact)
    if origin is Literal:
        if value in parts:
            return value
        hint = did_you_mean(value, [str(part) for part in parts])
        if instead := RETIRED.get((name, str(value))):
            hint = f", which is gone (use {instead})"
        raise ValueError(f"{name} is {value!r}{hint}; expected one of {', '.join(map(str, parts))}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise misfit(name, value, "a list")
        if len(parts) == 2 and parts[1] is Ellipsis:
            parts = (parts[0],) * len(value)
        if len(parts) != len(value):
            raise misfit(name, value, f"a list of {len(parts)}")
        items = enumerate(zip(parts, value, strict=True))
        return tuple(checked(part, x, f"{name}[{i}]", exact=exact) for i, (part, x) in items)
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise misfit(name, value, "a dict")
        kind_of_item = parts[1] if parts else Any
        return {
            str(key): checked(kind_of_item, item, name, exact=exact) for key, item in value.items()
        }
    return value if kind is Any else _scalar(kind, value, name, exact)


def fits(kind: Any, value: Any) -> bool:
    """Whether `checked` takes the value, exactly as it is given."""
    try:
        checked(kind, value, "", exact=True)
    except ValueError:
        return False
    return True


def misfit(name: str, value: Any, expected: str) -> ValueError:
    """The error for a value that does not fit; `expected` is a noun with its article."""
    return ValueError(f"{name} is {value!r}; expected {expected}")


def _of_union(parts: tuple[Any, ...], value: Any, name: str, exact: bool) -> Any:
    """`value` as the first part of a union that takes it; else the first part's error."""
    if value is None and types.NoneType in parts:
        return None
    errors = []
    for part in parts:
        if part is types.NoneType:
            continue
        try:
            return checked(part, value, name, exact=exact)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _scalar(kind: Any, value: Any, name: str, exact: bool) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return value if exact else float(value)
    if kind is int and number:
        if isinstance(value, int):
            return value
        if not exact and math.isfinite(value) and value == int(value):
            return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise misfit(name, value, WORDS.get(kind, getattr(kind, "__name__", str(kind))))


def _dataclass(cls: type, values: Mapping[str, Any], prefix: str, exact: bool) -> Any:
    fields = {}
    for name, value in values.items():
        if name not in field_types(cls):
            raise ValueError(unknown_key(cls, name))
        fields[name] = checked(field_types(cls)[name], value, prefix + name, exact=exact)
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"{', '.join(prefix + name for name in missing)} must be given")
    return cls(**fields)


IDLE = (
    "{name} is {value}, but {setting} is {other!r}; it applies to {wanted} only: leave it at "
    "{default}"
)


def option(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    acts_with: tuple[Any, ...],
    otherwise: str = IDLE,
    help: str = "",
) -> Any:
    """A field of a dataclass that acts only where another setting has certain values.

    Args:
      default: the field's default; or `factory` makes it.
      acts_with: (name of the other setting, its values…); without values, any that is not empty, 0
        or False. The name may be dotted. Several such tuples mean that one of them is enough.
      otherwise: message of `check_acting`, with {name}, {value} and {default} of the field,
        {setting}, {other} and {wanted} for the other setting, its value and the values with which
        the field acts; {names}, where it stands, are all fields that the message is right for.
      help: text for `--help`, where the field is an option of a command.
    """
    conditions = acts_with if isinstance(acts_with[0], tuple) else (acts_with,)
    metadata = {"acts_with": conditions, "otherwise": otherwise, "help": help}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_acting(
    config: Any,
    section: str = "",
    *,
    names: Collection[str] | None = None,
    given: Collection[str] = (),
) -> None:
    """Refuses options of a dataclass that were changed and have nothing to act on.

    Args:
      section: name of the dataclass in messages, before a dot.
      names: fields to look at; None: all that `option` made.
      given: dotted keys that count as changed even where they have their default.

    Raises:
      ValueError: one was, by its own message.
    """
    prefix = f"{section}." if section else ""
    idle: list[tuple[str, Any, Any, dataclasses.Field]] = []
    for field in dataclasses.fields(config):
        if (names is not None and field.name not in names) or _acts(config, field):
            continue
        for name, value, default in _values(config, field, prefix):
            if value != default or name in given:
                idle.append((name, value, default, field))
    if not idle:
        return
    name, value, default, field = idle[0]
    setting, *wanted = field.metadata["acts_with"][0]
    otherwise = field.metadata["otherwise"]
    raise ValueError(
        otherwise.format(
            name=name,
            names=", ".join(key for key, *_, f in idle if f.metadata["otherwise"] == otherwise),
            value=value,
            default=default,
            setting=prefix + setting,
            other=_get(config, setting),
            wanted=" and ".join(map(str, wanted)),
        )
    )


def _acts(config: Any, field: dataclasses.Field) -> bool:
    """Whether one of a field's conditions holds, or it has none."""
    conditions = field.metadata.get("acts_with")
    if conditions is None:
        return True
    for setting, *wanted in conditions:
        value = _get(config, setting)
        if value in wanted if wanted else value:
            return True
    return False


def _values(config: Any, field: dataclasses.Field, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, default) of a field, or of all settings of a section."""
    value = getattr(config, field.name)
    has_default = field.default is not dataclasses.MISSING
    default = field.default if has_default else field.default_factory()
    if not dataclasses.is_dataclass(value):
        yield prefix + field.name, value, default
        return
    for inner in dataclasses.fields(value):
        pair = (_plain(getattr(part, inner.name)) for part in (value, default))
        yield (f"{prefix}{field.name}.{inner.name}", *pair)


def _get(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _plain(value: Any) -> Any:
    """A value with lists for tuples, as JSON has them."""
    return [_plain(x) for x in value] if isinstance(value, tuple | list) else value
