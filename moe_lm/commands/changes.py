"""What of a run's configuration may change when it is resumed."""

import re

from moe_lm.config import nearest, written
from moe_lm.data.mixture import shares_move
from moe_lm.errors import InputError
from moe_lm.plain import flatten, to_plain
from moe_lm.training.config import RunConfig

FREE_TO_CHANGE = (
    "run_name",
    "output_dir",
    "resume",
    "data.workers",
    "trainer.device",
    "trainer.micro_batch_size",
    "trainer.activation_checkpointing",
    "trainer.log_interval",
    "trainer.eval_interval",
    "trainer.eval_sequences",
    "trainer.step_timeout",
    "trainer.stop_deadline",
    "checkpoint",
    "parallel",
    "tracker",
    "finish",
)
"""Fields (or sections) of a run that may differ when it is resumed: they change what is learned by rounding at most.
(Where the loss or a capacity depends on the micro-batch, `job` compares that with the checkpoint's.)"""

NEVER_TO_CHANGE = (
    "data.streaming",
    "data.num_streams",
    "data.sequence_length",
    "data.packing",
    "trainer.global_batch_size",
    "model.family",
    "model.vocab_size",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.tie_word_embeddings",
    "model.num_experts",
    "optimizer.name",
    "finetune.method",
    "finetune.parts",
    "finetune.rank",
)
"""Fields that the data's position in a checkpoint means nothing without, or that its tensors' names and shapes depend
on."""


def differences(old: RunConfig, new: RunConfig) -> dict[str, str]:
    """Fields that differ between two configurations of a run and may not, by name, as `old → new`.

    What `resume.allow_change` of the new one names may differ as well, and where a tokenizer lies if the base lies
    elsewhere too: what it is is compared with the data.
    """
    before, after = flatten(to_plain(old)), flatten(to_plain(new))
    follows = ["tokenizer.path"] if before.get("base") != after.get("base") else []
    free = [f"{name}." for name in (*FREE_TO_CHANGE, *follows, *new.resume.allow_change)]
    return {
        name: f"{written(before.get(name))} → {written(after.get(name))}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
        and (is_fixed(name, old) or not any(f"{name}.".startswith(prefix) for prefix in free))
    }


def is_fixed(name: str, begun: RunConfig) -> bool:
    """Whether not even `resume.allow_change` can change a field of a run that has begun."""
    if name in NEVER_TO_CHANGE:
        return True
    if begun.data.streaming:
        return False
    # Which row of which source comes next is a formula of all weights, and where they move, of the run's length.
    weighed = re.fullmatch(r"data\.sources\.[^.]+\.(weight|final_weight)", name) is not None
    return weighed or (name == "trainer.max_steps" and shares_move(begun.data.sources.values()))


def check_allowed(config: RunConfig) -> None:
    """Refuse a name in `resume.allow_change` that is no option: it would allow nothing, and nobody would notice."""
    names = list(flatten(to_plain(config)))
    sections = {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}
    for name in config.resume.allow_change:
        if name not in names and name not in sections:
            raise InputError(
                f"resume.allow_change=[{name}]: there is no option {name!r}{nearest(name, [*names, *sections])}"
            )
