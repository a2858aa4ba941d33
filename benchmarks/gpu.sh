#!/usr/bin/env bash
# One command on a machine with a GPU: is CUDA's way right, and how fast is it? Made to take less
# than 25 minutes on one H100, which is not measured yet. Prints a table, and keeps it in gpu_results.md, to be added to benchmarks/RESULTS.md.
#
#     bash benchmarks/gpu.sh            # --small tries the script itself, on any machine
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/gpu.py "$@" | tee gpu_results.md
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -ge 2 ]; then
    torchrun --nproc_per_node=2 benchmarks/gpu.py --part ranks "$@" | tee -a gpu_results.md
fi
