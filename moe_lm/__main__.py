"""`python -m moe_lm COMMAND …`, for launchers: `torchrun … -m moe_lm pretrain …`."""

import sys

from moe_lm.cli import main

sys.exit(main())
