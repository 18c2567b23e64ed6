"""Les quasi-doublons d’un corpus : les trouver (MinHash et LSH), les ôter, repérer les fuites.

Deux textes se ressemblent par l’indice de Jaccard de leurs suites de `n` mots : la part commune sur
l’ensemble. Le comparer pour toutes les paires est hors de portée ; MinHash (Broder 1997) en tire des
signatures, et le hachage par bandes (Indyk et Motwani 1998) n’en garde que les paires candidates, dont
l’indice est ensuite calculé exactement.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from .config import LlamaError
from .progress import progress_bar

N_HASHES = 128
RECALL = 0.99
"""Probabilité de retenir une paire dont l’indice est juste au seuil ; au-dessus, elle tend vite vers 1."""

Duplicate = tuple[int, int, float]


def near_duplicates(texts: Sequence[str], n: int = 5, threshold: float = 0.5) -> list[Duplicate]:
    """Les paires de textes qui se ressemblent ; le résultat ne dépend que des textes.

    Args:
        texts: N documents.
        n: longueur des suites de mots ; un texte plus court est une seule suite, un texte sans mot n’a pas de
            double.
        threshold: indice de Jaccard minimal, dans ]0, 1].

    Returns:
        `(i, j, indice)` avec i < j, dans l’ordre de i puis de j.
    """
    if not 0 < threshold <= 1 or n < 1:
        raise LlamaError(f"threshold ({threshold}) est dans ]0, 1] et n ({n}) au moins 1.")
    sets = _shingles(texts, n)
    found = []
    for i, j in progress_bar(_candidates(sets, threshold), desc="Paires candidates", unit="paire", delay=2):
        sizes = len(sets[i]), len(sets[j])
        if min(sizes) < threshold * max(sizes):
            continue
        common = len(np.intersect1d(sets[i], sets[j], assume_unique=True))
        jaccard = common / (sum(sizes) - common)
        if jaccard >= threshold:
            found.append((i, j, jaccard))
    return found


def deduplicate(texts: Sequence[str], n: int = 5, threshold: float = 0.5) -> list[int]:
    """Les rangs des textes à garder : chacun, sauf s’il ressemble à un texte gardé qui le précède."""
    removed: set[int] = set()
    for i, j, _ in near_duplicates(texts, n, threshold):
        if i not in removed:
            removed.add(j)
    return [i for i in range(len(texts)) if i not in removed]


def leaks(train: Sequence[str], val: Sequence[str], n: int = 5, threshold: float = 0.5) -> list[Duplicate]:
    """Les fuites : `(i, j, indice)` où `train[i]` ressemble à `val[j]`."""
    pairs = near_duplicates([*train, *val], n, threshold)
    return [(i, j - len(train), jaccard) for i, j, jaccard in pairs if i < len(train) <= j]


def _shingles(texts: Sequence[str], n: int) -> list[np.ndarray]:
    """L’ensemble des suites de `n` mots de chaque texte, en empreintes de 64 bits, triées, uint64 `(S,)`."""
    codes: dict[str, int] = {}
    sets = []
    for text in progress_bar(texts, desc="Suites de mots", unit="texte", delay=2):
        words = re.findall(r"\w+", text.lower())
        for word in words:
            if word not in codes:
                digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
                codes[word] = int.from_bytes(digest)
        hashes = np.fromiter((codes[word] for word in words), dtype=np.uint64, count=len(words))
        length = min(n, len(words))
        rolling = np.zeros(len(words) - length + 1 if words else 0, dtype=np.uint64)
        for k in range(length):
            rolling = rolling * np.uint64(0x9E3779B97F4A7C15) + hashes[k : k + len(rolling)]
        sets.append(np.unique(rolling))
    return sets


def _candidates(sets: list[np.ndarray], threshold: float) -> list[tuple[int, int]]:
    """Les paires dont une bande de signature coïncide, triées."""
    rows = np.array([i for i, shingles in enumerate(sets) if len(shingles)], dtype=np.int64)
    if len(rows) < 2:
        return []
    flat = np.concatenate([sets[i] for i in rows])
    starts = np.cumsum([0, *(len(sets[i]) for i in rows[:-1])])
    width = _band_width(threshold)
    random = np.random.default_rng(0)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for _ in progress_bar(range(N_HASHES // width), desc="Bandes", unit="bande", delay=2):
        band = np.zeros(len(rows), dtype=np.uint64)
        for factor, shift in random.integers(1, 2**63, size=(width, 2), dtype=np.uint64):
            mixed = (flat ^ shift) * (factor | np.uint64(1))
            minima = np.minimum.reduceat(mixed ^ (mixed >> np.uint64(32)), starts)
            band = (band ^ minima) * np.uint64(0x9E3779B97F4A7C15)
        order = np.argsort(band, kind="stable")
        edges = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, edges):
            if len(group) > 1:
                left, right = np.triu_indices(len(group), 1)
                pairs.append(np.sort(rows[np.stack([group[left], group[right]], axis=1)], axis=1))
    return [(int(i), int(j)) for i, j in np.unique(np.concatenate(pairs), axis=0)]


def _band_width(threshold: float) -> int:
    """Le plus de lignes par bande qui retienne une paire au seuil avec la probabilité `RECALL`.

    Deux signatures coïncident sur une ligne avec la probabilité J ; sur une bande de r lignes, J^r ; sur une
    bande au moins parmi b, 1 - (1 - J^r)^b.
    """
    widths = range(1, N_HASHES + 1)
    return max((r for r in widths if 1 - (1 - threshold**r) ** (N_HASHES // r) >= RECALL), default=1)
