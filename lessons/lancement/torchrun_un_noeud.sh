#!/usr/bin/env bash
# Un nœud, un processus par GPU (deux processus sans GPU). Ce qui suit le nom du fichier va à « llama train » :
#   ./torchrun_un_noeud.sh --data cours --preset petit --steps 7400 --out modeles/petit
set -euo pipefail

if command -v nvidia-smi >/dev/null; then
  PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # sans cela, chaque processus prend tous les cœurs

exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" -m llama train "$@"
