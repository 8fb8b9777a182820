"""Nested frozen dataclasses as dicts of JSON's types, as ConfigDicts and from the command line.

The dataclasses are the truth: names, types and defaults stand there once. What arrives from
outside, a dict or the text of a flag, is read by the declared type of its field; a key that no
dataclass has is refused with the nearest one that exists.
"""

import ast
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from kontext_jax.fields import checked, field_types, keys, unknown_key

NONE_WORDS = ("none", "null")
BOOL_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


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
    return checked(cls, values, "")


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
    return checked(kind, _from_text(kind, text), key)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested dicts, making those that are not there yet."""
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def find_key(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key of nested dicts; `default` if it is not there."""
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


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
