#!/bin/bash
# Train on a Cloud TPU slice: the same command on every host, from a machine with gcloud:
#     bash experiments/launch/tpu_pod.sh
# The repository lies in ~/jaxunet on every host, installed with '.[tpu]' (once, by the same
# gcloud command). Run it again after a stop or a maintenance: it goes on from its last checkpoint.
# After a lost connection the run goes on by itself: stop it, which saves it, before it is started
# again, by the same gcloud command with `pkill -TERM -f experiments/train.py`.
#
# JAX asks the slice's metadata server for the hosts (worker-network-endpoints, of which the
# first is process 0's) and for its own number (agent-worker-number); nothing need be set.
# Process 0 alone reads and writes the run, and needs to see it again after a restart.
set -euo pipefail

# Edit these three: the slice, its data, and the run.
slice=(NAME --zone us-central2-b)
data=(--data.dir /mnt/ISIC2018)
options=(reference --train.batch-size 16 --train.eval-batch-size 16 --out runs/slice)

printf -v command '%q ' python3 experiments/train.py "${options[@]}" "${data[@]}" \
  --distributed --resume
exec gcloud compute tpus tpu-vm ssh "${slice[@]}" --worker=all --command "cd jaxunet && $command"
