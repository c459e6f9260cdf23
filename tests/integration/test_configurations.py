"""Every configuration that ships composes into a valid run, and survives being saved."""

import enum

import pytest

from moe_lm.commands.changes import differences
from moe_lm.config import config_directory, field_types, group_choices, load, load_saved, save
from moe_lm.data.config import DataSource
from moe_lm.training.config import RunConfig

CHOICES = [(group, name) for group, names in group_choices("pretrain").items() for name in names]
NEEDS = {kind.name: ["data.paths=x"] for kind in DataSource if kind is not DataSource.stdlib}
NEEDS["shakespeare_char"] = ["data.paths=x"]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_each_choice_composes_and_survives_saving(group, name, tmp_path):
    """Catches a YAML file with a field that no longer exists, a wrong type, or a value out of range."""
    config = load("pretrain", [f"{group}={name}", *NEEDS.get(name, [])])
    save(config, tmp_path / "config.yaml")
    again = load_saved(RunConfig, tmp_path / "config.yaml")
    assert again == config and not differences(config, again)


def test_the_groups_are_those_of_the_contract():
    """Catches a group that is lost from the package."""
    expected = {
        "model",
        "data",
        "optimizer",
        "schedule",
        "trainer",
        "checkpoint",
        "tracker",
        "resume",
        "parallel",
        "experiment",
    }
    assert {p.name for p in config_directory().iterdir() if p.is_dir()} == expected | {"finetune"}
    assert set(group_choices("pretrain")) == expected
    assert set(group_choices("finetune")) == (expected - {"model", "experiment"}) | {"finetune"}


def test_command_line_wins_over_groups():
    """Catches a group choice that overwrites a value given by hand, whatever the order."""
    for order in (["model.hidden_size=512", "model=dense"], ["model=dense", "model.hidden_size=512"]):
        assert load("pretrain", order).model.hidden_size == 512


def test_differences_say_what_was_and_what_is():
    """Catches a value that is said as nobody would write it."""
    one, other = load("pretrain", []), load("pretrain", ["seed=9", "trainer.log_interval=3", "model.rope_theta=5"])
    assert differences(one, other) == {"seed": "1 → 9", "model.rope_theta": "10000.0 → 5.0"}


FREE = {
    *("run_name", "output_dir", "resume.policy", "resume.allow_change", "data.workers"),
    *("trainer.device", "trainer.micro_batch_size", "trainer.activation_checkpointing", "trainer.log_interval"),
    *("trainer.eval_interval", "trainer.eval_sequences", "trainer.step_timeout", "trainer.stop_deadline"),
    *("checkpoint.interval", "checkpoint.background", "checkpoint.keep_last", "checkpoint.keep_every"),
    *("checkpoint.keep_best", "checkpoint.on_failure"),
    *("parallel.mode", "parallel.dp_replicate", "parallel.ep", "parallel.placement", "parallel.placement_file"),
    *("tracker.name", "tracker.project", "tracker.mode"),
    *("finish.export", "finish.sample_prompt", "finish.sample_tokens", "finish.compare_compressors"),
}
FIXED = {
    *("data.streaming", "data.num_streams", "data.sequence_length", "data.packing", "trainer.global_batch_size"),
    *("model.family", "model.vocab_size", "model.hidden_size", "model.intermediate_size", "model.num_hidden_layers"),
    *("model.num_attention_heads", "model.num_key_value_heads", "model.head_dim", "model.tie_word_embeddings"),
    *("model.num_experts", "optimizer.name"),
}


def _changed(name: str) -> RunConfig:
    """The default run with another value of a field, whether or not it makes sense."""
    config = load("pretrain", [])
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    value = getattr(section, field)
    if isinstance(value, enum.Enum):
        value = next(member for member in type(value) if member is not value)
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, (int, float)):
        value += 1
    else:
        value = [*value, "x"] if isinstance(value, list) else "x"
    setattr(section, field, value)
    return config


@pytest.mark.parametrize("name", [name for name in field_types(RunConfig) if ".NAME." not in name])
def test_every_field_is_compared_when_a_run_goes_on(name):
    """Catches a field that could change on resume without anyone noticing, and one whose change can be insisted on
    though the checkpoint, or where it stands in the data, then means nothing."""
    changed = _changed(name)
    assert set(differences(load("pretrain", []), changed)) == {name} - FREE
    changed.resume.allow_change = [name]
    assert set(differences(load("pretrain", []), changed)) == {name} & FIXED


def test_what_the_order_of_rows_is_computed_from_is_fixed():
    """Catches rows that are skipped and repeated because weights, or the length that they move over, were changed."""
    sources = ["data.sources.a.paths=[a]", "data.sources.a.weight=1", "data.sources.b.paths=[b]"]
    sources += ["data=text", "data.sources.b.weight=1"]
    moving = [*sources, "data.sources.b.final_weight=2", "data.sources.a.final_weight=1"]
    same = [*sources, "data.sources.b.final_weight=0.3", "data.sources.a.final_weight=0.3"]
    for begun, change, fixed in (
        (sources, "data.sources.a.weight=2", True),
        (sources, "trainer.max_steps=5", False),
        (same, "trainer.max_steps=5", False),
        (moving, "trainer.max_steps=5", True),
        (moving, "data.sources.b.final_weight=3", True),
        ([*moving, "data.streaming=true"], "trainer.max_steps=5", False),
        ([*moving, "data.streaming=true"], "data.sources.b.final_weight=3", False),
    ):
        name = change.split("=")[0]
        new = load("pretrain", [*(o for o in begun if not o.startswith(f"{name}=")), change])
        new.resume.allow_change = [name]
        assert bool(differences(load("pretrain", begun), new)) == fixed, (begun, change)


TEXTS = ["cost ${x}", "a\\${b", "${seed}", "\\\\${a}", "{x: 1}", "null", "1", "ä\nb", "- x", "???"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_any_kind_survives_saving(text, tmp_path):
    """Catches an interpolation, a number or a list that comes out of a text when its configuration is written down."""
    config = load("pretrain", [f"finish.sample_prompt={text}", f"tracker.project={text}x"])
    save(config, tmp_path / "config.yaml")
    again = load_saved(RunConfig, tmp_path / "config.yaml")
    assert again == config and again.tracker.project == f"{text}x" and not differences(config, again)


@pytest.mark.parametrize(
    ("option", "idle", "useful"),
    [
        ("schedule.final_factor=0.2", ["schedule=constant"], ["schedule=cosine"]),
        ("schedule.decay_fraction=0.2", ["schedule=cosine"], ["schedule=wsd"]),
        ("optimizer.muon_momentum=0.9", ["optimizer=adamw"], ["optimizer=muon"]),
        ("model.load_balancing_source=micro_batch", ["model.load_balancing=none"], []),
        ("model.router_aux_loss_coef=0.02", ["model.load_balancing=none"], []),
        ("model.num_experts=4", ["model=dense"], ["model=mixture"]),
        ("model.load_balancing=none", ["model=dense"], ["model=mixture"]),
        ("tracker.project=x", [], ["tracker=wandb"]),
        ("finish.sample_tokens=9", ["finish.sample_prompt=null"], ["finish.sample_prompt="]),
        ("data.num_streams=4", [], ["data.streaming=true"]),
        ("data.too_long=cut", [], ["data=chat", "data.paths=x"]),
        ("data.split=test", ["data=text", "data.paths=x"], ["data=huggingface", "data.paths=x"]),
    ],
)
def test_what_has_no_effect_is_said(option, idle, useful, capsys, monkeypatch):
    """Catches an option that is accepted and ignored, and a note on one that an experiment or a group set."""
    name = option.split("=")[0]
    load("pretrain", [option, *idle])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"moe-lm: note: {name} has no effect ")
    load("pretrain", [option, *useful])
    load("pretrain", idle)
    monkeypatch.setenv("RANK", "1")
    load("pretrain", [option, *idle])
    assert not capsys.readouterr().err
