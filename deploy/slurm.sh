#!/bin/bash
# sbatch deploy/slurm.sh: pretraining on four nodes of eight GPUs. Five minutes before its time is
# up the job is told to save; it then asks for another turn and goes on from there. A preempted job
# does the same.
#SBATCH --job-name=lm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lm-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck disable=SC1091
source venv/bin/activate # made by: python -m venv venv; pip install -r requirements.txt

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# One task a GPU; Slurm's signals reach the program itself.
code=0
# shellcheck disable=SC2016 # the tasks expand it
srun --kill-on-bad-exit=1 bash -euc '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  exec python standalone_transformer_lm.py train --data_dir data/corpus \
    --out_dir runs/train --preset 700m --tokens 14e9 --zero 1 --ckpt_minutes 10
' || code=$?

# 128 + the signal: it was saved because the time is nearly up (USR1).
if [ "$code" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
