"""The README's commands, word for word but for the size of the run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT, TINY, write_corpus

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SMALL = [option for option in TINY if not option.startswith(("data=", "trainer.micro_batch_size"))]
SHORT = [*SMALL, "trainer.global_batch_size=16", "trainer.max_steps=4", "trainer.precision=fp32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the files that the README's examples name, and the default run at a small size."""
    directory = tmp_path_factory.mktemp("readme")
    write_corpus(directory / "corpus")
    (directory / "scripts").symlink_to(REPOSITORY / "scripts")
    (directory / "corpus.jsonl").write_text(
        "".join(f'{{"text": "line {i} of many, many lines"}}\n' * 9 for i in range(99))
    )
    question, answer = '{"role": "user", "content": "What is %d + 1?"}', '{"role": "assistant", "content": "%d"}'
    turns = (f"{question % i}, {answer % (i + 1)}" for i in range(100))
    (directory / "prompts.jsonl").write_text('"import os"\n"def f("\n')
    (directory / "chats.jsonl").write_text("".join(f'{{"messages": [{turn}]}}\n' for turn in turns))
    _run(directory, ["moe-lm", "pretrain", *SHORT])
    return directory


def _run(directory: Path, command: list[str]) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**ENVIRONMENT, "PATH": path}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_readme_has_commands():
    """Catches a README whose examples this file no longer finds."""
    assert len(COMMANDS) > 8 and any(c.startswith("moe-lm generate") for c in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_command(place, line):
    """Catches an example that does not work; training examples get the options of a small run at their end."""
    command = shlex.split(line, comments=True)
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        return
    assert shutil.which(command[0], path=str(Path(sys.executable).parent)), command[0]
    if "pretrain" in command and "--help" not in command:
        own = [option for option in command if "=" in option and not option.startswith("trainer.micro_batch_size")]
        command += [*SHORT, "trainer.micro_batch_size=8", "finish.export=false", *own]
        if "trainer.max_steps=800" in command:
            command.append("trainer.max_steps=6")
    if "finetune" in command and "--help" not in command:
        command += [
            option for option in SHORT if not option.startswith(("model.", "tokenizer.", "data.sequence_length"))
        ]
        command += ["trainer.micro_batch_size=8", "data.sequence_length=64", "finish.export=false"]
    if "prepare" in command:
        command.append("tokenizer.vocab_size=400")
    output = _run(place, command)
    assert output.strip()


def test_python_example(place):
    """Catches a snippet that transformers no longer runs."""
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    _run(
        place, [sys.executable, "-c", snippet + "\nassert model.config.num_local_experts == 8 and len(tokenizer) > 300"]
    )


def test_files_that_the_readme_names_exist():
    """Catches a link or a path that leads nowhere."""
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (REPOSITORY / target).exists(), target
