"""Nested frozen dataclasses as dicts of JSON's types, as ConfigDicts and from the command line.

The dataclasses are the truth: names, types and defaults stand there once. What arrives from
outside, a dict or the text of a flag, is read by the declared type of its field; a key that no
dataclass has is refused with the nearest one that exists.
"""

import ast
import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

NONE_WORDS = ("none", "null")
BOOL_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


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


def nearest_key(key: str, choices: Sequence[str]) -> str | None:
    """The choice that `key` most likely means: by spelling, by its last word, or by initials."""

    def likeness(choice: str) -> float:
        word, other = key.rpartition(".")[2], choice.rpartition(".")[2]
        initials = "".join(part[:1] for part in other.split("_"))
        by_word = 0.95 if word == initials else difflib.SequenceMatcher(None, word, other).ratio()
        whole = difflib.SequenceMatcher(None, key, choice).ratio()
        return by_word + 0.1 * whole if max(by_word, whole) > 0.6 else 0.0

    best = max(choices, key=likeness, default=None)
    return best if best is not None and likeness(best) > 0 else None


def unknown_key(cls: type, key: str) -> str:
    """The message for a key that no field answers to."""
    choices = list(keys(cls))
    section = key.rpartition(".")[0]
    siblings = [choice for choice in choices if choice.rpartition(".")[0] == section]
    near = nearest_key(key, siblings) or nearest_key(key, choices)
    hint = f"; did you mean {near}?" if near else ""
    listed = siblings if section and siblings else sorted({c.split(".")[0] for c in choices})
    return f"there is no setting {key!r}{hint} (there are {', '.join(listed)})"


def to_dict(config: Any) -> Any:
    """A dataclass in JSON's types: nested dicts, tuples as lists."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """Inverse of `to_dict`; settings that are not given take their defaults.

    Raises:
      ValueError: an unknown key (all of them, each with the nearest valid one), or a value of
        another type than its field's.
    """
    unknown = [key for key in _dotted(cls, values) if _type_of(cls, key) is None]
    if unknown:
        raise ValueError("; ".join(unknown_key(cls, key) for key in unknown))
    return _dataclass(cls, values, "")


def parse_value(cls: type, key: str, text: str) -> Any:
    """The value that a flag's text means for the setting `key`, by its declared type.

    Text stands for itself, numbers and true/false are words, "none" is None; lists are written as
    in Python or JSON, or as words between commas.

    Raises:
      ValueError: there is no such setting, or the text does not fit it.
    """
    kind = _type_of(cls, key)
    if kind is None:
        raise ValueError(unknown_key(cls, key))
    if dataclasses.is_dataclass(kind):
        first = next(keys(kind), "")
        raise ValueError(f"{key} is a section; set one of its settings, such as {key}.{first}")
    return _checked(kind, _from_text(kind, text), key)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested dicts."""
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    values[name] = value


def get_key(config: Any, key: str) -> Any:
    """The value at a dotted key of nested dataclasses."""
    return functools.reduce(getattr, key.split("."), config)


def _dotted(cls: type, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested dicts, as deep as the dataclasses go."""
    for name, value in values.items():
        kind = _type_of(cls, name)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in _dotted(kind, value))
        else:
            yield prefix + str(name)


def _type_of(cls: type, key: str) -> Any:
    """Declared type of a dotted key, or None."""
    name, _, rest = key.partition(".")
    kind = field_types(cls).get(name)
    if not rest:
        return kind
    return _type_of(kind, rest) if dataclasses.is_dataclass(kind) else None


def _dataclass(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {}
    for name, value in values.items():
        if name not in field_types(cls):
            raise ValueError(unknown_key(cls, name))
        fields[name] = _checked(field_types(cls)[name], value, prefix + name)
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"{', '.join(prefix + name for name in missing)} must be given")
    return cls(**fields)


def _checked(kind: Any, value: Any, key: str) -> Any:
    """`value` as a field of declared type `kind` holds it.

    Raises:
      ValueError: it is something else.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return _dataclass(kind, value, f"{key}.")
        raise _misfit(key, value, f"a section with {', '.join(field_types(kind))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in parts:
            return None
        errors = []
        for part in parts:
            if part is types.NoneType:
                continue
            try:
                return _checked(part, value, key)
            except ValueError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value in parts:
            return value
        near = nearest_key(str(value), [str(part) for part in parts])
        hint = f" (did you mean {near}?)" if near else ""
        raise ValueError(f"{key} is {value!r}{hint}; expected one of {', '.join(map(str, parts))}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _misfit(key, value, "a list")
        if len(parts) == 2 and parts[1] is Ellipsis:
            parts = (parts[0],) * len(value)
        if len(parts) != len(value):
            raise _misfit(key, value, f"a list of {len(parts)}")
        items = zip(parts, value, strict=True)
        return tuple(_checked(part, item, f"{key}[{i}]") for i, (part, item) in enumerate(items))
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise _misfit(key, value, "a dict")
        item_kind = parts[1] if parts else Any
        return {str(name): _checked(item_kind, item, key) for name, item in value.items()}
    if kind is Any:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    expected = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    raise _misfit(key, value, expected.get(kind, getattr(kind, "__name__", str(kind))))


def _misfit(key: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{key} is {value!r}; expected {expected}")


def _from_text(kind: Any, text: str) -> Any:
    """The most specific reading of a flag's text that a field of type `kind` could take."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in parts and text.lower() in NONE_WORDS:
            return None
        return _from_text(next(part for part in parts if part is not types.NoneType), text)
    if origin is Literal:
        return next((part for part in parts if str(part) == text), text)
    if kind is bool:
        return BOOL_WORDS.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return _literal(text)
    if origin is tuple:
        value = _literal(text)
        if isinstance(value, list | tuple):
            return value
        items = [item.strip() for item in text.split(",") if item.strip()]
        return [_from_text(parts[0], item) for item in items]
    if origin is dict or kind in (dict, Any):
        return _literal(text)
    return text


def _literal(text: str) -> Any:
    """Text as JSON or as a Python literal; itself if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
