#!/usr/bin/env bash
# A run over the nodes of a SLURM job. Submit it from the top of the checkout, which all nodes see, with set-up done:
#
#   sbatch --nodes=2 scripts/cluster/slurm.sh --config configs/qwen3_14b.py:math_cot_ep8 --workdir /shared/runs/math \
#       --config.mesh.replica=2
#
# What sbatch is told wins over the lines below. PROC_PER_NODE=8 sbatch ...: a process for each GPU instead of one for
# each node. Ten minutes before the time limit the run saves and stops; the same sbatch resumes it. For a run that needs
# several jobs, submit it several times with --dependency=singleton: a job that finds the run done ends at once.
#SBATCH --job-name=jsft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NODE_COUNT=$SLURM_NNODES MASTER_ADDR=${hosts%%$'\n'*} PROC_PER_NODE=${PROC_PER_NODE:-1}
# Each job has its own ports, since a node may still hold those of the job before.
export MASTER_PORT=$((29400 + SLURM_JOB_ID % 1000 * 2))
# One task a node. The node's rank is known inside the task alone. A task that ends must not end the others: they learn
# of it from each other, and run_forever.sh starts them again.
exec srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
  bash -c 'NODE_RANK=$SLURM_NODEID exec scripts/run_forever.sh scripts/launch_node.sh "$@"' launch "$@"
