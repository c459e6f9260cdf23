"""What a model card says of a run."""

from moe_lm.commands.training_facts import _without_places


def test_no_directory_of_the_machine_is_published():
    """Catches a customer's name in a path that was typed in another way than from the root."""
    typed = ["/data/acme/a.jsonl", "~/acme/a.jsonl", "../acme/a.jsonl", "./acme/a.jsonl"]
    assert _without_places({"data": {"paths": typed}}) == {"data": {"paths": ["…/a.jsonl"] * 4}}
    assert _without_places(["allenai/c4", 3, None]) == ["allenai/c4", 3, None]
