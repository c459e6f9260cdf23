"""How often a run is saved, how much of it is kept, and what happens where it can not be."""

import dataclasses
import enum

from moe_lm.errors import InputError


class FailurePolicy(enum.Enum):
    """What becomes of a run whose checkpoint can not be written."""

    wait = "wait"
    stop = "stop"


@dataclasses.dataclass
class CheckpointConfig:
    """Saving and retention. The last step is always saved, and so is the one that a run is stopped after."""

    interval: int = 500
    """Save every this many optimizer steps; 0 saves only at the end."""
    background: bool = True
    """Write while training goes on, from a copy of the state in memory; false holds training until all is on disk."""
    keep_last: int = 2
    """Newest checkpoints that are kept; older ones are deleted once a newer one is verified on disk."""
    keep_every: int = 0
    """Also keep, for good, the checkpoint of every step that is a multiple of this; 0 keeps no extra ones."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest bits per byte among those saved at a step with a validation."""
    on_failure: FailurePolicy = FailurePolicy.wait
    """If a checkpoint cannot be written (full disk, broken mount) after some tries: `wait` keeps trying, and training
    pauses once the next one is due; `stop` ends the run with exit code 75, to be resumed from the last good one."""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise InputError(f"checkpoint.interval={self.interval}: must be 0 (only at the end) or a number of steps.")
        if self.keep_last < 1:
            raise InputError(f"checkpoint.keep_last={self.keep_last}: must be at least 1.")
        if self.keep_every < 0:
            raise InputError(f"checkpoint.keep_every={self.keep_every}: must be 0 (none) or a number of steps.")
