#!/bin/bash
# Train on several nodes of a Slurm cluster, one process a GPU:
#     sbatch experiments/launch/slurm.sh
# Two minutes before the time limit Slurm warns every process; the run saves and stops, and the
# job queues itself again, until it is done. Submitted by hand again, it goes on too.
#
# JAX finds the processes by SLURM_JOB_ID (the port), SLURM_STEP_NODELIST (its first node is
# process 0's), SLURM_NTASKS, SLURM_PROCID and SLURM_LOCALID. The last is also the number of the
# process's GPU: ask for GPUs by node, as here. With --gpus-per-task or --gpu-bind each process
# sees one GPU only, whose number is 0.
#SBATCH --job-name=jaxunet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# Edit these three, and the nodes, GPUs and time above. All nodes must see both folders of data.
data=(--data.dir /shared/ISIC2018 --data.prepared-dir /shared/prepared)
run=/shared/runs/a
options=(reference --train.batch-size 16 --train.eval-batch-size 16)

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" python experiments/train.py "${options[@]}" \
  "${data[@]}" --distributed --resume --out "$run"
status=$?
if [ "$status" -eq $((128 + $(kill -l USR1))) ]; then # stopped by the warning, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
