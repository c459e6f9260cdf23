"""From the command line to plain dataclasses: the only door that Hydra and OmegaConf stand in.

A command has a schema (a dataclass) and, for training, a Hydra configuration of groups under `configs/`. Group choices
(`model=dense`) go through Hydra's compose; values (`trainer.max_steps=10`) are checked against the schema by name, so that a
misspelling is answered with the nearest valid name, with a leading `+` or without.
"""

import ast
import dataclasses
import difflib
import enum
import inspect
import types
import typing
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_lm.errors import InputError
from moe_lm.training.config import Device, RunConfig


class ExportType(enum.Enum):
    """Type of the weights of an export."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclasses.dataclass
class ExportConfig:
    """`moe-lm export`."""

    checkpoint: str | None = None
    """Run directory (its newest checkpoint) or one checkpoint directory."""
    output: str | None = None
    """Directory to write; null means `hf` in the run's directory. An earlier export there is replaced, nothing else is."""
    dtype: ExportType = ExportType.fp32
    """Type of the weights on disk: `fp32` is exactly what was trained, `bf16` half as large."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)


@dataclasses.dataclass
class GenerateConfig:
    """`moe-lm generate`."""

    checkpoint: str | None = None
    """Run directory (its newest checkpoint), one checkpoint directory, or an exported Hugging Face directory."""
    prompt: str = ""
    """Text to continue."""
    max_new_tokens: int = 200
    """Most tokens to make; the text may end before."""
    temperature: float = 0.8
    """0 takes the most probable token every time; 1 samples from the model's own distribution."""
    top_k: int | None = 50
    """Sample among this many most probable tokens; null means all."""
    seed: int = 0
    """Seed of the sampling."""
    device: Device = Device.auto
    """`cpu`, `cuda`, or `auto`."""

    def __post_init__(self) -> None:
        _require_given("checkpoint", self.checkpoint)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: must be at least 1.")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: must not be negative.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: must be at least 1, or null for all tokens.")


def _require_given(name: str, value: str | None) -> None:
    if value is None:
        raise InputError(f"{name}: is required; give {name}=DIRECTORY.")


SCHEMAS: dict[str, type] = {"pretrain": RunConfig, "export": ExportConfig, "generate": GenerateConfig}

FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "trainer.device",
    "trainer.log_interval",
    "trainer.eval_interval",
    "trainer.eval_sequences",
    "checkpoint",
    "tracker",
    "finish",
)
"""Fields (or sections) of a run that may differ when it is resumed: they do not touch what is learned."""


def config_directory() -> Path:
    """The YAML groups: inside the installed package, or in the checkout that this package runs from."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(command: str, arguments: list[str]) -> Any:
    """Compose a command's configuration from its overrides; `InputError` for whatever the user got wrong."""
    schema = SCHEMAS[command]
    groups, values = _parse(command, arguments)
    composed = _compose(command, groups)
    names = field_names(schema)
    for override in values:
        name = override.key_or_group
        if override.package is not None or override.is_delete():
            raise InputError(f"{override.input_line}: only NAME=VALUE sets a value.")
        if override.is_sweep_override():
            raise InputError(f"{override.input_line}: a command runs one configuration; start one process for each value.")
        if name not in names:
            raise InputError(f"{override.input_line}: there is no option {name!r}{_nearest(name, [*names, *_groups(command)])}.")
        OmegaConf.update(composed, name, override.value())
    return to_dataclass(schema, composed)


def to_dataclass(schema: type, values: Any) -> Any:
    """A plain dataclass from a mapping; wrong names and types are the user's mistakes."""
    try:
        # Resolved first, so that a wrong type behind an interpolation is found here as well.
        plain = OmegaConf.create(OmegaConf.to_container(OmegaConf.create(values), resolve=True))
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        return _build(schema, merged)
    except OmegaConfBaseException as error:
        raise InputError(_readable(error)) from error


def to_plain(config: Any) -> dict[str, Any]:
    """The opposite of `to_dataclass`: nested dictionaries of JSON values."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(container, dict)
    return typing.cast(dict[str, Any], container)


def save(config: Any, path: Path) -> None:
    """Write a configuration as YAML, whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))), encoding="utf-8")
    temporary.replace(path)


def load_saved(schema: type, path: Path) -> Any:
    """Read what `save` wrote."""
    return to_dataclass(schema, OmegaConf.load(path))


def differences(old: Any, new: Any) -> list[str]:
    """Fields that differ between two configurations of a run and may not, as `name=old → new`."""
    before, after = _flatten(to_plain(old)), _flatten(to_plain(new))
    free = [f"{name}." for name in FREE_TO_CHANGE]
    return [
        f"{name}={_written(before.get(name))} → {_written(after.get(name))}"
        for name in {**before, **after}
        if before.get(name) != after.get(name) and not any(f"{name}.".startswith(prefix) for prefix in free)
    ]


def describe(command: str, arguments: list[str]) -> list[tuple[str, str, str]]:
    """(name, value after the overrides, meaning) of every field of a command, in order; sections have an empty value."""
    schema = SCHEMAS[command]
    groups, values = _parse(command, arguments)
    del values
    composed = OmegaConf.create(OmegaConf.to_container(_compose(command, groups), resolve=False))
    filled = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), composed), enum_to_str=True)
    return list(_describe(schema, typing.cast(dict[str, Any], filled), ""))


def group_choices(command: str) -> dict[str, list[str]]:
    """Names of the configurations in each group."""
    return {group: sorted(p.stem for p in (config_directory() / group).glob("*.yaml")) for group in _groups(command)}


def field_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a dataclass."""
    names = []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            names += field_names(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def _groups(command: str) -> list[str]:
    if command != "pretrain":
        return []
    return sorted(p.name for p in config_directory().iterdir() if p.is_dir())


def _parse(command: str, arguments: list[str]) -> tuple[list[str], list[Override]]:
    """Split overrides into group choices, checked against the groups' files, and values."""
    for argument in arguments:
        if "=" not in argument:
            raise InputError(f"{argument!r}: options are written NAME=VALUE; `moe-lm {command} --help` lists them.")
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
    except HydraException as error:
        raise InputError(f"{' '.join(arguments)!r} can not be parsed ({str(error).splitlines()[0]}); quote special characters, "
                         "as in 'prompt=\"def f(x):\"'.") from error
    choices = group_choices(command)
    groups, values = [], []
    for override in overrides:
        group = override.key_or_group
        if group not in choices or override.is_delete():
            values.append(override)
            continue
        choice = override.value()
        if choice not in choices[group]:
            offered = ", ".join(choices[group])
            raise InputError(f"{override.input_line}: there is no such {group}; choose from {offered}.")
        groups.append(f"{'+' if group == 'experiment' else ''}{group}={choice}")
    return groups, values


def _compose(command: str, groups: list[str]) -> DictConfig:
    if command not in ("pretrain",):
        return OmegaConf.create({})
    with initialize_config_dir(version_base=None, config_dir=str(config_directory().resolve())):
        return compose(config_name=command, overrides=groups)


def _build(schema: Any, values: DictConfig) -> Any:
    """Dataclass instances from a merged configuration, bottom up, so that each one's own checks speak."""
    arguments = {}
    for field in dataclasses.fields(schema):
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(field.type, value)
        else:
            arguments[field.name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return schema(**arguments)


def _readable(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or "configuration"
    reason = str(error).splitlines()[0]
    return f"{key}: {reason}."


def _nearest(name: str, names: list[str]) -> str:
    """`, did you mean …?`, by the whole name or by its last part."""
    by_last = {n.rsplit(".", 1)[-1]: n for n in names}
    close = difflib.get_close_matches(name, names, 1, 0.6)
    close = close or [by_last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1, 0.6)]
    return f"; did you mean {close[0]!r}?" if close else "; `--help` lists all options"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _describe(schema: Any, values: dict[str, Any], prefix: str) -> typing.Iterator[tuple[str, str, str]]:
    documentation = field_documentation(schema)
    for field in dataclasses.fields(schema):
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            yield prefix + field.name, "", inspect.getdoc(field.type) or ""
            yield from _describe(field.type, value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, _written(value), documentation[field.name] + _choices(field.type)


def _choices(kind: Any) -> str:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    enums = [k for k in kinds if isinstance(k, type) and issubclass(k, enum.Enum)]
    return f" ({' | '.join(member.name for member in enums[0])})" if enums else ""


def field_documentation(schema: type) -> dict[str, str]:
    """The string that stands under each field of a dataclass, from its source."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(schema)).body[0]).body
    documentation = {}
    for statement, follower in zip(body, [*body[1:], None]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
                text = " ".join(str(follower.value.value).split())
            documentation[statement.target.id] = text
    return documentation
