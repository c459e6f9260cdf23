"""`moe-lm finetune` as a file, for launchers that want one: `torchrun --nproc-per-node 2 scripts/finetune.py`."""

import sys

from moe_lm.cli import run_and_exit

run_and_exit(["finetune", *sys.argv[1:]])
