"""Every configuration that ships composes into a valid run, and survives being saved."""

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


def test_differences_name_every_field_that_matters():
    """Catches a field that could change on resume without anyone noticing: all but the listed free ones are
    compared."""
    one, other = load("pretrain", []), load("pretrain", ["seed=9", "trainer.log_interval=3", "model.rope_theta=5"])
    assert differences(one, other) == {"seed": "1 → 9", "model.rope_theta": "10000.0 → 5.0"}
    assert "seed" in field_types(RunConfig)


@pytest.mark.parametrize("text", ["cost ${x}", "a\\${b", "${seed}", "\\\\${a}", "{x: 1}", "null", "1", "ä\nb", "- x"])
def test_text_of_any_kind_survives_saving(text, tmp_path):
    """Catches an interpolation, a number or a list that comes out of a text when its configuration is written down."""
    config = load("pretrain", [f"finish.sample_prompt={text}", f"tracker.project={text}x"])
    save(config, tmp_path / "config.yaml")
    again = load_saved(RunConfig, tmp_path / "config.yaml")
    assert again == config and again.tracker.project == f"{text}x" and not differences(config, again)
