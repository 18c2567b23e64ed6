#!/usr/bin/env bash
# Sert un modèle enregistré par llama (dossier de transformers) par l’API d’OpenAI. Demande un GPU et « pip install vllm ».
#   ./vllm_service.sh modeles/droit
#   curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' \
#     -d '{"model": "droit", "prompt": "Le contrat de travail", "max_tokens": 60}'
set -euo pipefail

MODEL=${1:?dossier du modèle}
LENGTH=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["max_position_embeddings"])' "$MODEL/config.json")

exec vllm serve "$MODEL" \
  --served-model-name "$(basename "$MODEL")" \
  --dtype bfloat16 \
  --max-model-len "$LENGTH" \
  --tensor-parallel-size "${GPUS:-1}" \
  --gpu-memory-utilization 0.90 \
  --max-num-seqs 256 \
  --host 127.0.0.1 --port "${PORT:-8000}"
