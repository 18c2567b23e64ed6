"""Mesurer un modèle : perplexité, bits par octet, F1 de jetons, exactitude, choix multiples classés par vraisemblance.

Chaque mesure ne dépend ni de la taille des lots ni, pour les bits par octet, du tokenizer : deux modèles de
vocabulaires différents s’y comparent. Ce module n’interprète pas : il rend des nombres, avec leur intervalle.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LlamaError
from .progress import progress_bar


class Estimate(NamedTuple):
    """Une proportion et son intervalle de confiance à 95 % (Wilson 1927), sur `n` cas."""

    value: float
    low: float
    high: float
    n: int


class MultipleChoice(NamedTuple):
    """Une question à choix multiples : `choices[answer]` est la bonne réponse."""

    question: str
    choices: list[str]
    answer: int


def proportion(successes: int, n: int) -> Estimate:
    """Proportion de succès et intervalle de Wilson à 95 %, qui reste entre 0 et 1 même sur peu de cas."""
    if n <= 0 or not 0 <= successes <= n:
        raise LlamaError(f"Proportion indéfinie : {successes} succès sur {n} cas.")
    z, p = 1.959964, successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), n)  # arrondis compris


@torch.no_grad()
def token_losses(
    model: nn.Module, sequences: Sequence[Sequence[int]], *, batch_size: int = 16, progress: bool = False
) -> list[Tensor]:
    """Pertes de chaque jeton sachant les précédents.

    Args:
        model: identifiants `(B, T)` → logits `(B, T, V)`.
        sequences: au moins deux jetons chacune, au plus `block_size` + 1.
        batch_size: séquences passées à la fois ; sans effet sur le résultat, les plus longues ensemble.
        progress: montrer une barre.

    Returns:
        Un tenseur `(longueur - 1,)` par séquence, en nats, dans l’ordre donné.
    """
    too_short = [i for i, ids in enumerate(sequences) if len(ids) < 2]
    if too_short:
        raise LlamaError(f"Séquence {too_short[0]} : il faut au moins deux jetons pour mesurer une prédiction.")
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    losses: list[Tensor] = [torch.empty(0)] * len(sequences)
    batches = range(0, len(order), batch_size)
    for start in progress_bar(batches, shown=progress, unit="lot"):
        rows = order[start:start + batch_size]
        # Le remplissage est à droite : un modèle causal ne le voit pas.
        ids = nn.utils.rnn.pad_sequence([torch.tensor(sequences[i]) for i in rows], batch_first=True).to(device)
        logits = model(ids[:, :-1]).float()  # (B, T, V)
        values = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()  # (B, T)
        for row, i in enumerate(rows):
            losses[i] = values[row, :len(sequences[i]) - 1]
    model.train(was_training)
    return losses


def windows(n: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """Fenêtres glissantes sur `n` jetons : `(début, fin, premier jeton compté)`.

    Chaque jeton sauf le premier est compté une fois, avec au moins `size - stride` jetons de contexte dès que
    le texte les offre. `windows(10, 4, 2)` → `[(0, 5, 1), (2, 7, 5), (4, 9, 7), (5, 10, 9)]`.
    """
    spans, counted = [], 1
    while counted < n:
        end = min(n, size + 1 if counted == 1 else counted + stride)
        spans.append((max(0, end - size - 1), end, counted))
        counted = end
    return spans


def total_loss(
    model: nn.Module, documents: Sequence[Sequence[int]], *, block_size: int, stride: int | None = None,
    batch_size: int = 16, progress: bool = False,
) -> tuple[float, int]:
    """Perte totale (nats) et nombre de jetons prédits, en fenêtres glissantes de `block_size` jetons."""
    spans = [
        (document[start:end], counted - start)
        for document in documents
        for start, end, counted in windows(len(document), block_size, stride or block_size // 2)
    ]
    losses = token_losses(model, [ids for ids, _ in spans], batch_size=batch_size, progress=progress)
    counted = [loss[first - 1:] for loss, (_, first) in zip(losses, spans, strict=True)]
    return float(sum(loss.double().sum() for loss in counted)), sum(len(loss) for loss in counted)


def perplexity(model: nn.Module, documents: Sequence[Sequence[int]], **options: Any) -> float:
    """Perplexité par jeton de `documents` (listes d’identifiants) ; `options` : voir `total_loss`."""
    nats, n = total_loss(model, documents, **options)
    if not n:
        raise LlamaError("Perplexité indéfinie : aucun document n’a deux jetons.")
    return math.exp(nats / n)


def bits_per_byte(model: nn.Module, tokenizer: Any, texts: Sequence[str], **options: Any) -> float:
    """Bits par octet UTF-8 de `texts`, chaque texte prédit depuis le jeton de début ; `options` : voir `total_loss`.

    L’unité est celle d’un compresseur : un modèle à 1,0 bit par octet réduirait le texte huit fois.
    """
    n_bytes = sum(len(text.encode()) for text in texts)
    if not n_bytes:
        raise LlamaError("Bits par octet indéfinis : les textes sont vides.")
    documents = [[*_start(tokenizer), *tokenizer.encode(text)] for text in texts if text]
    return total_loss(model, documents, **options)[0] / math.log(2) / n_bytes


def _start(tokenizer: Any) -> list[int]:
    """Ce qui précède tout texte : le jeton de début, ou, comme GPT-2, celui de fin ; rien s’il n’y en a aucun."""
    return [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]


def normalize(text: str) -> list[str]:
    """Les mots d’une réponse, en minuscules, sans ponctuation ni articles : « L’employeur ! » → `["employeur"]`."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    words = re.findall(r"\w+", re.sub(r"\b(l|d|qu|n|s|c|j|m|t)'", " ", text))
    return [word for word in words if word not in {"le", "la", "les", "un", "une", "des", "du", "de"}]


def exact_match(prediction: str, reference: str) -> float:
    """1 si les deux réponses ont les mêmes mots dans le même ordre (voir `normalize`), 0 sinon."""
    return float(normalize(prediction) == normalize(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 des mots communs (Rajpurkar et al. 2016, §6.1), entre 0 et 1 ; deux réponses vides valent 1."""
    predicted, expected = Counter(normalize(prediction)), Counter(normalize(reference))
    common = (predicted & expected).total()
    if not predicted and not expected:
        return 1.0
    return 2 * common / (predicted.total() + expected.total())


def classification(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Any]:
    """Exactitude (avec intervalle) et F1 macro : la moyenne, sur les classes de `references`, de leur F1."""
    if len(predictions) != len(references) or not references:
        raise LlamaError(f"{len(predictions)} prédictions pour {len(references)} références : il en faut autant.")
    pairs = list(zip(predictions, references, strict=True))
    scores = []
    for label in sorted(set(references), key=str):
        true_positives = sum(p == r == label for p, r in pairs)
        scores.append(2 * true_positives / sum((p == label) + (r == label) for p, r in pairs))
    return {"accuracy": proportion(sum(p == r for p, r in pairs), len(pairs)), "f1": sum(scores) / len(scores)}


def rank_choices(
    model: nn.Module, tokenizer: Any, items: Sequence[MultipleChoice], *,
    template: str = "Question : {question}\nRéponse : ", batch_size: int = 16, progress: bool = False,
) -> tuple[Estimate, list[int]]:
    """Choix multiples par vraisemblance : le choix retenu a le moins de nats par octet après la question.

    Diviser par les octets, non par les jetons, ne favorise ni les réponses longues ni un tokenizer.

    Returns:
        L’exactitude avec son intervalle, et l’indice choisi pour chaque question.

    Raises:
        LlamaError: une question n’a pas de choix, un choix est vide, ou la bonne réponse n’est pas parmi eux.
    """
    sequences, prompts, lengths = [], [], []
    for number, item in enumerate(items, start=1):
        if not 0 <= item.answer < len(item.choices) or not all(item.choices):
            raise LlamaError(f"Question {number} : choix vide, ou bonne réponse absente des choix.")
        prompt = [*_start(tokenizer), *tokenizer.encode(template.format(question=item.question))]
        for choice in item.choices:
            sequences.append([*prompt, *tokenizer.encode(choice)])
            prompts.append(len(prompt))
            lengths.append(len(choice.encode()))
    losses = token_losses(model, sequences, batch_size=batch_size, progress=progress)
    scores = [float(loss[p - 1:].sum()) / n for loss, p, n in zip(losses, prompts, lengths, strict=True)]
    chosen, position = [], 0
    for item in items:
        own = scores[position:position + len(item.choices)]
        chosen.append(own.index(min(own)))
        position += len(item.choices)
    right = sum(guess == item.answer for guess, item in zip(chosen, items, strict=True))
    return proportion(right, len(items)), chosen
