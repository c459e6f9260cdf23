#!/usr/bin/env bash
# A SLURM batch job that goes on until the run is finished: sbatch scripts/slurm.sh run_name=mine data=…
# Set the resources below, and activate the environment of the project before sbatch.
#SBATCH --job-name=moe-lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# Two minutes before the time is over, and when the job is preempted, the processes get SIGTERM: they save and stop.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

run_name=stdlib output_dir=runs
for option in "$@"; do
    case $option in
        run_name=*) run_name=${option#run_name=} ;;
        output_dir=*) output_dir=${option#output_dir=} ;;
    esac
done
directory=$output_dir/$run_name
begin=$(mktemp)
first_node=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)

# A process that is killed or hangs (trainer.step_timeout) ends its node's launcher, which starts all anew, three times.
srun torchrun --nnodes "${SLURM_NNODES:-1}" --nproc-per-node "${SLURM_GPUS_ON_NODE:-2}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first_node:29500" --rdzv-id "${SLURM_JOB_ID:-0}" \
    -m moe_lm pretrain "$@"

# The launcher's exit code says nothing of the run's; the run's own word is in its directory.
status=$(sed -n 's/.*"status": "\([a-z]*\)".*/\1/p' "$directory/state.json" 2>/dev/null)
echo "run $run_name: ${status:-not begun}"
case $status in finished) exit 0 ;; esac
# A run that did not get as far as its first step will not do so the next time; one that was stopped by hand shall rest.
if [ ! "$directory/state.json" -nt "$begin" ] || [ -e "$directory/stop" ] || [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
    exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
