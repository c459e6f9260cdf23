"""The receipt of a verification: which checks were made, what each found, and how far they go."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from moe_lm.errors import RunError

RECEIPT = "verification.json"
"""The receipt's file, beside the weights."""

MARK = "moe_lm_export.json"
"""Written into every export: names its files, so that a later export may replace them and nothing else."""

FORMAT = 2
"""Of the receipt's file."""

LAYERS, WHOLE = "layer by layer", "whole model"
"""Tiers. In the first, each layer was run alone, by transformers and by moe-lm; in the second, the whole model too."""


def files_of_export(directory: Path) -> set[str]:
    """Names of the files that an export has written there; empty where there was none."""
    try:
        return {MARK, *json.loads((directory / MARK).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


class VerificationError(RunError):
    """A check that did not hold."""

    def __init__(self, check: str, finding: str):
        """Say it.

        Args:
            check: Its name.
            finding: What is wrong, with the name of the tensor, field or file, without a full stop.
        """
        super().__init__(f"verification failed: {check}: {finding}")


@dataclasses.dataclass(frozen=True)
class Check:
    """A check that held."""

    name: str
    finding: str
    """What was compared with what, and how closely."""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    """The largest differences that were found, by what they are of."""


class StoredDigest(NamedTuple):
    """A tensor on disk, by which it is known again."""

    dtype: str
    shape: list[int]
    sha256: str
    """Of its bytes."""


@dataclasses.dataclass
class Receipt:
    """What is known of a model after its verification."""

    tier: str
    """`LAYERS` or `WHOLE`."""
    why: str
    """Why this tier was reached, and not the other."""
    checks: list[Check]
    tensors: dict[str, StoredDigest] = dataclasses.field(default_factory=dict)
    """By name on disk."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the files beside the weights that a reader of the model opens, by name."""

    def to_json(self) -> dict[str, Any]:
        """What the receipt's file holds."""
        packages = {name: version(name) for name in ("moe-lm", "torch", "transformers")}
        return {
            "format": FORMAT,
            "tier": self.tier,
            "why": self.why,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "versions": {"python": platform.python_version(), **packages},
            "files": self.files,
            "tensors": {name: digest._asdict() for name, digest in self.tensors.items()},
        }

    def table(self) -> str:
        """The checks as a table in Markdown, which reads as text as well."""
        width = max(len(check.name) for check in self.checks)
        rows = [f"| {check.name:<{width}} | {check.finding} |" for check in self.checks]
        return "\n".join([f"| {'check':<{width}} | held |", f"| {'-' * width} | --- |", *rows])

    def line(self) -> str:
        """One line that says what was verified."""
        figures = {name: value for check in self.checks for name, value in check.figures.items()}
        differences = ", ".join(f"{name} within {value:.1e}" for name, value in figures.items())
        return f"verified: {len(self.checks)} checks, {self.tier} against transformers ({differences})"
