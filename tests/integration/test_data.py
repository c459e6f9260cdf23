"""The data path through the command line: prepared sets, streams, epochs, and what goes wrong in the middle."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.runs import ENVIRONMENT, TINY, children_of, final_tensors, metrics, moe_lm, wait_for, write_corpus

OPTIONS = ["pretrain", *TINY, "data.paths=[corpus]", "finish.export=false", "optimizer=adamw"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a corpus."""
    directory = tmp_path_factory.mktemp("data")
    write_corpus(directory / "corpus")
    return directory


def test_training_on_a_prepared_set_is_training_on_its_text(place):
    """Catches a set that is cut or ordered in another way than a run's own: the same losses, and no text needed."""
    moe_lm(*OPTIONS, "trainer.max_steps=5", "run_name=own", cwd=place)
    options = ["data=text", "data.paths=[corpus]", "tokenizer.vocab_size=400", "output=prepared"]
    first = moe_lm("prepare", *options, cwd=place).stdout
    assert "tokenized" in first and "prepared: prepared" in first
    assert "is prepared already" in moe_lm("prepare", *options, cwd=place).stdout
    (place / "corpus").rename(place / "elsewhere")
    try:
        from_set = [*OPTIONS, "data=prepared", "data.paths=[prepared]", "trainer.max_steps=5", "run_name=set"]
        moe_lm(*from_set, cwd=place)
    finally:
        (place / "elsewhere").rename(place / "corpus")
    assert metrics(place / "runs/set") == metrics(place / "runs/own")
    bits = "validation_bits_per_byte"
    assert metrics(place / "runs/set", bits) == metrics(place / "runs/own", bits)
    assert not (place / "runs/set/data").exists() and (place / "runs/set/tokenizer/tokenizer.model").exists()


def test_a_text_is_learned_character_by_character(place):
    """Catches characters that training, export and generation do not agree on, and a loss that is not said in their
    unit."""
    options = ["experiment=shakespeare_char", *TINY, "data.paths=[corpus/text01.txt]", "trainer.max_steps=4"]
    done = moe_lm("pretrain", *options, "run_name=characters", cwd=place)
    run, text = place / "runs/characters", (place / "corpus/text01.txt").read_text()
    last = metrics(run, "validation_loss")[4]
    assert f"bits per byte, {last:.4f} nats per token (whole validation set)" in done.stderr
    # Of ASCII a byte is a character; the end mark is one target more.
    held_out = int(done.stdout.partition("held out: 1 documents, ")[2].split()[0])
    bits = metrics(run, "validation_bits_per_byte")[4]
    assert bits * math.log(2) * held_out == pytest.approx(last * (held_out + 1))
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    written = moe_lm("generate", "checkpoint=runs/characters", "prompt=line é", "max_new_tokens=3", cwd=place).stdout
    assert written.startswith("line é")


def test_a_killed_stream_goes_on_bit_for_bit(place):
    """Catches text that is read twice or passed over after a kill, with workers and a step ahead of the checkpoint."""
    options = [*OPTIONS, "data.streaming=true", "data.workers=1", "data.num_streams=3"]
    options += ["data.packing=best_fit", "trainer.max_steps=40"]
    moe_lm(*options, "run_name=whole", cwd=place)
    run = place / "runs/killed"
    process = start(place, *options, "run_name=killed")
    wait_for(lambda: (run / "checkpoints/step-00000008").exists())
    process.kill()
    process.wait()
    assert json.loads((run / "state.json").read_text())["status"] == "running"
    assert "resumed" in moe_lm(*options, "run_name=killed", cwd=place).stdout
    assert metrics(run) == metrics(place / "runs/whole")
    ours, theirs = final_tensors(run), final_tensors(place / "runs/whole")
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_workers_end_with_a_run_that_is_killed(place):
    """Catches tokenizing processes that stay behind when their run is gone."""
    process = start(place, *OPTIONS, "data.streaming=true", "data.workers=2", "trainer.max_steps=5000", "run_name=gone")
    wait_for(lambda: (place / "runs/gone/metrics.jsonl").exists() and len(metrics(place / "runs/gone")) > 2)
    workers = children_of(process.pid, "spawn_main")
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_worker_that_dies_ends_the_run_with_a_sentence(place):
    """Catches a run that waits for ever for a step that nobody makes."""
    process = start(place, *OPTIONS, "data.streaming=true", "data.workers=1", "trainer.max_steps=5000", "run_name=dies")
    wait_for(lambda: (place / "runs/dies/metrics.jsonl").exists() and len(metrics(place / "runs/dies")) > 2)
    for pid in children_of(process.pid, "spawn_main"):
        os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "a tokenizing process (data.workers) died" in said and "Traceback" not in said
    assert json.loads((place / "runs/dies/state.json").read_text())["status"] == "failed"


def test_a_run_ends_with_its_epochs(place):
    """Catches a schedule, a last batch or a closing validation that is lost when the data ends before the steps."""
    done = moe_lm(*OPTIONS, "data.epochs=2", "trainer.max_steps=500", "run_name=epochs", cwd=place)
    run = place / "runs/epochs"
    counts = json.loads((run / "data/manifest.json").read_text())["counts"]
    last = max(metrics(run, "targets").items())
    assert last[1] == 2 * (counts["train_tokens"] - counts["train_documents"]) and last[0] < 500
    assert f"the data ended after {last[0]} of 500 steps (data.epochs=2)" in done.stderr
    assert (run / f"checkpoints/step-{last[0]:08}/COMPLETE").exists()
    assert metrics(run, "learning_rate")[last[0]] < 1e-4, "the schedule ends where the data does"
    assert (
        "is finished" in moe_lm(*OPTIONS, "data.epochs=2", "trainer.max_steps=500", "run_name=epochs", cwd=place).stdout
    )


def test_steps_of_padding_alone_are_left_out(place):
    """Catches updates without text, by old momentum alone, where the epochs of some streams end before the others'."""
    (place / "uneven").mkdir()
    for number in range(40):
        words = (str(word * word) for word in range(300 if number % 19 == 7 else 10))
        (place / f"uneven/{number}.txt").write_text(f"{number}: " + " ".join(words))
    options = [
        *TINY,
        "tokenizer.vocab_size=384",
        "data.paths=[uneven]",
        "data.streaming=true",
        "data.num_streams=12",
        "data.epochs=1",
    ]
    options += ["trainer.global_batch_size=4", "trainer.micro_batch_size=4", "trainer.max_steps=500"]
    moe_lm("pretrain", *options, "finish.export=false", "run_name=uneven", cwd=place)
    run = place / "runs/uneven"
    losses, targets = metrics(run), list(metrics(run, "targets").values())
    assert len(losses) > 4 and all(loss > 0 for loss in losses.values())
    assert all(before < behind for before, behind in itertools.pairwise(targets))
    assert max(metrics(run, "data_step").values()) >= max(losses), "no step was left out: the streams are not uneven"


def test_waiting_for_data_is_recorded(place):
    """Catches a figure that is left out (what it measures: tests/unit/training/test_telemetry.py)."""
    moe_lm(*OPTIONS, "trainer.max_steps=8", "run_name=waits", cwd=place)
    waits = metrics(place / "runs/waits", "data_wait")
    assert len(waits) == 8 and all(0 <= share < 1 for share in waits.values())
    assert metrics(place / "runs/waits", "tokens_by_domain")[8] == {"text": 8 * 12 * 32}


def test_bad_rows_of_a_stream_are_skipped_and_told(place):
    """Catches rows that vanish without a word."""
    good = [json.dumps({"text": f"row {i} of text, " * 9}) for i in range(300)]
    (place / "rows.jsonl").write_text("\n".join([*good[:200], "{broken", '{"text": null}', *good[200:]]) + "\n")
    options = [*OPTIONS, "data=jsonl", "data.paths=rows.jsonl", "data.streaming=true", "trainer.max_steps=4"]
    done = moe_lm(*options, "run_name=bad", cwd=place, check=False)
    assert done.returncode == 2 and "rows.jsonl, line 201: not valid JSON" in done.stderr
    assert not (place / "runs/bad").exists()
    done = moe_lm(*options, "data.on_bad_row=skip", "run_name=bad", cwd=place)
    assert "left out of the streams: " in done.stderr and "× broken json" in done.stderr
    lines = [json.loads(line) for line in (place / "runs/bad/metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]["skipped_rows"]) == {"broken_json", "null_text"}


def start(place, *options):
    """A run in the background."""
    command = [sys.executable, "-m", "moe_lm", *options]
    return subprocess.Popen(
        command, cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_conversations_become_a_model_that_answers(place):
    """Catches a remedy that the directory then refuses, a resumed run that learns from other tokens, a figure that is
    not the assistant's, and an export or `generate` that renders a question in another way than training did."""
    moe_lm(*OPTIONS, "trainer.max_steps=2", "run_name=words", cwd=place)
    rows = [{"prompt": f"say {i} times a", "completion": "a" * (1 + i % 9)} for i in range(200)]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [o for o in TINY if not o.startswith(("model.", "tokenizer.", "data", "finish."))]
    options = ["finetune", *given, "base=runs/words", "data=chat", "data.paths=[chats.jsonl]", "run_name=chat"]
    refused = moe_lm(*options, "data.sequence_length=8", cwd=place, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert (
        "chats.jsonl, line 1: the conversation has" in refused.stderr and "data.too_long=skip or cut." in refused.stderr
    )
    options += ["data.sequence_length=32", "optimizer.learning_rate=0.02", "schedule=constant"]
    moe_lm(*options, "trainer.max_steps=6", cwd=place)
    longer = [*options, "trainer.max_steps=30", "resume.allow_change=[trainer.max_steps]"]
    done = moe_lm(*longer, cwd=place)
    assert "resumed" in done.stdout and "nats per assistant token (whole validation set)" in done.stderr
    moe_lm(*longer, "run_name=chat-whole", cwd=place)
    ours, theirs = (metrics(place / run, "validation_loss") for run in ("runs/chat", "runs/chat-whole"))
    assert len(ours) > 5 and all(ours[step] == theirs[step] for step in ours) and ours[30] < theirs[0] / 2
    ask = ["chat=true", "prompt=say 3 times a", "temperature=0", "max_new_tokens=12"]
    answers = [moe_lm("generate", f"checkpoint={d}", *ask, cwd=place).stdout for d in ("runs/chat", "runs/chat/hf")]
    assert answers[0] == answers[1] and set(answers[0].strip()) == {"a"}
    loaded = AutoTokenizer.from_pretrained(place / "runs/chat/hf")
    rendered = loaded.apply_chat_template([{"role": "user", "content": "say 3 times a"}], tokenize=False)
    assert rendered == "<s><|user|>say 3 times a<|end|>"
    no_chat = moe_lm("generate", "checkpoint=runs/chat", "chat=true", cwd=place, check=False)
    assert no_chat.returncode == 2 and "prompt='': with chat=true give the user's message." in no_chat.stderr
