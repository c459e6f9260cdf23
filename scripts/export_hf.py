"""`moe-lm export` as a file, for batch systems that want one: `python scripts/export_hf.py checkpoint=runs/stdlib`."""

import sys

from moe_lm.cli import run_and_exit

run_and_exit(["export", *sys.argv[1:]])
