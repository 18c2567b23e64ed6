"""Ce que les couches d’un même passage partagent : positions, masques d’attention, et cache de clés et de valeurs.

Un bloc peut contenir plusieurs documents, et du remplissage. Le masque donne à chaque jeton le numéro de son
document (0 pour le remplissage) ; tout le reste s’en déduit, une fois par passage et non une fois par couche.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Config, LlamaError


class KVCache:
    """Clés et valeurs des jetons déjà lus, pour n’en recalculer aucune en générant.

    Args:
        config: celle du modèle.
        batch_size: séquences du lot.
        max_length: jetons que chacune pourra contenir.
        device: où placer les tenseurs.
        dtype: leur type.

    Attributes:
        length: jetons déjà lus.
    """

    def __init__(
        self, config: Config, batch_size: int, max_length: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_length, config.d_k)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self._by_layer = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.documents: Tensor | None = None  # (B, max_length), dès qu’un masque est donné
        self.length = 0

    def extend(self, mask: Tensor | None, n_tokens: int) -> Tensor | None:
        """Numéros de document des jetons lus et de ceux qui arrivent, `(B, S)` ; None s’il n’y a qu’un document.

        Raises:
            LlamaError: le cache est trop court.
        """
        end, capacity = self.length + n_tokens, self.keys.shape[3]
        if end > capacity:
            raise LlamaError(f"Cache plein : {end} jetons pour {capacity} places ; augmentez max_length.")
        if self.documents is None:
            if mask is None:
                return None
            self.documents = mask.new_ones(len(mask), capacity)
        # Sans masque, les jetons continuent le dernier document.
        self.documents[:, self.length:end] = self.documents[:, self.length - 1, None] if mask is None else mask
        return self.documents[:, :end]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Range les clés et valeurs `(B, G, T, d_k)` d’une couche ; rend toutes les siennes, `(B, G, S, d_k)`."""
        keys, values = self._by_layer[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end].type_as(k), values[:, :, :end].type_as(v)


@dataclass
class Context:
    """Le contexte d’un passage de T jetons, précédés de ceux du cache (S en tout).

    Attributes:
        rotation: rotations de RoPE, que rend `RotaryPositionalEmbedding`.
        temperature: facteur des requêtes des couches sans RoPE, `(B ou 1, T, 1, 1)`, ou None.
        bias: 0 où une requête voit une clé, −∞ ailleurs, `(B ou 1, 1, T, S)` ; None pour un seul document.
        chunk_bias: le même, coupé en tranches, pour les couches à RoPE.
        cache: clés et valeurs passées, ou None.
    """

    rotation: Tensor
    temperature: Tensor | None
    bias: Tensor | None
    chunk_bias: Tensor | None
    cache: KVCache | None

    @classmethod
    def build(
        cls, config: Config, rope: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor | None,
        cache: KVCache | None, dtype: torch.dtype,
    ) -> Context:
        """Prépare un passage ; voir `LlamaModel.forward` pour `ids`, `mask` et `cache`."""
        past, T = 0, ids.shape[1]
        if cache is not None:
            past, mask = cache.length, cache.extend(mask, T)
        order = torch.arange(past + T, device=ids.device)
        positions = order[None] if mask is None else document_positions(mask)  # (B ou 1, S)
        seen = (order <= order[past:, None])[None]  # (1, T, S)
        if mask is not None:
            seen = seen & (mask[:, past:, None] == mask[:, None])  # (B, T, S)
        # Un seul document, lu d’un coup ou jeton par jeton : l’attention n’a pas besoin de masque.
        bias = None if mask is None and (past == 0 or T == 1) else _bias(seen, dtype)
        chunk_bias, chunk = bias, config.attention_chunk_size
        if chunk is not None and past + T > chunk:
            same_chunk = positions[:, past:, None] // chunk == positions[:, None] // chunk  # (B ou 1, T, S)
            chunk_bias = _bias(seen & same_chunk, dtype)
        positions, temperature = positions[:, past:], None
        if config.attn_temperature_tuning:  # Nakanishi 2025, §3, par paliers de floor_scale jetons
            steps = ((positions + 1.0) / config.floor_scale).floor()
            temperature = (1 + config.attn_scale * steps.log1p())[..., None, None]  # (B ou 1, T, 1, 1)
        return cls(rope(positions), temperature, bias, chunk_bias, cache)


def document_positions(mask: Tensor) -> Tensor:
    """Rang de chaque jeton dans son document, `(B, T)` : `[[0, 0, 1, 1, 1, 2]]` donne `[[0, 1, 0, 1, 2, 0]]`."""
    order = torch.arange(mask.shape[1], device=mask.device)
    first = torch.ones_like(mask, dtype=torch.bool)
    first[:, 1:] = mask[:, 1:] != mask[:, :-1]
    return order - (order * first).cummax(1).values


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[:, None]
