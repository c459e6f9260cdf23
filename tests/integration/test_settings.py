"""Every setting reaches the run: what it learns, or what it shows, changes with it."""

import json
import shutil

import pytest
import torch

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore
from tests.faults.forks import WarmParent
from tests.runs import TINY, metrics, moe_lm

OPTIONS = [*TINY, "data=prepared", "data.paths=[prepared]", "trainer.max_steps=4", "trainer.eval_interval=2"]
OPTIONS += ["checkpoint.interval=0", "schedule=cosine", "schedule.warmup_steps=1", "optimizer=adamw"]
OPTIONS += ["finish.export=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Documents of which several go into a row, prepared."""
    directory = tmp_path_factory.mktemp("settings")
    (directory / "corpus").mkdir()
    for i in range(400):
        (directory / f"corpus/{i:03}.txt").write_text(f"file {i}, {i % 7} and {i % 11}" + ", and so on" * (i % 9))
    sizes = ["tokenizer.vocab_size=400", "data.validation_fraction=0.2"]
    moe_lm("prepare", "data=text", "data.paths=[corpus]", *sizes, "output=prepared", cwd=directory)
    return directory


@pytest.fixture(scope="module")
def train(place):
    """Trains a run from its beginning; gives its directory."""
    with WarmParent() as parent:

        def start(*options: str, name: str = "changed"):
            shutil.rmtree(place / "runs" / name, ignore_errors=True)
            log = place / f"{name}.log"
            assert parent.run("pretrain", [*OPTIONS, *options, f"run_name={name}"], place, log=log) == 0, (
                log.read_text()
            )
            return place / "runs" / name

        yield start


@pytest.fixture(scope="module")
def learned(train):
    """The losses of a run, by the options that it and others have; each is trained once."""
    known: dict[tuple[str, ...], list[float]] = {}

    def losses(options: tuple[str, ...] = ()) -> list[float]:
        if options not in known:
            known[options] = list(metrics(train(*options)).values())
        return known[options]

    return losses


@pytest.mark.parametrize(
    "options",
    [
        "seed=2",
        "data.mask_documents=false",
        "data.packing=best_fit",
        "data.sequence_length=16",
        "model=dense",
        "model.rope_theta=10",
        "model.rms_norm_eps=0.1",
        "model.sliding_window=4",
        "model.initializer_range=0.05",
        "model.tie_word_embeddings=true",
        "model.head_dim=16",
        "model.num_experts_per_tok=1",
        "model.capacity_factor=0.5",
        "model.load_balancing=pooled",
        "model.load_balancing=none",
        "model.load_balancing_source=micro_batch",
        "model.router_aux_loss_coef=1",
        "model.router_z_loss_coef=1",
        "trainer.global_batch_size=24",
        "trainer.precision=bf16",
        "optimizer=muon",
        "optimizer=muon optimizer.muon_momentum=0.5",
        "optimizer.learning_rate=0.004",
        "optimizer.weight_decay=9",
        "optimizer.beta1=0.5",
        "optimizer.beta2=0.5",
        "optimizer.eps=0.1",
        "optimizer.max_grad_norm=0.01",
        "schedule.warmup_steps=3",
        "schedule.final_factor=0.9",
        "schedule=constant",
        "schedule=wsd",
        "schedule=wsd schedule.decay_fraction=0.9",
    ],
)
def test_what_a_run_learns_follows_each_setting(learned, options):
    """Catches a setting that is read, checked and written down, and then used nowhere: each changes the losses of four
    steps, those that qualify another one against that one alone."""
    *others, changed = options.split()
    assert learned((*others, changed)) != learned(tuple(others))


def test_what_a_run_shows_follows_each_setting(place, train, learned):
    """Catches intervals and sizes that are the default's whatever is asked for, and a watchdog that is not off at 0."""
    run = train("trainer.max_steps=7", "trainer.log_interval=3", "trainer.step_timeout=0")
    assert sorted(metrics(run, "expert_counts")) == [1, 3, 6]
    assert sorted(metrics(run, "validation_loss")) == [2, 4, 6, 7]
    some = metrics(train("trainer.eval_sequences=1"), "validation_loss")
    more = metrics(train("trainer.eval_sequences=5"), "validation_loss")
    assert some[2] != more[2] and some[4] == more[4]  # the last is of the whole set
    assert list(metrics(train("trainer.activation_checkpointing=full")).values()) == pytest.approx(learned(), rel=1e-5)


def test_a_save_in_the_foreground_is_one_of_its_step(train):
    """Catches a save that goes on while training changes what it writes: with and without a copy in between, every
    checkpoint holds the same."""
    options = "trainer.max_steps=9", "checkpoint.interval=1", "checkpoint.keep_last=20"
    runs = [train(*options, f"checkpoint.background={on}", name=f"background-{on}") for on in ("true", "false")]
    stores = [CheckpointStore(run / "checkpoints", CheckpointConfig()) for run in runs]
    for behind, before in zip(*(store.paths() for store in stores), strict=True):
        assert behind.name == before.name
        ours, theirs = Checkpoint(behind), Checkpoint(before)
        assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.kinds())


def test_a_run_keeps_its_best_checkpoint(train):
    """Catches a score that a run does not write down, or that is not its validation's: a learning rate that grows until
    the model is worse than before."""
    options = ["trainer.max_steps=12", "trainer.eval_interval=2", "checkpoint.interval=2", "checkpoint.keep_last=1"]
    options += ["checkpoint.keep_best=true", "optimizer.learning_rate=3", "schedule.warmup_steps=12"]
    run = train(*options, "optimizer.max_grad_norm=0")
    scores = metrics(run, "validation_bits_per_byte")
    best = min(scores, key=scores.get)
    assert 0 < best < 12
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{best:08}", "step-00000012"}


def test_counts_are_those_of_the_batch(train):
    """Catches counts of one layer, of assignments that were kept, or of padding taken for tokens."""
    run = train("trainer.max_steps=3", "model.capacity_factor=0.5")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        assert line["targets"] <= line["step"] * 12 * 32 and line["data_step"] == line["step"] - 1
        assert line["dropped_assignments"] > 0 and line["peak_memory_bytes"] > 10**7
        assert [sum(counts) for counts in line["expert_counts"]] == [12 * 32 * 2] * 2
