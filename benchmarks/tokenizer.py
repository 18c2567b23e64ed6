"""L’entraînement d’un BPE sur 5 Mo de français, contre l’algorithme du manuel et contre `tokenizers`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import regex
import tokenizers
from measure import Measure, Report, french, main, race

from llama import holdout
from llama.bpe import PATTERN, apply_merges, isolated, learn_merges, merges_by_recounting
from llama.tokenization import BPETokenizer

RECOUNTED = 3
"""Fusions que l’algorithme du manuel fait vraiment, au début et à la fin ; recompter tout prendrait des heures."""


def text(n_bytes: int) -> list[str]:
    """Les premières fiches du corpus du cours, `n_bytes` octets en tout."""
    documents, total = [], 0
    for document in holdout.partition().train:
        if total >= n_bytes:
            break
        documents.append(document.text)
        total += len(document.text.encode())
    return documents


def ours(documents: list[str], vocab_size: int) -> Callable[[], None]:
    """L’entraînement de `llama`."""
    return lambda: BPETokenizer.train(documents, vocab_size, ())


def theirs(documents: list[str], vocab_size: int) -> Callable[[], None]:
    """Celui de la bibliothèque `tokenizers`, écrite en Rust, au même prédécoupage."""

    def run() -> None:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_])
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(documents, trainer)

    return run


def textbook_seconds(documents: list[str], vocab_size: int) -> float:
    """Le temps de l’algorithme qui recompte toutes les paires à chaque fusion, extrapolé.

    Les mots raccourcissent de fusion en fusion, et le temps avec eux : on le mesure sur les mots de départ et sur
    ceux de la fin, et l’on prend la moyenne.
    """
    pattern = regex.compile(PATTERN)
    start = Counter(tuple(piece.encode()) for document in documents for piece in isolated(pattern, document))
    pairs = learn_merges(start, vocab_size - 256, 256)
    learnt = {pair: (rank, 256 + rank) for rank, pair in enumerate(pairs)}
    end: Counter[tuple[int, ...]] = Counter()
    for word, n in start.items():
        end[tuple(apply_merges(list(word), learnt))] += n
    one = sum(_seconds(words, vocab_size) for words in (start, end)) / 2
    return one * (vocab_size - 256)


def _seconds(words: Mapping[tuple[int, ...], int], first: int) -> float:
    start = time.perf_counter()
    merges_by_recounting(words, RECOUNTED, first)
    return (time.perf_counter() - start) / RECOUNTED


def measure(n_bytes: int = 5_000_000, vocab_size: int = 4096, repeats: int = 2, processes: bool = True) -> Report:
    """4 096 jetons."""
    documents = text(n_bytes)
    contenders = {"llama": partial(ours, documents, vocab_size), "tokenizers": partial(theirs, documents, vocab_size)}
    times, _ = race(contenders, repeats, processes=processes)
    textbook = [textbook_seconds(documents, vocab_size)] * repeats
    cost = {"smaller_is_better": True}
    return Report(f"BPE de {french(vocab_size)} jetons sur {french(n_bytes / 1e6)} Mo", [
        Measure("contre le manuel", "s", times["llama"], textbook, 50.0, **cost),
        Measure("contre 20 s, un cœur", "s", times["llama"], [20.0] * repeats, 1.0, **cost),
        Measure("contre tokenizers, tous les cœurs", "s", times["llama"], times["tokenizers"], **cost),
    ], [f"Manuel : extrapolé de {2 * RECOUNTED} fusions, au début et à la fin."])


if __name__ == "__main__":
    main(measure)
