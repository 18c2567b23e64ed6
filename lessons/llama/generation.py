"""Générer : un jeton à la fois, tiré de la distribution que donne le modèle, sur un cache de clés et de valeurs.

`probabilities` transforme des logits en distribution (température, top-k, top-p, min-p, pénalité de répétition) ;
`generate` et `stream` bouclent. Chaque séquence d’un lot a son propre hasard : ce qu’elle donne ne dépend pas de ses
voisines. Ce module ne connaît que des identifiants, sauf pour les textes d’arrêt, qu’il décode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import LlamaError
from .model import KVCache, LlamaModel

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """Comment choisir le jeton suivant.

    Args:
        temperature: divise les logits ; 0 prend toujours le plus probable (décodage glouton).
        top_k: ne garde que les k jetons les plus probables (Fan et al. 2018, §5.1).
        top_p: garde le plus petit ensemble dont la masse atteint p (Holtzman et al. 2020, §3.1).
        min_p: écarte les jetons sous `min_p` fois la probabilité du premier (Nguyen et al. 2024, §3).
        repetition_penalty: divise les logits positifs, et multiplie les négatifs, des jetons déjà vus
            (Keskar et al. 2019, §4.1) ; 1 ne fait rien.

    Raises:
        LlamaError: un réglage est hors de son domaine.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, valid, domain in (
            ("temperature", self.temperature >= 0, "positive ou nulle"),
            ("top_k", self.top_k is None or self.top_k >= 1, "au moins 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "entre 0 (exclu) et 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "entre 0 et 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "strictement positive"),
        ):
            if not valid:
                raise LlamaError(f"{name} = {getattr(self, name)} : la valeur attendue est {domain}.")


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """La distribution dont le jeton suivant sera tiré.

    Args:
        logits: `(B, V)`.
        sampling: les filtres, appliqués dans l’ordre de transformers : répétition, température, top-k, top-p, min-p.
        seen: `(B, V)` booléens, les jetons déjà présents dans chaque séquence.

    Returns:
        `(B, V)`, de somme 1 ; à température nulle, toute la masse est sur le plus probable.
    """
    logits = _penalized(logits.float(), sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        threshold = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(1).cumsum(1)
        # Un jeton sort si ceux d’avant lui suffisent ; le premier reste toujours.
        outside = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=1) >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), -torch.inf)
    if sampling.min_p is not None:
        shares = logits.softmax(1)
        logits = logits.masked_fill(shares < sampling.min_p * shares.max(1, keepdim=True).values, -torch.inf)
    return logits.softmax(1)


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 128, seed: int = 0,
    eos_id: int | None = None, stop: Sequence[str] = (), tokenizer: Any = None, **sampling: Any,
) -> list[list[int]]:
    """Continue chaque séquence de `prompts`, toutes à la fois.

    Args:
        model: un `LlamaModel`.
        prompts: suites d’identifiants, de longueurs quelconques.
        max_new_tokens: jetons à écrire au plus.
        seed: graine ; la séquence i tire avec `seed + i`.
        eos_id: jeton qui arrête une séquence ; il n’est pas rendu.
        stop: textes qui arrêtent une séquence ; coupés, avec ce qui suit, au jeton où ils commencent.
        tokenizer: pour décoder, si `stop` n’est pas vide.
        **sampling: champs de `Sampling`.

    Returns:
        Les seuls jetons nouveaux de chaque séquence.

    Raises:
        LlamaError: séquence vide, réglage impossible, `stop` sans tokenizer.
    """
    if stop and tokenizer is None:
        raise LlamaError("Les textes d’arrêt (stop) demandent un tokenizer, pour décoder.")
    outputs: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    for tokens in _steps(model, prompts, max_new_tokens, Sampling(**sampling), seed):
        for row, token in enumerate(tokens):
            if stopped[row]:
                continue
            if token == eos_id:
                stopped[row] = True
                continue
            outputs[row].append(token)
            cut = _stop_position(tokenizer, outputs[row], stop) if stop else None
            if cut is not None:
                outputs[row], stopped[row] = outputs[row][:cut], True
        if all(stopped):
            break
    return outputs


def stream(
    model: nn.Module, prompt: Sequence[int], tokenizer: Any, *, max_new_tokens: int = 128, seed: int = 0,
    eos_id: int | None = None, stop: Sequence[str] = (), **sampling: Any,
) -> Iterator[str]:
    """Continue `prompt` en rendant le texte par morceaux, dès qu’ils sont sûrs.

    Un caractère dont il manque des octets, ou le début possible d’un texte d’arrêt, attend la suite. Mis bout à bout,
    les morceaux sont le texte que donnerait `generate`, coupé juste avant le premier texte d’arrêt.
    """
    tokens: list[int] = []
    sent = 0
    for (token,) in _steps(model, [prompt], max_new_tokens, Sampling(**sampling), seed):
        if token == eos_id:
            break
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found = [position for position in (text.find(s) for s in stop) if position >= 0]
        safe = min(found) if found else len(text.rstrip(REPLACEMENT)) - _held_back(text, stop)
        if safe > sent:
            yield text[sent:safe]
            sent = safe
        if found:
            return
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if text[sent:]:
        yield text[sent:]


@torch.inference_mode()
def _steps(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[list[int]]:
    """À chaque pas, le jeton suivant de chaque séquence."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise LlamaError("Rien à continuer : chaque invite doit contenir au moins un jeton.")
    if max_new_tokens < 1:
        raise LlamaError(f"max_new_tokens doit valoir au moins 1 (reçu : {max_new_tokens}).")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    # Remplissage à gauche : le dernier jeton de chaque invite est dans la dernière colonne.
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt):] = torch.tensor(prompt)
        mask[row, longest - len(prompt):] = 1
        if seen is not None:
            seen[row, ids[row, longest - len(prompt):]] = True
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, device=device, dtype=_dtype(model))
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    padding = mask if bool((mask == 0).any()) else None
    try:
        for _ in range(max_new_tokens):
            logits = _next_logits(model, ids, padding, cache)  # (B, V)
            if sampling.temperature == 0:
                ids = _penalized(logits, sampling.repetition_penalty, seen).argmax(1, keepdim=True)
            else:
                shares = probabilities(logits, sampling, seen)
                drawn = [torch.multinomial(p.cpu(), 1, generator=g) for p, g in zip(shares, generators, strict=True)]
                ids = torch.stack(drawn).to(device)  # (B, 1)
            if seen is not None:
                seen.scatter_(1, ids, True)
            padding = torch.ones_like(ids) if padding is not None else None
            yield ids[:, 0].tolist()
    finally:
        model.train(was_training)


def _penalized(logits: Tensor, penalty: float, seen: Tensor | None) -> Tensor:
    if penalty == 1.0 or seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _next_logits(model: nn.Module, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
    """Les logits qui suivent le dernier jeton, `(B, V)` : sur une longue invite, ceux des autres coûteraient cher."""
    if isinstance(model, LlamaModel):
        return model.logits(model.hidden_states(ids, mask, cache)[:, -1])
    return model(ids, mask=mask, cache=cache)[:, -1]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _stop_position(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> int | None:
    """Nombre de jetons à garder si un texte d’arrêt vient d’apparaître, sinon None."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if not any(s in text for s in stop):
        return None
    kept = len(tokens)
    while kept and any(s in tokenizer.decode(tokens[:kept], skip_special_tokens=True) for s in stop):
        kept -= 1
    # Le texte d’arrêt peut avoir commencé plusieurs jetons plus tôt.
    start = min(position for position in (text.find(s) for s in stop) if position >= 0)
    while kept and len(tokenizer.decode(tokens[:kept], skip_special_tokens=True)) > start:
        kept -= 1
    return kept


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Longueur de la plus longue fin de `text` qui commence un texte d’arrêt."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
