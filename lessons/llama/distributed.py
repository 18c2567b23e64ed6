"""Plusieurs processus, un seul modèle : rang, nombre, et ce qui passe de l’un à l’autre.

Sans `torchrun`, tout se lit comme un groupe d’un seul processus. La boucle d’entraînement découpe le lot global ;
ce module additionne les morceaux (Li et al. 2020, §3).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """Numéro de ce processus, compté de 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Nombre de processus."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_gradients(model: nn.Module, total: Tensor) -> None:
    """Additionne entre processus les gradients et la perte `total` : chacun n’a vu que sa part du lot global."""
    dist.all_reduce(total)
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # un expert qui n’a reçu aucun jeton ici, mais peut-être ailleurs
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
