"""`moe-lm pretrain` as a file, for launchers that want one: `torchrun --nproc-per-node 2 scripts/pretrain.py`."""

import sys

from moe_lm.cli import run_and_exit

run_and_exit(["pretrain", *sys.argv[1:]])
