#!/usr/bin/env bash
# À lancer sur CHAQUE nœud, avec le même texte ; le premier nœud tient le rendez-vous :
#   NODES=2 HEAD=noeud0 ./torchrun_plusieurs_noeuds.sh --data cours --sharded --out /partage/modeles/essai
# Le dossier --out doit être vu de tous : le premier processus y écrit les points de reprise, tous les relisent.
set -euo pipefail

: "${NODES:?nombre de nœuds}" "${HEAD:?nom ou adresse du premier nœud}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec torchrun \
  --nnodes "$NODES" \
  --nproc-per-node "${PROCESSES:-8}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:${PORT:-29500}" \
  --rdzv-id "${JOB:-llama}" \
  --max-restarts "${RESTARTS:-3}" \
  -m llama train "$@"
