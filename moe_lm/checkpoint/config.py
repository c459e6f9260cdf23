"""How often a run is saved, and how much of it is kept."""

import dataclasses

from moe_lm.errors import InputError


@dataclasses.dataclass
class CheckpointConfig:
    """Saving and retention. The last step is always saved."""

    interval: int = 500
    """Save every this many optimizer steps; 0 saves only at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept; older ones are deleted once a newer one is complete on disk."""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise InputError(f"checkpoint.interval={self.interval}: must be 0 (only at the end) or a number of steps.")
        if self.keep_last < 1:
            raise InputError(f"checkpoint.keep_last={self.keep_last}: must be at least 1.")
