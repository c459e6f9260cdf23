"""Print a SLURM batch script that trains until the run is finished, requeueing itself.

python scripts/render_slurm.py --nodes 4 --gpus-per-node 8 --time 24:00:00 run_name=mine parallel=hsdp_ep > mine.sh
sbatch mine.sh
"""

import argparse
import re
import shlex
import string
from pathlib import Path

TEMPLATE = string.Template(r"""#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
$resources#SBATCH --time=$time
# $grace seconds before the time is over, and when the job is preempted, the processes get SIGTERM: they save and stop.
#SBATCH --signal=TERM@$grace
#SBATCH --requeue
#SBATCH --open-mode=append
$directives
set -uo pipefail
$setup
directory=$directory
begin=$$(mktemp)
first_node=$$(scontrol show hostnames "$${SLURM_JOB_NODELIST:-localhost}" | head -n 1)

# A process that dies or hangs ends all the others, and with them the launchers, which start all anew, three times.
srun --kill-on-bad-exit=1 torchrun --nnodes $nodes --nproc-per-node $processes --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$$first_node:$port" --rdzv-id "$${SLURM_JOB_ID:-0}" \
    -m moe_lm pretrain $options

# The launcher's exit code says nothing of the run's; the run's own word is in its directory.
status=$$(sed -n 's/.*"status": "\([a-z]*\)".*/\1/p' "$$directory/state.json" 2>/dev/null)
echo "$$directory: $${status:-not begun}"
case $$status in finished) exit 0 ;; esac
# A run that did not get as far as its first step will not do so the next time; one that was stopped by hand shall rest.
[ "$$directory/state.json" -nt "$$begin" ] || exit 1
[ ! -e "$$directory/stop" ] || exit 1
[ "$${SLURM_RESTART_COUNT:-0}" -lt 20 ] || exit 1
scontrol requeue "$$SLURM_JOB_ID"
""")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def main() -> None:
    """Fill in the template from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=_positive, default=1, help="machines")
    parser.add_argument(
        "--gpus-per-node", type=_not_negative, default=8, help="GPUs of each, one process for each; 0 for CPUs"
    )
    parser.add_argument("--processes-per-node", type=_positive, help="where it is not the number of GPUs")
    parser.add_argument("--time", default="24:00:00", help="limit of one job; the run goes on in the next")
    parser.add_argument(
        "--grace", type=_positive, default=120, help="seconds before the limit at which the run is saved"
    )
    parser.add_argument("--port", type=_positive, default=29500, help="on the first node, for the processes to meet")
    parser.add_argument("--setup", default="", help="a line that activates the environment")
    parser.add_argument("--sbatch", action="append", default=[], help="a further directive, such as --partition=gpu")
    parser.add_argument("options", nargs="*", help="options of `moe-lm pretrain`")
    given = parser.parse_args()
    processes = given.processes_per_node or given.gpus_per_node
    if processes < 1:
        parser.error("--gpus-per-node 0 needs --processes-per-node")
    if not re.fullmatch(r"[0-9:-]+", given.time):
        parser.error(f"--time {given.time!r}: must be written as SLURM does, such as 24:00:00")
    if wrong := [option for option in given.options if "=" not in option]:
        parser.error(f"{wrong[0]!r}: options of `moe-lm pretrain` are written NAME=VALUE")
    values = dict(option.lstrip("+").split("=", 1) for option in given.options)
    name = values.get("run_name", values.get("experiment", "stdlib"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        parser.error(f"run_name={name!r}: use letters, digits, '.', '_' and '-'")
    print(
        TEMPLATE.substitute(
            name=shlex.quote(name),
            nodes=given.nodes,
            resources=f"#SBATCH --gpus-per-node={given.gpus_per_node}\n" if given.gpus_per_node else "",
            time=given.time,
            grace=given.grace,
            directives="\n".join(f"#SBATCH {directive}" for directive in given.sbatch),
            setup=given.setup,
            directory=shlex.quote(str(Path(values.get("output_dir", "runs")).expanduser() / name)),
            processes=processes,
            port=given.port,
            options=shlex.join(given.options),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
