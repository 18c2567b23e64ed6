"""Le modèle n-grammes : la probabilité d’un jeton sachant les n - 1 précédents, comptée et non apprise.

`NGramModel` est le point de départ auquel se comparent les réseaux du cours. Il a leur interface (identifiants
`(B, T)` → `(B, T, V)`), si bien qu’`evaluation` et `generation` s’en servent sans rien changer. Le lissage est celui de
Kneser et Ney (1995), interpolé, à une réduction par ordre (Chen et Goodman 1999, §2.7 et §4.1.6) : pour une suite h de
jetons et un jeton w,

    P(w | h) = (c(hw) - D) / c(h·)  +  D · N(h·) / c(h·) · P(w | h sans son premier jeton)

où c(hw) compte, à l’ordre le plus haut, les occurrences de hw, et, plus bas, les jetons différents qui le précèdent ;
c(h·) est la somme des c(hw), N(h·) le nombre de suites hw observées, et D = n₁ / (n₁ + 2 n₂), nₖ étant le nombre de
suites de compte k. Le dernier terme du repli est la loi uniforme : rien n’est impossible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .config import Config, LlamaError
from .context import KVCache

USUAL_DISCOUNT = 0.75
"""La réduction D d’un texte trop court pour que n₁ et n₂ la donnent."""


class Level(NamedTuple):
    """Les suites de k jetons, rangées par contexte (leurs k - 1 premiers jetons).

    Le contexte de numéro i a les suites de `offsets[i]` à `offsets[i + 1]`. La suite de rang r est, à l’ordre
    suivant, le contexte de numéro r ; le numéro d’après la dernière est le début d’un texte, où rien ne précède.
    """

    keys: np.ndarray  # (N,) croissants : numéro du contexte × V + dernier jeton
    offsets: np.ndarray  # (contextes + 1,)
    shares: np.ndarray  # (N,) : (c(hw) - D) / c(h·)
    backoff: np.ndarray  # (contextes,) : D · N(h·) / c(h·), la part laissée à l’ordre inférieur
    discount: float  # D


class NGramModel(nn.Module):
    """Un modèle n-grammes de Kneser-Ney interpolé ; `NGramModel.fit` le construit.

    Attributes:
        config: `vocab_size` et `block_size`, que lisent `evaluation` et `generation` ; le reste est sans objet.
        order: longueur n des suites comptées.
        discounts: la réduction D de chaque ordre, `(order,)`.
    """

    def __init__(self, levels: Sequence[Level], vocab_size: int, block_size: int = 256) -> None:
        super().__init__()
        self.config = Config(vocab_size, d_model=2, n_layers=1, n_heads=1, block_size=block_size)
        self.order = len(levels)
        self.discounts = nn.Parameter(torch.tensor([level.discount for level in levels]), requires_grad=False)
        for k, level in enumerate(levels, start=1):
            for name in ("keys", "offsets", "shares", "backoff"):
                self.register_buffer(f"{name}_{k}", torch.from_numpy(getattr(level, name)))
        alone = torch.full((vocab_size,), float(levels[0].backoff[0]) / vocab_size)
        alone[self.get_buffer("keys_1")] += self.get_buffer("shares_1")
        self.register_buffer("unigrams", alone)

    @classmethod
    def fit(
        cls, documents: Iterable[Sequence[int]], vocab_size: int, order: int = 3, *, block_size: int = 256
    ) -> NGramModel:
        """Compte les suites de 1 à `order` jetons de `documents` ; aucune n’enjambe deux documents.

        Args:
            documents: identifiants de chaque document, jetons de début et de fin compris s’ils doivent s’apprendre.
            vocab_size: nombre de jetons du vocabulaire (V).
            order: n ; 1 ne regarde aucun jeton passé, 2 un seul.
            block_size: la longueur que `config` annonce ; ce modèle-ci n’en a pas d’autre que `order`.

        Raises:
            LlamaError: aucun jeton, jeton hors du vocabulaire, `order` nul.
        """
        if order < 1:
            raise LlamaError(f"order doit valoir au moins 1 (reçu : {order}).")
        # Devant chaque document, un repère, V, qui tient lieu de tout ce qui précéderait.
        parts = [np.array([vocab_size, *ids], dtype=np.int64) for ids in documents if len(ids)]
        if not parts:
            raise LlamaError("Corpus vide : aucun jeton à compter.")
        stream = np.concatenate(parts)
        places = np.delete(np.arange(len(stream)), np.cumsum([0, *map(len, parts[:-1])]))  # le repère n’est pas prédit
        tokens = stream[places]
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise LlamaError(f"Le jeton {wrong} n’est pas parmi les {vocab_size} du vocabulaire.")
        found, counts = [], []
        current, n_contexts = np.zeros(len(stream), dtype=np.int64), 1  # la suite vide, seul contexte de l’ordre 1
        for _ in range(order):
            keys, ranks = np.unique(current[places - 1] * vocab_size + tokens, return_inverse=True)
            if found:  # de chaque suite, celle que laisse son premier jeton ôté gagne un prédécesseur
                shorter = np.empty(len(keys), dtype=np.int64)
                shorter[ranks] = current[places]
                counts.append(np.bincount(shorter, minlength=len(found[-1][0])))
            found.append((keys, n_contexts))
            current, n_contexts = np.full(len(stream), len(keys)), len(keys) + 1
            current[places] = ranks
        counts.append(np.bincount(ranks))
        levels = [_level(*pair, count, vocab_size) for pair, count in zip(found, counts, strict=True)]
        return cls(levels, vocab_size, block_size)

    @property
    def n_grams(self) -> list[int]:
        """Le nombre de suites différentes de chaque longueur, de 1 à `order`."""
        return [len(self.get_buffer(f"keys_{k}")) for k in range(1, self.order + 1)]

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Log-probabilités du jeton suivant, à chaque position.

        Args:
            ids: identifiants, `(B, T)` int64.
            mask: 0 sur le remplissage, sinon numéro du document, comme `LlamaModel.forward`.
            cache: les jetons passés ; `ids` les suit, et s’y ajoute.

        Returns:
            `(B, T, V)` float32, normalisées : leur softmax est la distribution.
        """
        (B, T), V = ids.shape, self.config.vocab_size
        if cache is not None:  # il garde les jetons eux-mêmes, à la place des clés
            mask = cache.extend(mask, T)
            stored = ids.view(B, 1, T, 1).expand(-1, -1, -1, 2).float()
            ids = cache.update(0, stored, stored)[0][:, 0, :, 0].long()  # (B, S)
            cache.length += T
        contexts = [context[:, -T:].flatten() for context in self._contexts(ids, mask)]
        probabilities = torch.zeros(B * T * V, device=ids.device)
        weight = torch.ones(B * T, device=ids.device)  # la part que les ordres plus hauts ont laissée
        for k in range(self.order, 1, -1):
            keys, offsets, shares, backoff = (
                self.get_buffer(f"{name}_{k}") for name in ("keys", "offsets", "shares", "backoff"))
            rows = (contexts[k - 1] >= 0).nonzero()[:, 0]
            known = contexts[k - 1][rows]
            start, lengths = offsets[known], offsets[known + 1] - offsets[known]
            within = torch.arange(int(lengths.sum()), device=ids.device)
            within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            ranks, row = start.repeat_interleave(lengths) + within, rows.repeat_interleave(lengths)
            probabilities.index_add_(0, row * V + keys[ranks] % V, weight[row] * shares[ranks])
            weight[rows] *= backoff[known]
        return probabilities.view(B * T, V).addr_(weight, self.unigrams).log_().view(B, T, V)

    def _contexts(self, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Pour chaque ordre, à chaque position, le numéro du contexte qui s’y termine, ou -1 s’il est inconnu."""
        V = self.config.vocab_size
        documents = torch.ones_like(ids) if mask is None else mask
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        contexts = [torch.zeros_like(ids)]
        for k in range(1, self.order):
            keys = self.get_buffer(f"keys_{k}")
            before = torch.where(first, self._beginning(k), contexts[-1].roll(1, dims=1))
            wanted = before * V + ids
            rank = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            seen = (before >= 0) & (keys[rank] == wanted)
            rank = torch.where(seen, rank, -1)
            contexts.append(torch.where(documents == 0, len(keys), rank))
        return contexts

    def _beginning(self, k: int) -> int:
        """Le numéro, à l’ordre k, du contexte qui ne contient rien : le début d’un texte."""
        return len(self.get_buffer(f"keys_{k - 1}")) if k > 1 else 0


def _level(keys: np.ndarray, n_contexts: int, counts: np.ndarray, vocab_size: int) -> Level:
    """Les parts de Kneser-Ney d’un ordre, ses comptes étant connus."""
    contexts = keys // vocab_size
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else USUAL_DISCOUNT
    totals = np.bincount(contexts, counts, minlength=n_contexts)
    kinds = np.bincount(contexts, minlength=n_contexts)
    shares = (counts - discount) / totals[contexts]
    backoff = np.where(totals > 0, discount * kinds / np.maximum(totals, 1), 1.0)  # contexte sans suite : tout au repli
    offsets = np.searchsorted(contexts, np.arange(n_contexts + 1))
    return Level(keys, offsets, shares.astype(np.float32), backoff.astype(np.float32), discount)
