"""`python -m moe_lm COMMAND …`, for launchers: `torchrun … -m moe_lm pretrain …`."""

from moe_lm.cli import run_and_exit

run_and_exit()
