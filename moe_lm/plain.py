"""Configurations as plain values: what is saved, compared and fingerprinted."""

import dataclasses
import enum
from typing import Any


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of JSON values; enums by name."""
    return dataclasses.asdict(config, dict_factory=_plain_values)


def _plain_values(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.name if isinstance(value, enum.Enum) else value for name, value in items}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration by full names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
