"""Des textes aux tenseurs : blocs de documents, exemples de conversation, séparation de l’évaluation.

Tout exemple est un triplet `(ids, labels, mask)` de forme `(N, T)`, T = `block_size`. Les étiquettes sont
déjà décalées : `labels[:, t]` est le jeton qui suit `ids[:, t]`, et -100 n’est pas à apprendre. Le masque
vaut 0 sur le remplissage, et numérote ailleurs les documents d’un bloc : un jeton ne voit que les précédents
du même numéro. Lire les fichiers est l’affaire de `readers`, trouver les quasi-doublons celle de
`duplicates`.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .chat import as_tokenizer
from .config import Config, LlamaError
from .corpus import COURSE, corpus
from .duplicates import deduplicate, leaks, near_duplicates
from .holdout import partition, text_of
from .readers import Pair, read_pairs, read_table, read_texts

__all__ = [
    "Examples", "check_vocabulary", "deduplicate", "leaks", "load_and_prepare_french_data", "near_duplicates",
    "pack", "prepare", "question_examples", "read_pairs", "read_table", "read_texts", "split", "split_corpus",
]
IGNORED = -100
Item = TypeVar("Item")


class _Triplet(NamedTuple):
    ids: Tensor
    labels: Tensor
    mask: Tensor


class Examples(_Triplet):
    """Des exemples prêts à l’entraînement, int64 `(N, T)` chacun.

    Attributes:
        ids: jetons lus.
        labels: jetons à prédire, déjà décalés ; -100 n’est pas à apprendre.
        mask: 0 sur le remplissage, sinon numéro (> 0) du document dans le bloc.

    Raises:
        LlamaError: formes ou types différents.
    """

    __slots__ = ()

    def __new__(cls, ids: Tensor, labels: Tensor, mask: Tensor) -> Examples:
        for name, tensor in (("ids", ids), ("labels", labels), ("mask", mask)):
            if tensor.ndim != 2 or tensor.shape != ids.shape or tensor.dtype != torch.int64:
                shapes = tuple(tensor.shape), tensor.dtype
                raise LlamaError(f"Examples : {name} {shapes} doit être int64, de la forme (N, T) de ids.")
        return super().__new__(cls, ids, labels, mask)

    def select(self, indices: Any) -> Examples:
        """Les exemples de rangs `indices` (tranche, liste ou tenseur)."""
        return Examples(self.ids[indices], self.labels[indices], self.mask[indices])


def pack(
    documents: Iterable[Sequence[int]], block_size: int, *, eos_id: int | None, separate: bool = True
) -> Examples:
    """Met bout à bout des documents encodés et les coupe en blocs, sans remplissage.

    Args:
        documents: identifiants de chaque document (`Tokenizer.encode_document`).
        block_size: longueur T d’un bloc.
        eos_id: jeton ajouté à la fin de chaque document ; None n’en ajoute pas.
        separate: numéroter les documents, pour que l’attention ne passe pas de l’un à l’autre ; le premier
            jeton d’un document n’est alors pas à prédire, puisque rien de visible ne l’annonce. Sinon, un
            bloc est un seul texte.

    Returns:
        N blocs ; les derniers jetons, moins d’un bloc, sont laissés.

    Raises:
        LlamaError: corpus vide, ou plus court qu’un bloc.
    """
    _check_block_size(block_size)
    end = [] if eos_id is None else [eos_id]
    arrays = [np.array([*ids, *end], dtype=np.int32) for ids in documents if len(ids)]
    if not arrays:
        raise LlamaError("Corpus vide : aucun document à découper en blocs, ajoutez-en.")
    stream = np.concatenate(arrays)
    owner = np.repeat(np.arange(len(arrays), dtype=np.int32), [len(array) for array in arrays])
    n = (len(stream) - 1) // block_size
    if n == 0:
        raise LlamaError(
            f"Texte trop court : {len(stream)} jetons pour des blocs de {block_size}, plus un à prédire ; "
            "ajoutez du texte ou réduisez block_size."
        )

    def blocks(array: np.ndarray, start: int) -> np.ndarray:
        return array[start : start + n * block_size].reshape(n, block_size)

    ids, labels, owners = blocks(stream, 0), blocks(stream, 1), blocks(owner, 0)
    mask = np.ones_like(ids)
    if separate:
        labels = np.where(blocks(owner, 1) == owners, labels, IGNORED)
        mask = owners - owners[:, :1] + 1
    return Examples(*(torch.from_numpy(array.astype(np.int64)) for array in (ids, labels, mask)))


def question_examples(pairs: Iterable[Pair], tokenizer: Any, block_size: int) -> Examples:
    """Un exemple par question : la conversation entière est lue, la réponse seule est apprise.

    Une réponse trop longue est coupée à `block_size` ; une question qui ne laisse pas de place à sa réponse
    est omise, et leur nombre est dit sur la sortie d’erreur.

    Args:
        pairs: (question, réponse).
        tokenizer: le nôtre, ou un tokenizer de transformers qui a un gabarit de conversation.
        block_size: longueur T d’un exemple, complété à droite.

    Raises:
        LlamaError: aucune paire, ou aucune question assez courte.
    """
    _check_block_size(block_size)
    tokenizer = as_tokenizer(tokenizer)
    padding = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
    pairs, rows = list(pairs), []
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, learnt = (np.array(part, dtype=np.int32) for part in tokenizer.encode_chat(messages))
        row = np.array([[padding], [IGNORED], [0]], dtype=np.int32).repeat(block_size, axis=1)
        length = min(len(ids) - 1, block_size)
        row[0, :length] = ids[:length]
        row[1, :length] = np.where(learnt, ids, IGNORED)[1 : length + 1]
        row[2, :length] = 1
        if (row[1] != IGNORED).any():
            rows.append(row)
    if not pairs:
        raise LlamaError("Corpus vide : aucune question avec sa réponse.")
    if not rows:
        raise LlamaError(
            f"Aucune question ne laisse de place à sa réponse en {block_size} jetons : augmentez block_size."
        )
    if len(rows) < len(pairs):
        omitted = f"{len(pairs) - len(rows)} sur {len(pairs)}"
        print(f"Questions trop longues pour {block_size} jetons, omises : {omitted}.", file=sys.stderr)
    return Examples(*torch.from_numpy(np.stack(rows, axis=1).astype(np.int64)))


def split(
    documents: Sequence[Item], val_fraction: float = 0.1, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """Sépare des documents, entiers, en entraînement et évaluation ; l’ordre de chaque part est conservé.

    Raises:
        LlamaError: moins de deux documents, ou `val_fraction` hors de ]0, 1[.
    """
    _check_fraction(val_fraction)
    if len(documents) < 2:
        raise LlamaError(f"Il faut au moins deux documents pour en mettre de côté (reçu : {len(documents)}).")
    n_val = min(max(1, round(val_fraction * len(documents))), len(documents) - 1)
    held_out = set(random.Random(seed).sample(range(len(documents)), n_val))
    train = [document for i, document in enumerate(documents) if i not in held_out]
    return train, [documents[i] for i in sorted(held_out)]


def check_vocabulary(examples: Examples, config: Config) -> None:
    """Refuse des exemples dont un jeton n’est pas au vocabulaire du modèle.

    Raises:
        LlamaError: un identifiant est hors de 0…`vocab_size` - 1.
    """
    used = torch.cat([examples.ids.flatten(), examples.labels[examples.labels != IGNORED]])
    if len(used) and not 0 <= int(used.min()) <= int(used.max()) < config.vocab_size:
        wrong = int(used.max()) if used.max() >= config.vocab_size else int(used.min())
        raise LlamaError(
            f"Le jeton {wrong} n’est pas au vocabulaire du modèle ({config.vocab_size} jetons) : encodez les "
            "textes avec le tokenizer du modèle, ou donnez à Config le vocab_size du tokenizer."
        )


def load_and_prepare_french_data(
    name_or_path: str | Path,
    tokenizer: Any,
    block_size: int,
    *,
    input_key: str | None = None,
    output_key: str | None = None,
    questions: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[Examples, Examples]:
    """Du nom d’un corpus aux exemples d’entraînement et d’évaluation.

    Les textes deviennent des blocs (`pack`), les questions des conversations (`question_examples`).
    L’évaluation est tirée par documents entiers, et ce qui lui ressemble trop (`leaks`) est ôté de
    l’entraînement.

    Args:
        name_or_path: un fichier ou un dossier (`readers`) ; un nom de `sources` ; un jeu de données du Hub.
            Sans accès à `AIffl/Alpaca_french_mixtral`, les questions de droit du travail le remplacent.
        tokenizer: le nôtre, ou un tokenizer de transformers.
        block_size: longueur T des exemples.
        input_key: colonne des questions d’un fichier ; `output_key`, des réponses ; sinon les noms usuels.
        questions: d’un nom de `sources`, prendre les questions plutôt que les textes.
        val_fraction: part des documents gardée pour l’évaluation.
        seed: graine du tirage.

    Returns:
        `(entraînement, évaluation)`.

    Raises:
        LlamaError: corpus introuvable, illisible, vide ou trop court ; le message dit comment en sortir.
    """
    tokenizer = as_tokenizer(tokenizer)
    parts = split_corpus(
        str(name_or_path), val_fraction, seed, input_key=input_key, output_key=output_key, questions=questions)
    examples = []
    for name, part in zip(("entraînement", "évaluation"), parts, strict=True):
        try:
            examples.append(prepare(part, tokenizer, block_size))
        except LlamaError as error:
            raise LlamaError(f"« {name_or_path} », part d’{name}. {error}") from None
    return examples[0], examples[1]


def split_corpus(
    name: str, val_fraction: float = 0.1, seed: int = 0, **reading: Any
) -> tuple[list[str] | list[Pair], list[str] | list[Pair]]:
    """Les documents d’un corpus, à apprendre et pour l’évaluation, sans fuite de l’une à l’autre (`leaks`).

    Les textes du corpus `"cours"` ont leur propre partage, celui de `holdout`.

    Args:
        name: voir `corpus`, qui reçoit `reading`.
        val_fraction: part des documents gardée pour l’évaluation.
        seed: graine du tirage.
    """
    _check_fraction(val_fraction)
    items = corpus(name, **reading)
    if name == COURSE and isinstance(items[0], str):
        return items, [text_of(document) for document in partition().held_out]
    if len(items) == 1 and isinstance(items[0], str):
        return _cut(items[0], val_fraction)
    train, val = split(items, val_fraction, seed)
    leaked = {i for i, _, _ in leaks([_text(item) for item in train], [_text(item) for item in val])}
    return [item for i, item in enumerate(train) if i not in leaked], val


def prepare(items: Sequence[str] | Sequence[Pair], tokenizer: Any, block_size: int) -> Examples:
    """Des textes, leurs blocs (`pack`) ; des questions, leurs conversations (`question_examples`)."""
    if items and isinstance(items[0], tuple):
        return question_examples(items, tokenizer, block_size)
    return pack(map(tokenizer.encode_document, items), block_size, eos_id=tokenizer.eos_id)


def _cut(text: str, val_fraction: float) -> tuple[list[str], list[str]]:
    """Coupe un document unique, à un espace : le début s’apprend, la fin évalue."""
    found = re.search(r"\s", text[int(len(text) * (1 - val_fraction)) :])
    middle = int(len(text) * (1 - val_fraction)) + (found.start() if found else 0)
    return [text[:middle]], [text[middle:].lstrip()]


def _text(item: str | Pair) -> str:
    return item if isinstance(item, str) else "\n".join(item)


def _check_fraction(val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise LlamaError(f"val_fraction est entre 0 et 1, exclus (reçu : {val_fraction!r}).")


def _check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int) or block_size < 1:
        raise LlamaError(f"block_size doit être un entier strictement positif (reçu : {block_size!r}).")
