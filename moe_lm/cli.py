"""The command line: `moe-lm COMMAND [NAME=VALUE ...]`. Nothing heavy is imported until a command is known."""

import errno
import importlib
import io
import keyword
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

from moe_lm.errors import InputError, RunError, Stopped
from moe_lm.interrupts import STOPPED, interrupts
from moe_lm.process import open_standard_streams, rank, signature, world_size

COMMANDS = {
    "prepare": "make a tokenizer and token shards of text, once, for any number of runs",
    "pretrain": "train a model from scratch, or go on with a run; evaluates and exports at the end",
    "finetune": "go on from a trained model: more text or conversations, all of it or by LoRA",
    "upcycle": "turn a dense model into a mixture of experts, or add experts to one",
    "import": "write a Hugging Face checkpoint, or Mistral's own files, as a native one",
    "export": "write a run's checkpoint as a Hugging Face directory",
    "verify": "check a checkpoint, all those of a run, or an export",
    "generate": "continue a text with a checkpoint or an export",
    "plan placement": "find which rank should own which expert, from a run's expert counts",
}
"""Some have two words, of which the first names what they have in common."""

USAGE = """usage: moe-lm COMMAND [NAME=VALUE ...]

A trainer for Mixtral-style mixture-of-experts language models.

commands:
{commands}

`moe-lm COMMAND --help`, or `moe-lm help COMMAND`, shows every option of a command with its value and meaning.
Exit codes: 0 done, 1 error, 2 bad configuration or input, 75 stopped and resumable."""


_HELP = ("-h", "--help")

_SAID_IN_A_SENTENCE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENOTCONN),
)
"""Errors of the file system that are no bug of this program."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the return value is the process's exit code."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that it can not encode ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupts, warnings.catch_warnings():
            warnings.showwarning = _say_own_warnings(warnings.showwarning)
            code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except (InputError, RunError) as error:
        if error.told:
            time.sleep(1)  # a launcher ends all processes as soon as one has gone: first the one that speaks
            return error.code
        if rank() != 0 and isinstance(error, InputError):
            time.sleep(2)  # the first process meets it as well, and says it for all; if not, this one speaks
        print(f"{signature()}:", *str(error).splitlines(), file=sys.stderr)  # one line, whatever the user's values hold
        return error.code
    except Stopped as stopped:
        if rank() == 0:
            print(f"moe-lm: {stopped}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        if rank() == 0:
            print("\nmoe-lm: interrupted", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        # The reader of our output has gone, as in `moe-lm pretrain --help | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("moe-lm: ended, because nobody reads its output any more", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _SAID_IN_A_SENTENCE:
            raise
        remedy = "; let yourself read and write it, or give another" if error.errno == errno.EACCES else ""
        print(f"moe-lm: {error.filename or 'a file or its disk'}: {error.strerror}{remedy}.", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:  # torch's are of the second kind
        if _says_path_leads_nowhere(error):
            print(f"moe-lm: {str(error).rstrip('.')}; give another path.", file=sys.stderr)
            return 1
        if not _says_memory_is_out(error):
            raise
        remedy = "take less at once (trainer.micro_batch_size, data.sequence_length, batch_size) or a smaller model"
        what = " ".join(str(error).split()) or "of the machine"
        print(f"moe-lm: memory ran out ({what}); {remedy}.", file=sys.stderr)
        return 1


def _says_path_leads_nowhere(error: Exception) -> bool:
    """Whether `pathlib` met a link to itself, or `~` of nobody: an option is refused before, a saved path is not."""
    return str(error).startswith(("Symlink loop from ", "Could not determine home directory"))


def _says_memory_is_out(error: Exception) -> bool:
    allocator = "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or allocator


def _say_own_warnings(others: Any) -> Any:
    """A warning of this package is a sentence for its user, without the line of code that `others` would show."""

    def say(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):
            print("moe-lm:", *str(message).splitlines(), file=sys.stderr)
        else:
            others(message, category, filename, *where, **more)

    return say


def run_and_exit(arguments: list[str] | None = None) -> NoReturn:
    """Run one command as a process of its own, and end it with the command's exit code.

    A process of a launcher ends at once, without the interpreter's own tear-down: there, a thread of torch's or gloo's
    was once seen to abort a process whose run was finished and whose process group was gone, and the launcher then
    reports the whole job as failed.
    """
    code = main(arguments)
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def wait_briefly_for_threads() -> None:
    """Let OpenMP's threads sleep soon when they wait for each other, instead of spinning for milliseconds.

    With the cores shared, a spinning thread keeps from its core the very thread it waits for: one busy neighbour made a
    training step 15 times slower. With threads that sleep after 10,000 spins the same neighbour makes it 2.6 times
    slower, and on an idle machine the difference is within noise. OpenMP reads this when torch loads it, not later.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:
        return _run([*arguments[1:], "--help"])
    if not arguments or arguments[0] in (*_HELP, "help"):
        print(USAGE.format(commands=_listed(list(COMMANDS))))
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"moe-lm {version('moe-lm')}")
        return 0
    family = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if not family:
        return _run_command(arguments[0], arguments[1:], list(COMMANDS))
    if not arguments[1:] or arguments[1] in (*_HELP, "help"):
        print(f"usage: moe-lm {arguments[0]} WHAT [NAME=VALUE ...]\n\ncommands:\n{_listed(family)}")
        return 0
    return _run_command(" ".join(arguments[:2]), arguments[2:], family)


def _listed(commands: list[str]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {COMMANDS[name]}" for name in commands)


def _run_command(command: str, arguments: list[str], choices: list[str]) -> int:
    if command not in COMMANDS:
        import difflib

        firsts = {name.split()[0] for name in choices} - {command.partition(" ")[0]}
        close = difflib.get_close_matches(command, [*choices, *sorted(firsts - set(choices))], 1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(choices)}."
        raise InputError(f"{command!r} is not a command; {hint}")
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the working directory is gone; change to one that is there.") from error
    if any(a in _HELP for a in arguments):
        from moe_lm.commands.help import print_help

        print_help(command, COMMANDS[command], [a for a in arguments if a not in _HELP])
        return 0
    wait_briefly_for_threads()
    from moe_lm.config import load

    config = load(command, arguments)
    module = f"{command}_" if keyword.iskeyword(command) else command.replace(" ", "_")
    return importlib.import_module(f"moe_lm.commands.{module}").run(config)


if __name__ == "__main__":
    run_and_exit()
