"""From the command line to plain dataclasses: the only door that Hydra and OmegaConf stand in.

A command has a schema (a dataclass) and, for training, a Hydra configuration of groups under `configs/`. Group choices
(`model=dense`) go through Hydra's compose; values (`trainer.max_steps=10`) are checked against the schema by name, so
that a misspelling is answered with the nearest valid name, with a leading `+` or without.
"""

import dataclasses
import difflib
import enum
import errno
import math
import os
import re
import shlex
import sys
import types
import typing
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationValidationError, OmegaConfBaseException

from moe_lm.commands.config import (
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PlanPlacementConfig,
    PrepareConfig,
    UpcycleConfig,
    VerifyConfig,
)
from moe_lm.commands.no_effect import given_in_vain
from moe_lm.errors import InputError
from moe_lm.files import write_atomically
from moe_lm.finetune.config import FinetuneRunConfig
from moe_lm.plain import to_plain
from moe_lm.process import rank
from moe_lm.training.config import RunConfig

SCHEMAS: dict[str, type] = {
    "prepare": PrepareConfig,
    "pretrain": RunConfig,
    "upcycle": UpcycleConfig,
    "import": ImportConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
    "finetune": FinetuneRunConfig,
    "generate": GenerateConfig,
    "plan placement": PlanPlacementConfig,
}


FROM_BASE = ("finetune",)
"""Commands whose model and tokenizer are those of a base, unless an option says otherwise."""

OF_BASE = ("model", "tokenizer.kind", "tokenizer.vocab_size", "tokenizer.training_bytes")
"""Options that those have no use for."""


_PATHS = (
    *("output_dir", "output", "checkpoint", "against", "base", "trace", "prompts", "tokenizer.path"),
    *("data.paths", "data.validation_paths", "data.chat_template", "parallel.placement_file"),
)
"""Options that are paths, besides those of the sources of a mixture."""


def config_directory() -> Path:
    """The YAML groups: inside the installed package, or in the checkout that this package runs from."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load(command: str, arguments: list[str]) -> Any:
    """Compose a command's configuration from its overrides; `InputError` for whatever the user got wrong."""
    groups, given = _parse(command, arguments)
    merged = _merge(command, groups, given)
    if command in FROM_BASE and merged.base and merged.tokenizer.path is None:
        raise InputError(
            f"base={merged.base}: there is no tokenizer beside it; give tokenizer.path=…, the one that it needs."
        )
    config = _build(SCHEMAS[command], merged)
    for sentence in given_in_vain(config, {one.name for one in given}) if rank() == 0 else ():
        print(f"moe-lm: note: {sentence}", file=sys.stderr)
    return config


def load_values(command: str, arguments: list[str]) -> dict[str, Any]:
    """The same as nested dictionaries of JSON values, without the checks across fields; null where nothing is given."""
    try:
        return _container(_merge(command, *_parse(command, arguments)))
    except OmegaConfBaseException as error:
        raise InputError(_readable(error)) from error


def to_dataclass(schema: type, values: Any) -> Any:
    """A plain dataclass from a mapping; wrong names and types are the user's mistakes."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
    except OmegaConfBaseException as error:
        raise InputError(_readable(error)) from error
    except (TypeError, ValueError) as error:  # not a mapping at all
        raise InputError(f"configuration: {error}") from error
    return _build(schema, merged)


def save(config: Any, path: Path) -> None:
    """Write a configuration as YAML, whole or not at all."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(_escaped_texts(to_plain(config)))).encode())


def load_saved(schema: type, path: Path) -> Any:
    """Read what `save` wrote."""
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        values = OmegaConf.load(path)
        kind = "fine-tuning" if "base" in values else "pretraining" if "finish" in values else ""
        if not kind or (kind == "fine-tuning") == (schema is FinetuneRunConfig):
            return to_dataclass(schema, values)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: is missing; bring it back (each checkpoint's state.json has the values under `config`), or "
            "remove the run."
        ) from error
    except Exception as error:  # OmegaConf lets through whatever its YAML reader raises
        raise InputError(
            f"{path}: is no configuration that this version reads ({error}); restore it, go on with the version that "
            "wrote it, or give another run_name=."
        ) from error
    raise InputError(
        f"run_name={path.parent.name}: {path.parent} holds a {kind} run; give another run_name=, or go on with it "
        f"by `moe-lm {'finetune' if kind == 'fine-tuning' else 'pretrain'}`."
    )


def group_choices(command: str) -> dict[str, list[str]]:
    """Names of the configurations in each group."""
    return {group: sorted(p.stem for p in (config_directory() / group).glob("*.yaml")) for group in _groups(command)}


def field_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Types of all leaf fields of a dataclass by their dotted names."""
    kinds: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            kinds |= field_types(typing.cast(type, field.type), f"{prefix}{field.name}.")
        elif (named := named_sections(field.type)) is not None:
            kinds |= field_types(named, f"{prefix}{field.name}.{ANY_NAME}.")
        else:
            kinds[prefix + field.name] = field.type
    return kinds


ANY_NAME = "NAME"
"""Stands for the name that the user gives to a section of a mapping, as in data.sources.NAME.paths."""


def named_sections(kind: Any) -> Any | None:
    """The dataclass of a mapping's sections; null for any other type."""
    arguments = typing.get_args(kind) if typing.get_origin(kind) is dict else ()
    return arguments[1] if len(arguments) == 2 and dataclasses.is_dataclass(arguments[1]) else None


def _kind_of(name: str, kinds: dict[str, Any]) -> Any | None:
    """Type of a field by its dotted name, whatever the name of its section in a mapping; null where there is none."""
    if name in kinds:
        return kinds[name]
    parts = name.split(".")
    patterns = (".".join([*parts[:i], ANY_NAME, *parts[i + 1 :]]) for i in range(1, len(parts) - 1))
    return next((kinds[pattern] for pattern in patterns if pattern in kinds), None)


def _groups(command: str) -> list[str]:
    if not (config_directory() / f"{command}.yaml").exists():
        return []
    sections = {f.name for f in dataclasses.fields(SCHEMAS[command])}
    if command == "pretrain":
        sections.add("experiment")
    if command in FROM_BASE:
        sections.discard("model")
    return sorted(p.name for p in config_directory().iterdir() if p.is_dir() and p.name in sections)


class _Given(typing.NamedTuple):
    """One option as it was given."""

    argument: str
    name: str
    value: Any
    kind: Any


def _parse(command: str, arguments: list[str]) -> tuple[list[str], list[_Given]]:
    """Split overrides into group choices, checked against the groups' files, and values of fields that exist.

    Fields of text take what is given as it stands, so that a prompt may hold commas, brackets and quotes.
    Of an option given twice the last counts, so that scripts can append to a list of options.
    """
    choices, kinds = group_choices(command), field_types(SCHEMAS[command])
    given: dict[str, _Given] = {}
    for argument in arguments:
        if (shown := argument.encode(errors="backslashreplace").decode()) != argument:
            raise InputError(f"{shown}: is not UTF-8; write it anew, or rename what it names.")
        key, equals, text = argument.partition("=")
        name = key.lstrip("+~")
        if key.startswith("-") or not (equals or key.startswith("~")):
            raise InputError(f"{argument!r}: options are written NAME=VALUE; `moe-lm {command} --help` lists them.")
        if command in FROM_BASE and name in OF_BASE:
            raise InputError(f"{argument}: the model's shape and the tokenizer are the base's; leave it out.")
        kind = _kind_of(name, kinds)
        if kind is None and name not in choices:
            raise InputError(f"{argument}: there is no option {name!r}{nearest(name, [*kinds, *choices])}")
        if key.startswith("~"):
            raise InputError(f"{argument}: only NAME=VALUE sets a value.")
        if kind in (str, str | None):
            value = None if text == "null" and kind is not str else text
        else:
            value = _parse_value(argument, kind)
        if name in choices and value not in choices[name]:
            raise InputError(f"{argument}: there is no such {name}; choose from {', '.join(choices[name])}.")
        if name in _PATHS or re.fullmatch(r"data\.sources\..*\.paths", name):
            _check_paths(argument, value if isinstance(value, list) else [value])
        given[name] = _Given(argument, name, value, kind)
    groups = [f"{name}={one.value}" for name, one in given.items() if name in choices]
    return groups, [one for name, one in given.items() if name not in choices]


def _parse_value(argument: str, kind: Any) -> Any:
    """The value by Hydra's grammar: numbers, true, null, [lists]."""
    key, _, text = argument.partition("=")
    is_list = typing.get_origin(kind) is list
    try:
        # Under a name that the grammar knows, since the user's own may hold what it chokes on.
        override = OverridesParser.create().parse_override(f"value={_quoted_entries(text) if is_list else text}")
    except HydraException as error:
        if kind is None:
            return text  # of a group, whose choices are known
        if not is_list:
            raise InputError(f"{argument}: must be {_expected(kind)}.") from error
        raise InputError(f"{argument}: can not be parsed; {_how_to_quote(key, text)}.") from error
    if not override.is_sweep_override():
        return override.value()
    if is_list and "(" not in text:
        raise InputError(f"{argument}: give a list, as in {key}=[{text}].")
    raise InputError(f"{argument}: a command runs one configuration; start one process for each value.")


def _quoted_entries(text: str) -> str:
    """A list of texts with quotes around what the grammar would read as a number or a boolean, and write anew; what is
    quoted, escaped or an interpolation stays.
    """
    as_it_is = r"""(["'])(?:\\.|(?!\1).)*\1|\\.|\$\{[^}]*\}"""
    bare = r"(?:(?<=[\[,])(?<!\\,)|^)\s*(?!null\b)([\w.+-]+)\s*(?=[\],]|$)"
    return re.sub(f"{as_it_is}|{bare}", lambda match: f'"{match[2]}"' if match[2] else match[0], text)


def _how_to_quote(key: str, text: str) -> str:
    """What to write, in a shell, for a list that can not be parsed."""
    what, entries = "the value", [text.replace('"', '\\"')]
    if is_list := text.startswith("[") and text.endswith("]"):
        what, entries = "its entries", [entry.strip() for entry in text[1:-1].replace('"', "").split(",")]
    listed = ",".join(f'"{entry}"' for entry in entries if entry or not is_list)
    return f"quote {what}, as in " + shlex.quote(f"{key}=[{listed}]" if is_list else f"{key}={listed}")


def _check_paths(argument: str, paths: list[Any]) -> None:
    """Refuse what no file can be named; whether one is there is for its reader to say."""
    for path in paths:
        try:
            os.stat(Path(path).expanduser())
        except RuntimeError as error:
            remedy = f"is no home directory here; write ./{path} if it is a name"
            raise InputError(f"{argument}: {Path(path).parts[0]} {remedy}.") from error
        except OSError as error:
            is_pattern = any(sign in str(path) for sign in ("*", "?", "[", "${"))
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and not is_pattern:
                raise InputError(f"{argument}: can not be a path ({error.strerror}); give another.") from error
        except (TypeError, ValueError):  # no text, or none that the system takes: its own checks speak
            continue


def _merge(command: str, groups: list[str], values: list[_Given]) -> Any:
    """The schema, filled from the groups' files, then from the values given, each checked as it is set."""
    schema = SCHEMAS[command]
    try:
        composed = _compose(command, groups)
        own = {field.name for field in dataclasses.fields(schema)}
        # A group's file may set what another command has no use for, such as the prompt of a sample.
        merged = OmegaConf.merge(
            OmegaConf.structured(schema), OmegaConf.masked_copy(composed, sorted(own & set(composed)))
        )
        if command in FROM_BASE:
            merged = OmegaConf.merge(merged, _sections_of_base(values))
    except OmegaConfBaseException as error:
        raise InputError(_readable(error)) from error
    for argument, name, value, kind in values:
        if isinstance(value, str | int | float) and typing.get_origin(kind) is list:
            value = [value]  # data.paths=book.txt means the list of one
        if isinstance(value, str) and kind in (str, str | None):
            value = _escaped(value)
        if isinstance(value, list):  # whose entries may be interpolations
            value = [_escaped(entry) if entry == MISSING else entry for entry in value]
        if kind in (bool, bool | None) and not isinstance(value, bool | None) and "${" not in str(value):
            raise InputError(f"{argument}: must be {_expected(kind)}.")  # OmegaConf would take 2, and `off`
        try:
            _section(merged, schema, name)[name.rpartition(".")[2]] = value
        except OmegaConfBaseException as error:
            raise InputError(f"{argument}: must be {_expected(kind)}.") from error
    return merged


def _sections_of_base(values: list[_Given]) -> dict[str, Any]:
    """The model and the tokenizer of the base among the values given; nothing where there is none."""
    base = next((one.value for one in values if one.name == "base"), None)
    if not isinstance(base, str) or not base:
        return {}
    from moe_lm.commands.model_source import describe  # it needs this module

    model, tokenizer_directory = describe(Path(base).expanduser(), "base")
    tokenizer = {} if tokenizer_directory is None else {"tokenizer": {"path": str(tokenizer_directory)}}
    # The penalty is against the router that a run begins with: how the base was trained says nothing about that.
    return _escaped_texts({"model": {**to_plain(model), "router_drift_coef": 0.0}, **tokenizer})


def _section(node: Any, schema: Any, name: str) -> Any:
    """The section that an option stands in; one of a mapping is made where it is new."""
    for part in name.split(".")[:-1]:
        if (named := named_sections(schema)) is not None:
            schema = named
            if part not in node:
                node[part] = OmegaConf.structured(named)
        else:
            schema = {field.name: field.type for field in dataclasses.fields(schema)}[part]
        node = node[part]
    return node


def _escaped(text: str) -> str:
    """Text that OmegaConf gives back as it stands: `${` would be an interpolation, and `???` a value still to come."""
    if text == MISSING:
        return f"${{oc.decode:\"'{MISSING}'\"}}"
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _escaped_texts(value: Any) -> Any:
    """All texts of nested dictionaries and lists, escaped."""
    if isinstance(value, dict):
        return {name: _escaped_texts(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escaped_texts(inner) for inner in value]
    return _escaped(value) if isinstance(value, str) else value


def _compose(command: str, groups: list[str]) -> DictConfig:
    if not _groups(command):
        return OmegaConf.create({})
    with initialize_config_dir(version_base=None, config_dir=str(config_directory().resolve())):
        return compose(config_name=command, overrides=groups)


def _build(schema: Any, values: Any, prefix: str = "") -> Any:
    """Dataclass instances from a merged configuration, bottom up, so that each one's own checks speak."""
    arguments = {}
    for field in dataclasses.fields(schema):
        name = prefix + field.name
        value = _resolve(values, field, name)
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(field.type, value, f"{name}.")
            continue
        if (named := named_sections(field.type)) is not None:
            arguments[field.name] = {key: _build(named, value[key], f"{name}.{key}.") for key in value}
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}={value}: must be a finite number.")
        if isinstance(value, list) and not all(isinstance(item, str) and item for item in value):
            raise InputError(f"{name}={value}: must be {_expected(field.type)}, none of them empty.")
        arguments[field.name] = value
    return schema(**arguments)


def _resolve(values: Any, field: dataclasses.Field, name: str) -> Any:
    """A field's value; an interpolation that leads nowhere, or to the wrong type, is the user's mistake."""
    try:
        value = values[field.name]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_list(value) else value
    except OmegaConfBaseException as error:
        wrong_type = isinstance(error, InterpolationValidationError)
        reason = f"must be {_expected(field.type)}." if wrong_type else _reason(error)
        unresolved = typing.cast(dict, OmegaConf.to_container(values, resolve=False))
        raise InputError(f"{name}={unresolved[field.name]}: {reason}") from error


def _expected(kind: Any) -> str:
    """What a field of this type takes, in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if k is types.NoneType else _expected(k) for k in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(member.name for member in kind)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a list of texts")


def _container(config: Any) -> dict[str, Any]:
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, enum_to_str=True))


def _readable(error: OmegaConfBaseException) -> str:
    return f"{getattr(error, 'full_key', None) or getattr(error, 'key', None) or 'configuration'}: {_reason(error)}"


def _reason(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") + "."


def nearest(name: str, names: list[str]) -> str:
    """`, did you mean …?`, by the whole name, or by its last part, first among those that have its words in theirs."""
    name = name.partition("@")[0]  # Hydra's way to place a group elsewhere
    last = name.rsplit(".", 1)[-1]
    by_last = {n.rsplit(".", 1)[-1]: n for n in names}
    with_its_words = [n for n in by_last if set(n.split("_")) >= set(last.split("_"))]
    close = difflib.get_close_matches(name, names, 1, 0.6)
    close = close or [by_last[n] for n in difflib.get_close_matches(last, with_its_words, 1, 0.0)]
    close = close or [by_last[n] for n in difflib.get_close_matches(last, by_last, 1, 0.6)]
    return f"; did you mean {close[0]!r}?" if close else "; `--help` lists all options."


def written(value: Any) -> str:
    """A value as the user would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
