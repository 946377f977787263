"""A configuration as JSON and back: plain values out, checked dataclasses in."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jaxunet.errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; `from_dict` turns it back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_dict(value)
        return str(value) if isinstance(value, Path) else value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """Make a dataclass of `kind` from what `to_dict` gave.

    Raises:
        ConfigError: a field is unknown or has a value of the wrong type; the message
            names it with its full path, such as `train.epochs`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'The configuration'} is {values!r}, not an object.")
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"Unknown field {', '.join(where + name for name in unknown)}; "
            f"known here: {', '.join(hints)}."
        )
    made = {
        name: from_dict(hints[name], value, f"{where}{name}.")
        if dataclasses.is_dataclass(hints[name])
        else _typed(hints[name], value, where + name)
        for name, value in values.items()
    }
    return kind(**made)


def _typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as JSON gave it, checked against the type `hint` and made into it."""
    options = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option):
                return value
        elif option is Path:
            if isinstance(value, str):
                return Path(value)
        elif option is type(None):
            if value is None:
                return None
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif get_origin(option) is tuple:
            if isinstance(value, list | tuple) and all(type(each) is int for each in value):
                return tuple(value)
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    allowed = " or ".join(
        ", ".join(map(repr, get_args(o))) if get_origin(o) is Literal else o.__name__
        for o in options
    )
    raise ConfigError(f"{name} is {value!r}, but must be {allowed}.")
