"""What users do to a run between two starts, and around it: nothing is lost in silence, nothing good is overwritten."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import moe_lm.commands.verify as verify_module
from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.cli import main
from tests.runs import ENVIRONMENT, TINY, final_tensors, metrics, moe_lm, wait_for, write_corpus

OPTIONS = [*TINY, "data.paths=[corpus]", "data.workers=0", "trainer.max_steps=12", "finish.export=false"]
STOPPED_AT = 6


@pytest.fixture(scope="module")
def whole(parent, tmp_path_factory):
    """A directory with a corpus, one uninterrupted run, and one that was stopped half way."""
    directory = tmp_path_factory.mktemp("meddling")
    write_corpus(directory / "corpus")
    log = directory / "whole.log"
    assert parent.run("pretrain", [*OPTIONS, "run_name=whole"], directory, log=log) == 0, log.read_text()
    pid = parent.start("signalled", [*OPTIONS, "run_name=half"], directory, "step", STOPPED_AT, log=log)
    wait_for(lambda: "now in step" in log.read_text())
    os.kill(pid, signal.SIGTERM)
    assert parent.wait(pid) == 75, log.read_text()
    return directory


@pytest.fixture
def place(whole, tmp_path):
    """A copy of it to meddle with."""
    shutil.copytree(whole, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def resume(parent, place):
    """Starts the run that was stopped again; its exit code and what it said."""

    def start(*options: str) -> tuple[int, str]:
        log = place / f"log{len(list(place.glob('log*')))}"
        code = parent.run("pretrain", [*OPTIONS, "run_name=half", *options], place, log=log)
        assert "Traceback" not in log.read_text(), log.read_text()
        return code, log.read_text()

    return start


@pytest.fixture
def verify(parent, place):
    """Runs `moe-lm verify` on a place; its exit code and what it said."""

    def run(where: str) -> tuple[int, str]:
        log = place / f"verify{len(list(place.glob('verify*')))}"
        code = parent.run("command_line", ["verify", f"checkpoint={where}"], place, log=log)
        assert "Traceback" not in log.read_text(), log.read_text()
        return code, log.read_text()

    return run


def _assert_whole(place) -> None:
    ours, theirs = final_tensors(place / "runs/half"), final_tensors(place / "runs/whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(place / "runs/half") == metrics(place / "runs/whole")


def test_a_refused_resume_leaves_the_tokenizer(place, resume):
    """Catches checkpoints left beside another tokenizer: the data is deleted, the text is another, the resume is
    refused; with the text back the run ends as if nothing had been."""
    run, file = place / "runs/half", place / "corpus/text05.txt"
    tokenizer, text = (run / "tokenizer/tokenizer.model").read_bytes(), file.read_text()
    shutil.rmtree(run / "data")
    file.write_text("quite another text, xyzzy\n" * 500)
    code, said = resume()
    assert code == 2 and "was prepared from other text" in said and "corpus_fingerprint" in said
    assert (run / "tokenizer/tokenizer.model").read_bytes() == tokenizer and not (run / "data").exists()
    file.write_text(text)
    assert resume()[0] == 0
    _assert_whole(place)


def test_another_prepared_set_leaves_the_tokenizer(place):
    """Catches the same through data=prepared, where a set was made anew of other text under the same name."""
    options = [*TINY, "data=prepared", "data.paths=[set]", "finish.export=false", "run_name=prepared"]
    prepare = ["prepare", "data=text", "data.paths=[corpus]", "tokenizer.vocab_size=400", "output=set"]
    moe_lm(*prepare, cwd=place)
    moe_lm("pretrain", *options, "trainer.max_steps=4", cwd=place)
    model = place / "runs/prepared/tokenizer/tokenizer.model"
    tokenizer = model.read_bytes()
    shutil.rmtree(place / "set")
    (place / "corpus/text05.txt").write_text("quite another text, xyzzy\n" * 500)
    moe_lm(*prepare, cwd=place)
    more = ["trainer.max_steps=8", "resume.allow_change=[trainer.max_steps]"]
    done = moe_lm("pretrain", *options, *more, cwd=place, check=False)
    assert done.returncode == 2 and "another tokenizer than the run" in done.stderr
    assert model.read_bytes() == tokenizer


def test_checkpoints_that_are_gone_are_missed(place, resume):
    """Catches a run that begins anew in silence, and replaces the figures of the one whose checkpoints were deleted."""
    run = place / "runs/half"
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    code, said = resume()
    assert code == 2 and "whose checkpoints are gone (step-00000006)" in said and "state.json" in said
    (run / "checkpoints").mkdir()
    assert resume()[0] == 2 and (run / "metrics.jsonl").read_bytes() == before
    (run / "state.json").unlink()
    assert resume()[0] == 0


def test_a_renamed_checkpoint_is_refused(place, verify, resume):
    """Catches a checkpoint taken for one of another step; the one before it is used."""
    checkpoints = place / "runs/half/checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / "step-00000009")
    done = moe_lm("verify", "checkpoint=runs/half", cwd=place, check=False)
    assert done.returncode == 1 and "step-00000009: REFUSED: was saved at step 6" in done.stdout
    code, said = resume()
    assert (
        code == 0
        and "step-00000009: was saved at step 6" in said
        and "resumed runs/half/checkpoints/step-0000000" in said
    )
    _assert_whole(place)


def test_verify_takes_any_of_its_places(verify):
    """Catches places that users type and that are refused, or told to be missing though they are there."""
    for where, number in (("runs/half", 2), ("runs/half/checkpoints", 2), ("runs/half/checkpoints/step-00000006", 1)):
        code, said = verify(where)
        assert code == 0 and said.count(": good;") == number, said
    for where, words in (("corpus/text00.txt", "is no directory"), ("corpus", "holds no checkpoint"), ("x", "no such")):
        code, said = verify(where)
        assert code == 2 and words in said, said


def test_a_run_can_be_renamed_and_moved(place, parent):
    """Catches a run that is tied to its name or place."""
    (place / "elsewhere").mkdir()
    (place / "runs/half").rename(place / "elsewhere/other")
    log = place / "moved.log"
    options = [*OPTIONS, "run_name=other", "output_dir=elsewhere"]
    assert parent.run("pretrain", options, place, log=log) == 0, log.read_text()
    (place / "elsewhere/other").rename(place / "runs/half2")
    shutil.rmtree(place / "runs/half", ignore_errors=True)
    (place / "runs/half2").rename(place / "runs/half")
    _assert_whole(place)


@pytest.mark.parametrize(
    ("meddle", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), "config.yaml: is missing; bring it back"),
        (lambda run: (run / "config.yaml").write_text(""), "it is empty"),
        (lambda run: shutil.rmtree(run / "tokenizer"), "tokenizer: is missing"),
        (
            lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
            "metrics.jsonl: can not be written (Is a directory); move it away",
        ),
    ],
    ids=["no configuration", "empty configuration", "no tokenizer", "metrics is a directory"],
)
def test_what_is_missing_or_in_the_way_is_named(place, resume, meddle, words):
    """Catches a remedy that is none, or the blame on an option that nobody gave; the checkpoints stay."""
    meddle(place / "runs/half")
    code, said = resume()
    assert code == 2 and words in said, said
    assert (place / "runs/half/checkpoints/step-00000006/COMPLETE").exists()


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_no_damage(place, monkeypatch, capsys):
    """Catches a false alarm about a run in training that deletes older checkpoints. The moment is chosen here."""
    opened = []

    def open_late(path):
        opened.append(path)
        if len(opened) == 1:
            shutil.rmtree(path)
        return Checkpoint(path)

    monkeypatch.setattr(verify_module, "Checkpoint", open_late)
    assert main(["verify", f"checkpoint={place / 'runs/half'}", "whole_model=false"]) == 0
    said = capsys.readouterr().out
    assert len(opened) == 2 and f"{opened[0]}: was deleted while it was read" in said and f"{opened[1]}: good" in said
    last = Checkpoint(opened[1])
    shutil.rmtree(opened[1])
    with pytest.raises(
        CheckpointError, match=r"step-00000006: was deleted while it was read.*; give the command again"
    ):
        last.tensor("model/model.norm.weight")


@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "cleaned"])
def test_a_directory_that_is_meddled_with_while_the_run_trains_is_made_whole(parent, place, resume, is_moved):
    """Catches a run that splits in two or ends well, and can neither go on nor be used; and a remedy that is none."""
    run, log = place / "runs/half", place / "meddled.log"
    pid = parent.start("signalled", [*OPTIONS, "run_name=half"], place, "step", 2, log=log)
    wait_for(lambda: "now in step" in log.read_text())
    if is_moved:
        run.rename(place / "runs/elsewhere")
    else:
        for name in ("data", "tokenizer"):
            shutil.rmtree(run / name)
        for name in ("config.yaml", "metrics.jsonl"):
            (run / name).unlink()
    os.kill(pid, signal.SIGTERM)
    assert parent.wait(pid) == 75, log.read_text()
    assert "config.yaml and tokenizer went while the run trains" in log.read_text()
    code, said = resume()
    assert code == 0 and "resumed" in said, said
    assert max(metrics(run)) == 12
    expected, found = final_tensors(place / "runs/whole"), final_tensors(run)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_directories_under_the_names_of_requests_are_nobodys_request(place, resume):
    """Catches `stop/` and `save/` that end a run or its start."""
    for name in ("stop", "save"):
        (place / "runs/half" / name).mkdir()
    assert resume()[0] == 0


def test_fewer_steps_than_are_done_are_refused(resume):
    """Catches a run of 6 steps that calls itself finished after 3."""
    code, said = resume("trainer.max_steps=3", "resume.allow_change=[trainer.max_steps]")
    assert code == 2 and "trainer.max_steps=3: must be at least 6" in said


@pytest.mark.parametrize("output", ["closed pipe", "full device"])
def test_training_does_not_depend_on_its_output(place, output):
    """Catches a run that a closed terminal, `| head` or a full disk under its log ends, unsaved."""
    command = [sys.executable, "-m", "moe_lm", "pretrain", *OPTIONS, "run_name=half"]
    if output == "full device":
        with open("/dev/full", "w") as full:
            code = subprocess.run(command, cwd=place, env=ENVIRONMENT, stdout=full, stderr=full).returncode
    else:
        read, write = os.pipe()
        process = subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stdout=write, stderr=write)
        os.close(write)
        os.close(read)
        code = process.wait(timeout=100)
    assert code == 0
    _assert_whole(place)
    assert json.loads((place / "runs/half/state.json").read_text())["status"] == "finished"
