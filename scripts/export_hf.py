"""`moe-lm export` as a file, for batch systems that want one: `python scripts/export_hf.py checkpoint=runs/stdlib`."""

import sys

from moe_lm.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
