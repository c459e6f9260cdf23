"""`moe-lm COMMAND --help`: every option with its value and meaning, from the dataclasses themselves."""

import shutil
import textwrap

from moe_lm import cli
from moe_lm.config import describe, group_choices


def print_help(command: str, arguments: list[str]) -> None:
    """Print the options of a command as they stand after the group choices in `arguments` (`experiment=…`)."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 130)
    print(f"usage: moe-lm {command} [NAME=VALUE ...]\n\n{cli.COMMANDS[command]}")
    if choices := group_choices(command):
        print("\ngroups, each a file of settings:")
        for group, names in choices.items():
            print(f"  {group}={'|'.join(names)}")
    print("\noptions, with their values" + (f" under {' '.join(arguments)}" if arguments else "") + ":")
    for name, value, meaning in describe(command, arguments):
        if not value:
            print(f"\n{name}: {meaning}" if meaning else f"\n{name}")
            continue
        print(f"  {name}={value}")
        print(textwrap.fill(meaning, width, initial_indent="      ", subsequent_indent="      "))
