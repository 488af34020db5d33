#!/bin/bash
# Submit the three jobs, each of which waits until the one before it has ended well.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p logs
cache=$(sbatch --parsable slurm/cache.sbatch)
train=$(sbatch --parsable --dependency="afterok:${cache%%;*}" slurm/train.sbatch)
finish=$(sbatch --parsable --dependency="afterok:${train%%;*}" slurm/finish.sbatch)
echo "submitted: cache ${cache%%;*}, train ${train%%;*}, finish ${finish%%;*}"
