"""The command line: `moe-lm COMMAND [NAME=VALUE ...]`. Nothing heavy is imported until a command is known."""

import importlib
import sys

from moe_lm.errors import InputError

COMMANDS = {
    "pretrain": "train a model from scratch, or go on with a run; evaluates and exports at the end",
    "export": "write a run's checkpoint as a Hugging Face directory",
    "generate": "continue a text with a checkpoint or an export",
}

USAGE = """usage: moe-lm COMMAND [NAME=VALUE ...]

A trainer for Mixtral-style mixture-of-experts language models.

commands:
{commands}

`moe-lm COMMAND --help` shows every option of a command with its value and meaning.
Exit codes: 0 done, 1 error, 2 bad configuration or input, 75 stopped and resumable."""

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the return value is the process's exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())))
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from importlib.metadata import version

        print(f"moe-lm {version('moe-lm')}")
        return 0
    try:
        return _run(command, rest)
    except InputError as error:
        print("moe-lm:", *str(error).splitlines(), file=sys.stderr)  # one line, whatever the user's values hold
        return 2
    except KeyboardInterrupt:
        print("\nmoe-lm: interrupted; the same command goes on from the newest checkpoint.", file=sys.stderr)
        return INTERRUPTED


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(COMMANDS)}."
        raise InputError(f"{command!r} is not a command; {hint}")
    if any(a in ("-h", "--help") for a in arguments):
        from moe_lm.commands.help import print_help

        print_help(command, [a for a in arguments if a not in ("-h", "--help")])
        return 0
    from moe_lm.config import load

    config = load(command, arguments)
    return importlib.import_module(f"moe_lm.commands.{command}").run(config)


if __name__ == "__main__":
    sys.exit(main())
