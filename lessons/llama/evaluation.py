"""Mesurer un modèle : perplexité, bits par octet, F1 de jetons, exactitude, choix multiples classés par vraisemblance.

Chaque mesure ne dépend ni de la taille des lots ni, pour les bits par octet, du tokenizer : deux modèles de
vocabulaires différents s’y comparent. Ce module n’interprète pas : il rend des nombres, avec leur intervalle.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LlamaError
from .progress import progress_bar

TEMPLATE = "Question : {question}\nRéponse : "
"""L’invite d’une question, pour un modèle qui n’a pas appris à converser."""


class Estimate(NamedTuple):
    """Une proportion et son intervalle de confiance à 95 %, sur `n` cas."""

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
    """Proportion de succès et intervalle de Wilson à 95 %, qui reste entre 0 et 1 même sur peu de cas."""
    if n <= 0 or not 0 <= successes <= n:
        raise LlamaError(f"Proportion indéfinie : {successes} succès sur {n} cas.")
    z, p = 1.959964, successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), n)  # arrondis compris


def grouped_proportion(successes: Sequence[bool], group_size: int, seed: int = 0) -> Estimate:
    """Proportion de succès de cas qui vont par groupes, et intervalle à 95 % par rééchantillonnage des groupes.

    Les cas d’un groupe ne sont pas indépendants : l’intervalle de Wilson, qui les compterait un à un, serait faux.
    On tire donc 10 000 fois autant de groupes qu’il y en a, avec remise (Efron 1979), et l’intervalle va du 2,5e au
    97,5e centile des proportions obtenues. Sur moins d’une dizaine de groupes, il est trop étroit.

    Args:
        successes: groupe après groupe.
        group_size: cas d’un groupe.
        seed: graine des tirages.
    """
    if not successes or len(successes) % group_size:
        raise LlamaError(f"{len(successes)} cas ne font pas des groupes de {group_size}.")
    means = np.asarray(successes, dtype=float).reshape(-1, group_size).mean(1)
    drawn = np.random.default_rng(seed).integers(len(means), size=(10_000, len(means)))
    low, high = np.quantile(means[drawn].mean(1), [0.025, 0.975])
    return Estimate(float(means.mean()), float(low), float(high), len(successes))


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


def answer_nats(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[Sequence[int], str]], *, batch_size: int = 16,
    progress: bool = False,
) -> list[float]:
    """Nats de chaque réponse sachant son invite : combien elle surprend le modèle.

    Args:
        model: identifiants `(B, T)` → logits `(B, T, V)` ; ce qui dépasse son `block_size` passe en fenêtres.
        tokenizer: encode les réponses.
        pairs: (identifiants de l’invite, réponse) ; deux paires égales ne se calculent qu’une fois.
        batch_size: séquences à la fois ; sans effet sur le résultat.
        progress: montrer une barre.
    """
    size = model.config.block_size
    keys = [(tuple(prompt), answer) for prompt, answer in pairs]
    spans: dict[tuple[tuple[int, ...], str], list[tuple[Sequence[int], int]]] = {}
    for prompt, answer in dict.fromkeys(keys):
        ids = [*prompt, *tokenizer.encode(answer)]
        cuts = windows(len(ids), size, max(1, size // 2))
        spans[prompt, answer] = [(ids[a:b], max(first, len(prompt)) - a) for a, b, first in cuts if b > len(prompt)]
    sequences = [ids for own in spans.values() for ids, _ in own]
    losses = iter(token_losses(model, sequences, batch_size=batch_size, progress=progress))
    nats = {key: sum(float(next(losses)[first - 1:].sum()) for _, first in own) for key, own in spans.items()}
    return [nats[key] for key in keys]


def choice_nats(
    model: nn.Module, tokenizer: Any, items: Sequence[MultipleChoice], *,
    ask: Callable[[str], list[int]] | None = None, batch_size: int = 16, progress: bool = False,
) -> list[list[float]]:
    """Nats de chaque choix de chaque question ; voir `answer_nats`.

    Args:
        ask: question → identifiants de l’invite ; par défaut `TEMPLATE`, après le jeton de début.

    Raises:
        LlamaError: une question n’a pas de choix, un choix est vide, ou la bonne réponse n’est pas parmi eux.
    """
    for number, item in enumerate(items, start=1):
        if not 0 <= item.answer < len(item.choices) or not all(item.choices):
            raise LlamaError(f"Question {number} : choix vide, ou bonne réponse absente des choix.")
    ask = ask or prompter(tokenizer)
    pairs = [(ask(item.question), choice) for item in items for choice in item.choices]
    nats = iter(answer_nats(model, tokenizer, pairs, batch_size=batch_size, progress=progress))
    return [[next(nats) for _ in item.choices] for item in items]


def choose(
    items: Sequence[MultipleChoice], nats: Sequence[Sequence[float]], alone: Sequence[Sequence[float]] | None = None
) -> list[int]:
    """L’indice retenu pour chaque question : le choix qui a le moins de nats par octet.

    Diviser par les octets, non par les jetons, ne favorise ni les réponses longues ni un tokenizer.

    Args:
        items: les questions.
        nats: ceux de chaque choix sachant la question (`choice_nats`).
        alone: ceux de chaque choix sans la question, qui sont alors ôtés. Reste ce que la question lui apporte
            (Holtzman et al. 2021, §3) : un choix banal, probable après n’importe quoi, n’est plus favorisé.
    """
    chosen = []
    for item, own, prior in zip(items, nats, alone or [[0.0] * len(item.choices) for item in items], strict=True):
        scores = [(n - p) / len(c.encode()) for n, p, c in zip(own, prior, item.choices, strict=True)]
        chosen.append(scores.index(min(scores)))
    return chosen


def prompter(tokenizer: Any, template: str = TEMPLATE) -> Callable[[str], list[int]]:
    """De quoi poser une question à un modèle qui continue des textes : `template`, après le jeton de début."""
    return lambda question: [*_start(tokenizer), *tokenizer.encode(template.format(question=question))]


def rank_choices(
    model: nn.Module, tokenizer: Any, items: Sequence[MultipleChoice], *, template: str = TEMPLATE,
    ask: Callable[[str], list[int]] | None = None, calibrated: bool = False, batch_size: int = 16,
    progress: bool = False,
) -> tuple[Estimate, list[int]]:
    """Choix multiples par vraisemblance ; voir `choose`.

    Args:
        model: voir `answer_nats`.
        tokenizer: encode l’invite et les choix.
        items: les questions.
        template: l’invite d’une question, `{question}` à sa place.
        ask: question → identifiants de l’invite, si elle n’est pas `template` : une conversation, par exemple.
        calibrated: ôter des nats de chaque choix ceux qu’il a après une question vide.
        batch_size: séquences à la fois ; sans effet sur le résultat.
        progress: montrer une barre.

    Returns:
        L’exactitude avec son intervalle, et l’indice choisi pour chaque question.

    Raises:
        LlamaError: une question n’a pas de choix, un choix est vide, ou la bonne réponse n’est pas parmi eux.
    """
    ask = ask or prompter(tokenizer, template)
    options = {"batch_size": batch_size, "progress": progress}
    nats = choice_nats(model, tokenizer, items, ask=ask, **options)
    alone = choice_nats(model, tokenizer, items, ask=lambda _: ask(""), **options) if calibrated else None
    chosen = choose(items, nats, alone)
    right = sum(guess == item.answer for guess, item in zip(chosen, items, strict=True))
    return proportion(right, len(items)), chosen
