"""La boucle du praticien : transformers pour le modèle, Accelerate pour les processus.

    accelerate launch --config_file accelerate_copies.yaml boucle_accelerate.py MODÈLE DONNÉES SORTIE

MODÈLE est un dossier de transformers ; DONNÉES, un fichier safetensors d’exemples « ids » et « labels », déjà décalés ;
SORTIE reçoit les pertes. Le même fichier va d’un processeur à deux nœuds de huit GPU : seule change la configuration.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

BATCH = 8  # sur tous les processus ensemble


def main(model_folder: str, data_file: str, out: str) -> None:
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    data = load_file(data_file)
    loader = DataLoader(TensorDataset(data["ids"], data["labels"]), batch_size=BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for ids, labels in loader:
        logits = model(input_ids=ids).logits  # (B, T, V)
        # DDP fait la MOYENNE des gradients : juste ici, où tous les blocs ont autant de jetons à apprendre.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps({"processus": accelerator.num_processes, "pertes": losses}))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
