"""No process of a sharded run holds the whole model, not for a moment."""

import json
import subprocess
import sys
from pathlib import Path

from moe_lm.model.accounting import count_parameters
from tests.distributed.memory import CONFIG
from tests.runs import ENVIRONMENT


def test_a_process_holds_its_part_and_one_tensor(tmp_path):
    """Catches a process that builds, initialises, saves or loads the whole model: the most memory that one of four
    processes needs for its weights, gradients, two moments and the copy that is saved, and to read a checkpoint that
    one process wrote, is a quarter of those of the whole, and two of its largest tensors besides."""
    for world in (1, 2, 4):
        launcher = [sys.executable]
        if world > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command = [*launcher, "-m", "tests.distributed.memory", tmp_path]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    grown = {world: max(json.loads((tmp_path / f"memory-{world}.json").read_text())) for world in (1, 2, 4)}
    weights = 4 * count_parameters(CONFIG).total
    largest = 4 * CONFIG.num_experts * 2 * CONFIG.intermediate_size * CONFIG.hidden_size
    whole = 7 * weights  # weights, gradients, two moments, and a copy of all but gradients
    assert grown[1] > 0.6 * whole, "the measure does not see what one process holds"
    slack = 2 * largest + 40 * 2**20
    assert grown[2] < whole / 2 + slack and grown[4] < whole / 4 + slack, (grown, weights, largest)
    print(grown, weights)
