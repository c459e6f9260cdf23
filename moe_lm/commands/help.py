"""`moe-lm COMMAND --help`: every option with its value and meaning, from the dataclasses themselves."""

import ast
import dataclasses
import enum
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from moe_lm.config import ANY_NAME, FROM_BASE, OF_BASE, SCHEMAS, group_choices, load_values, named_sections, written


def print_help(command: str, summary: str, arguments: list[str]) -> None:
    """Print the options of a command as they stand after `arguments` (say `experiment=mixtral_8x7b`)."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    print(f"usage: moe-lm {command} [NAME=VALUE ...]\n\n{summary}")
    if choices := group_choices(command):
        print("\ngroups, each choice a file of settings:")
        for group, names in choices.items():
            print(f"  {group}={'|'.join(names)}")
    print("\noptions, with their values" + (f" under {' '.join(arguments)}" if arguments else "") + ":\n")
    for name, value, meaning in describe(SCHEMAS[command], load_values(command, arguments)):
        if command in FROM_BASE and name in OF_BASE and value is not None:
            continue
        if value is None:
            print(f"\n{name}: {meaning}")
            continue
        print(f"  {name}={value}")
        print(textwrap.fill(meaning, width, initial_indent="      ", subsequent_indent="      "))


def describe(schema: Any, values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str | None, str]]:
    """(name, value, meaning) of every field of a dataclass, in order; a section has no value."""
    documentation = field_documentation(schema)
    # Sections come last, and before them a command's own options go before those that it shares with another.
    own = schema.__annotations__
    ordered = sorted(dataclasses.fields(schema), key=lambda f: (dataclasses.is_dataclass(f.type), f.name not in own))
    for field in ordered:
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            yield prefix + field.name, None, inspect.getdoc(field.type) or ""
            yield from describe(field.type, value, f"{prefix}{field.name}.")
        elif (named := named_sections(field.type)) is not None:
            yield f"{prefix}{field.name}", None, documentation[field.name]
            for name, section in (value or {ANY_NAME: dataclasses.asdict(named())}).items():
                yield from describe(named, section, f"{prefix}{field.name}.{name}.")
        else:
            yield prefix + field.name, written(value), documentation[field.name] + _choices(field.type)


def _choices(kind: Any) -> str:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    enums = [k for k in kinds if isinstance(k, type) and issubclass(k, enum.Enum)]
    return f" ({' | '.join(member.name for member in enums[0])})" if enums else ""


def field_documentation(schema: type) -> dict[str, str]:
    """The string that stands under each field of a dataclass, from its source."""
    documentation: dict[str, str] = {}
    for inherited in filter(dataclasses.is_dataclass, schema.__bases__):
        documentation |= field_documentation(inherited)
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(schema)).body[0]).body
    for statement, follower in zip(body, [*body[1:], None]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
                text = " ".join(str(follower.value.value).split())
            documentation[statement.target.id] = text
    return documentation
