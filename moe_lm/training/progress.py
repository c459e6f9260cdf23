"""How far a run is: the counters that a checkpoint keeps."""

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass
class Progress:
    """Counters of a run, the same on every process."""

    step: int = 0
    """Finished optimizer steps, skipped updates included."""
    data_step: int = 0
    """Global batches consumed, or left out by a rewind."""
    updates: int = 0
    """Steps whose update was applied."""
    skipped_in_a_row: int = 0
    """Last steps whose update was not."""
    skipped_data_steps: list[int] = dataclasses.field(default_factory=list)
    """Global batches that are left out, around spikes of the loss; in order."""
    targets: int = 0
    """Target tokens learned from."""
    tokens_by_domain: dict[str, int] = dataclasses.field(default_factory=dict)
    """Input tokens learned from, by domain."""
    validated_step: int = 0
    """Step of the last interim validation."""
    bits_per_byte: float | None = None
    """Its figure."""
    best_bits_per_byte: float | None = None
    """The lowest so far."""
    start_loss: float | None = None
    """Nats per validation target before the first step, of a run that began from a trained model."""

    def learned(self, targets: int, tokens_by_domain: Iterable[tuple[str, int]]) -> None:
        """Add what an update learned from."""
        self.updates += 1
        self.targets += targets
        for name, tokens in tokens_by_domain:
            self.tokens_by_domain[name] = self.tokens_by_domain.get(name, 0) + tokens

    def validated(self, bits_per_byte: float) -> None:
        """Take in an interim validation of the present step."""
        self.validated_step, self.bits_per_byte = self.step, bits_per_byte
        best = self.best_bits_per_byte
        if math.isfinite(bits_per_byte):
            self.best_bits_per_byte = bits_per_byte if best is None else min(best, bits_per_byte)
