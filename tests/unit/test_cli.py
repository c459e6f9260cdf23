"""The command line: help that is complete and quick, and commands that are found or suggested."""

import errno
import os
import re
import subprocess
import sys
import typing

import pytest

from moe_lm import cli
from moe_lm.commands.help import describe, field_documentation
from moe_lm.config import OF_BASE, SCHEMAS, field_types, group_choices, load_values
from moe_lm.kernels import native

HEAVY = ("torch", "hydra", "omegaconf", "transformers", "accelerate", "datasets", "wandb", "numpy", "yaml")


def _loaded_by(*arguments: str) -> set[str]:
    """Names of all modules that a fresh process has imported after a command."""
    code = (
        "import sys; from moe_lm.cli import main; code = main(sys.argv[1:]); "
        "print('MODULES', *sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"]], ids=str)
def test_help_imports_nothing_heavy(arguments):
    """Catches an import at the top of a module that makes `moe-lm --help` take seconds."""
    assert not _loaded_by(*arguments) & set(HEAVY)


def test_help_of_a_command_does_without_torch():
    """Catches a configuration that drags torch in: help needs the fields, not the model."""
    assert "torch" not in _loaded_by("pretrain", "--help")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_lists_every_command_with_its_job(arguments, capsys):
    """Catches a command that nobody can find."""
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for command, job in cli.COMMANDS.items():
        assert any(line.startswith(f"  {command} ") and job in line for line in out.splitlines())
    assert "75 stopped" in out


def test_commands_have_schemas_and_modules():
    """Catches a command of the list that can not run."""
    assert cli.COMMANDS.keys() == SCHEMAS.keys()


@pytest.mark.parametrize("command", list(SCHEMAS))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command_lists_every_field_with_its_meaning(command, flag, capsys):
    """Catches a field without documentation, or one that `--help` leaves out."""
    assert cli.main([command, flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in field_types(SCHEMAS[command]):
        if command == "finetune" and name in OF_BASE:
            assert not any(line.startswith(f"  {name}=") for line in lines), "it is refused"
            continue
        places = [i for i, line in enumerate(lines) if line.startswith(f"  {name}=")]
        assert len(places) == 1, name
        meaning = lines[places[0] + 1]
        assert meaning.startswith("      ") and len(meaning.split()) >= 2, name
    for group, choices in group_choices(command).items():
        assert f"  {group}={'|'.join(choices)}" in lines


@pytest.mark.parametrize("command", list(SCHEMAS))
def test_every_field_and_section_is_documented(command):
    """Catches a docstring that stands under the wrong field or none, and choices that are not named."""
    described = list(describe(SCHEMAS[command], load_values(command, [])))
    assert sorted(name for name, value, _ in described if value is not None) == sorted(field_types(SCHEMAS[command]))
    kinds = field_types(SCHEMAS[command])
    for name, _, meaning in described:
        assert len(meaning) > 10 and "\n\n" not in meaning, name
        for choice in getattr(kinds.get(name), "__members__", ()):
            assert choice in meaning, (name, choice)
    meanings = [meaning for _, value, meaning in described if value is not None]
    assert len(set(meanings)) == len(meanings)


def test_documentation_is_that_of_the_field_above_it():
    """Catches a reader that gives a field the next one's text."""
    documentation = field_documentation(SCHEMAS["generate"])
    assert documentation["prompt"] == "Text to continue." and documentation["seed"] == "Seed of the sampling."


def test_help_shows_the_values_that_would_hold(capsys):
    """Catches help that shows defaults of the schema instead of those of the experiment and the options given."""
    assert cli.main(["pretrain", "--help", "experiment=mixtral_8x7b", "trainer.max_steps=7", "run_name=x"]) == 0
    out = capsys.readouterr().out
    assert "  model.hidden_size=4096\n" in out and "  trainer.max_steps=7\n" in out and "  run_name=x\n" in out
    assert "under experiment=mixtral_8x7b trainer.max_steps=7 run_name=x" in out
    assert cli.main(["pretrain", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  model.hidden_size=256\n" in out and "  model.vocab_size=4096\n" in out  # an interpolation, resolved
    assert "  model.sliding_window=null\n" in out and "  tracker.name=none\n" in out


def test_help_before_a_command_is_that_of_the_command(capsys):
    """Catches the list of commands as the answer to `moe-lm help pretrain`."""
    for command in ("verify", "plan placement", "plan"):
        assert cli.main([*command.split(), "--help"]) == 0
        expected = capsys.readouterr().out
        assert cli.main(["help", *command.split()]) == 0 and capsys.readouterr().out == expected


def test_version_is_that_of_the_package(capsys):
    """Catches a version that is written down twice."""
    import importlib.metadata

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moe-lm {importlib.metadata.version('moe-lm')}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pretrian", "did you mean 'pretrain'?"),
        ("Export", "did you mean 'export'?"),
        ("generat", "did you mean 'generate'?"),
        ("xyz", "choose from prepare, pretrain, finetune, upcycle, import, export, verify, generate"),
        ("", "choose from"),
        ("--hlep", "choose from"),
        ("trainer.max_steps=3", "choose from"),
    ],
)
def test_unknown_commands_get_a_suggestion(command, words, capsys):
    """Catches a traceback, or no hint, for a misspelt command."""
    assert cli.main([command, "--help"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"moe-lm: {command!r} is not a command; ") and words in captured.err


def test_the_process_exits_with_the_codes_of_the_contract():
    """Catches a module entry that swallows the return value, as `python -m moe_lm` or through `main()` itself."""
    run: typing.Any = lambda *a: subprocess.run([sys.executable, "-m", "moe_lm", *a], capture_output=True, text=True)  # noqa: E731
    assert run("--help").returncode == 0
    wrong = run("pretrian")
    assert wrong.returncode == 2 and wrong.stderr.startswith("moe-lm: ") and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_can_not_be_encoded_ends_nothing(encoding):
    """Catches a run that trains, and then ends at a character that the terminal has no code for."""
    run = [sys.executable, "-m", "moe_lm", "pretrain", "--help"]
    done = subprocess.run(run, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and not done.stderr and len(done.stdout) > 10_000


def test_an_option_that_is_not_utf8_is_a_sentence(capsys):
    """Catches a prompt whose bytes are only refused when the model is there to continue it."""
    for command in ("generate", "pretrain"):
        assert cli.main([command, "checkpoint=x" if command == "generate" else "data=stdlib", "prompt=\udce9"]) == 2
        assert (
            capsys.readouterr().err == "moe-lm: prompt=\\udce9: is not UTF-8; write it anew, or rename what it names.\n"
        )


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\n 9")]
)
def test_memory_that_runs_out_is_a_sentence(error, capsys, monkeypatch):
    """Catches a traceback of the allocator's, and one of a bug that is taken for that."""

    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["pretrain"]) == 1
    assert re.fullmatch(r"moe-lm: memory ran out \(.+\); take less at once .+\.\n", capsys.readouterr().err)
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        cli.main(["pretrain"])


def test_what_may_not_be_read_is_a_sentence(capsys, monkeypatch):
    """Catches a system's "Permission denied" that says nothing of what to do."""

    def fail(arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/x/checkpoints")

    monkeypatch.setattr(cli, "_run", fail)  # as root nothing is forbidden
    assert cli.main(["verify"]) == 1
    said = "moe-lm: runs/x/checkpoints: Permission denied; let yourself read and write it, or give another.\n"
    assert capsys.readouterr().err == said


def test_warnings_of_this_package_are_sentences(capsys):
    """Catches a path, class and line of code in front of what a user is told, or another's warning that is lost."""
    shown = []
    say = cli._say_own_warnings(lambda *arguments: shown.append(arguments))
    say(UserWarning("plain kernels\nare used"), UserWarning, native.__file__, 7)
    assert capsys.readouterr().err == "moe-lm: plain kernels are used\n"
    assert not shown
    other = (UserWarning("theirs"), UserWarning, pytest.__file__, 7)
    say(*other)
    assert shown == [other]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_nothing_and_lend_their_descriptors_to_no_file(closed, tmp_path):
    """Catches a traceback of the stream that is not there, and a line of output that lands in a checkpoint."""
    code = (
        "import os, sys; from moe_lm.cli import main; code = main(['--help']); file = open('file', 'w'); "
        "open('code', 'w').write(f'{code} {file.fileno() > 2} {all(map(os.get_inheritable, range(3)))}'); "
        "print('out', flush=True); print('err', file=sys.stderr); os.write(1, b'x'); os.write(2, b'x')"
    )
    shell = f'cd "$2" && exec "$0" -c "$1" {closed}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", shell, sys.executable, code, tmp_path], env=environment, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (tmp_path / "code").read_text() == "0 True True" and not (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ELOOP, os.strerror(errno.ELOOP), "runs/x"),
        OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "runs/x"),
        RuntimeError("Symlink loop from 'runs/x'"),
        RuntimeError("Could not determine home directory."),
    ],
)
def test_paths_that_python_refuses_are_sentences(error, capsys, monkeypatch):
    """Catches a traceback for a path of a saved configuration, which no option can be blamed for."""

    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["pretrain"]) == 1
    assert re.fullmatch(r"moe-lm: .+\.\n", capsys.readouterr().err)


def test_a_working_directory_that_is_gone_is_a_sentence(tmp_path, monkeypatch, capsys):
    """Catches a traceback of the first relative path."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for arguments in (["verify", "checkpoint=x"], ["pretrain", "--help"]):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err == "moe-lm: the working directory is gone; change to one that is there.\n"
