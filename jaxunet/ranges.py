"""What values a field of a configuration may have, said in one form."""

import math

from jaxunet.errors import ConfigError


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming the field, its value and what is allowed."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}.")


def require_positive(name: str, value: float) -> None:
    require(0 < value < math.inf, name, value, "a positive number")


def require_at_least(name: str, value: float, least: float) -> None:
    require(least <= value < math.inf, name, value, f"at least {least}")
