"""`moe-lm verify`: is a checkpoint, byte for byte, what was written, and is it whole?"""

import time
from pathlib import Path

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.checkpoint.config import CheckpointConfig
from moe_lm.checkpoint.store import CheckpointStore
from moe_lm.checkpoint.tensor_file import CheckpointError
from moe_lm.commands.config import VerifyConfig
from moe_lm.config import to_dataclass
from moe_lm.errors import InputError, RunError
from moe_lm.model.config import ModelConfig
from moe_lm.training.config import OptimizerConfig
from moe_lm.training.state import check_state


def run(config: VerifyConfig) -> int:
    """Check one checkpoint, or all of a run; say of each what was found."""
    assert config.checkpoint is not None
    damaged = [path for path in _checkpoints(Path(config.checkpoint)) if not _is_good(path)]
    if damaged:
        raise RunError(f"checkpoint={config.checkpoint}: {len(damaged)} can not be trusted ({damaged[-1].name})")
    return 0


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint that a path is, or those of the run."""
    if not path.is_dir():
        raise InputError(f"checkpoint={path}: {'is no directory' if path.exists() else 'there is no such directory'}.")
    stores = (CheckpointStore(directory, CheckpointConfig()) for directory in (path / "checkpoints", path))
    paths = next((found for store in stores if (found := store.paths())), [])
    if not paths and not any((path / name).exists() for name in ("COMPLETE", "manifest.json", "index.json")):
        raise InputError(f"checkpoint={path}: holds no checkpoint; give a run directory or a step-… directory.")
    return paths or [path]


def _is_good(path: Path) -> bool:
    start = time.perf_counter()
    try:
        checkpoint = Checkpoint(path)
        rate = checkpoint.num_bytes / (time.perf_counter() - start)
        written_by = checkpoint.state.get("config")
        if not isinstance(written_by, dict):
            raise CheckpointError("state.json: has no configuration of a run")
        model, optimizer = (
            to_dataclass(schema, written_by.get(section))
            for schema, section in ((ModelConfig, "model"), (OptimizerConfig, "optimizer"))
        )
        check_state(checkpoint, model, optimizer)
    except (CheckpointError, InputError) as error:
        print(f"{path}: REFUSED: {str(error).removeprefix(f'{path}: ')}")
        return False
    print(
        f"{path}: good; {len(checkpoint.kinds())} tensors, {checkpoint.num_bytes / 1e6:,.1f} MB in "
        f"{len(checkpoint.files)} files, every byte as it was written ({rate / 1e6:,.0f} MB/s), all tensors that its "
        "configuration asks for"
    )
    return True
