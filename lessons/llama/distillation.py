"""La distillation : un petit modèle, l’élève, apprend d’un grand, le maître.

Trois morceaux, qui se combinent : imiter les probabilités du maître (`soft_target_loss`, Hinton et al. 2015),
apprendre les textes qu’il écrit (`teacher_answers`, Kim et Rush 2016), partir de quelques-unes de ses couches
(`student_from`, Sanh et al. 2019). La boucle reste celle de `training` : seuls changent la perte, les données
et le départ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chat import as_tokenizer
from .config import LlamaError
from .data import Examples
from .generation import generate
from .lora import adapter_names
from .model import LlamaModel
from .progress import progress_bar

# Nombres par bloc de la perte : assez pour occuper le processeur, assez peu pour ne pas compter en mémoire.
BLOCK = 1 << 20


def soft_target_loss(
    student: nn.Module, batch: Examples, *, teacher: nn.Module, temperature: float = 2.0, alpha: float = 0.5
) -> Tensor:
    """Somme, en nats, sur les jetons à apprendre, de α T² KL(p_maître ‖ p_élève) + (1 − α) entropie croisée.

    `functools.partial(soft_target_loss, teacher=maître)` est une perte pour `training.train`.

    Args:
        student: l’élève.
        batch: exemples `(B, T)`.
        teacher: le maître, de même vocabulaire ; il n’est pas entraîné.
        temperature: T, qui divise tous les logits ; T² rend au gradient sa taille (Hinton et al. 2015, §2).
        alpha: part du maître ; 0 est la perte ordinaire.

    Raises:
        LlamaError: vocabulaires différents, température ou α hors de leur domaine.
    """
    if not 0 < temperature < float("inf"):
        raise LlamaError(f"La température est un nombre strictement positif (reçu : {temperature!r}).")
    if not 0 <= alpha <= 1:
        raise LlamaError(f"alpha, la part du maître, est entre 0 et 1 (reçu : {alpha!r}).")
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise LlamaError(
            f"L’élève a {sizes[0]} jetons et le maître {sizes[1]} : leurs probabilités ne se comparent pas ; "
            "distillez plutôt par les réponses du maître (teacher_answers)."
        )
    mask = None if bool((batch.mask == 1).all()) else batch.mask
    with torch.no_grad():
        target = teacher(batch.ids, mask=mask).flatten(0, 1)  # (B·T, V)
    logits = student(batch.ids, mask=mask).flatten(0, 1)  # (B·T, V)
    return _ByBlocks.apply(logits, target.to(logits.dtype), batch.labels.flatten(), temperature, alpha)


def soft_targets(logits: Tensor, target: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """La formule, sur les logits `(N, V)` de l’élève et du maître et les étiquettes `(N,)`."""
    learnt = labels != -100
    log_q = F.log_softmax(logits[learnt].float() / temperature, dim=-1)
    log_p = F.log_softmax(target[learnt].float() / temperature, dim=-1)
    soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    hard = F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="sum")
    return alpha * temperature**2 * soft + (1 - alpha) * hard


class _ByBlocks(torch.autograd.Function):
    """`soft_targets`, par blocs de jetons ; le gradient, calculé à l’aller, remplace les logits du maître.

    D’un trait, la formule garderait bien d’autres tenseurs de la taille des logits, et serait plus lente.
    """

    @staticmethod
    def forward(
        ctx, logits: Tensor, target: Tensor, labels: Tensor, temperature: float, alpha: float
    ) -> Tensor:
        rows = max(1, BLOCK // logits.shape[1])
        total = torch.zeros((), device=logits.device)
        for z, t, y in zip(logits.split(rows), target.split(rows), labels.split(rows), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                z = z.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = soft_targets(z, t, y, temperature, alpha)
            total += loss.detach()
            if ctx.needs_input_grad[0]:
                t.copy_(*torch.autograd.grad(loss, z))
        ctx.save_for_backward(target)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad), None, None, None, None


def teacher_answers(
    teacher: nn.Module, tokenizer: Any, questions: Sequence[str], *, max_new_tokens: int = 128,
    batch_size: int = 16, generate: Callable[..., list[list[int]]] = generate, progress: bool = True,
    **sampling: Any,
) -> list[tuple[str, str]]:
    """Distillation par séquences (Kim et Rush 2016, §3.2) : le maître répond, l’élève apprendra ses réponses.

    Les paires vont à `data.question_examples`. Une réponse vide, ou que `max_new_tokens` coupe, est omise :
    elle apprendrait à se taire, ou à s’arrêter au milieu d’une phrase.

    Args:
        teacher: le maître ; son vocabulaire peut n’être pas celui de l’élève.
        tokenizer: le sien.
        questions: textes.
        max_new_tokens: jetons d’une réponse, au plus.
        batch_size: questions posées à la fois.
        generate: comme `generation.generate`.
        progress: montrer la barre de progression.
        **sampling: réglages de `generate` ; par défaut le maître prend toujours le jeton le plus probable.

    Returns:
        Les paires (question, réponse).

    Raises:
        LlamaError: aucune question, ou aucune réponse achevée.
    """
    if isinstance(questions, str) or not questions:
        raise LlamaError("questions est une liste non vide de textes.")
    if batch_size < 1:
        raise LlamaError(f"batch_size est un entier strictement positif (reçu : {batch_size!r}).")
    tokenizer = as_tokenizer(tokenizer)
    pairs = []
    for start in progress_bar(range(0, len(questions), batch_size), shown=progress, unit="lot"):
        asked = questions[start:start + batch_size]
        prompts = [
            tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True)[0]
            for question in asked
        ]
        limits = {"max_new_tokens": max_new_tokens, "eos_id": tokenizer.eos_id}
        for question, ids in zip(asked, generate(teacher, prompts, **limits, **sampling), strict=True):
            answer = tokenizer.decode(ids).strip()
            if answer and len(ids) < max_new_tokens:
                pairs.append((question, answer))
    if not pairs:
        raise LlamaError(
            f"Le maître n’achève aucune réponse en {max_new_tokens} jetons : augmentez max_new_tokens, ou "
            "affinez-le d’abord."
        )
    if len(pairs) < len(questions):
        omitted = f"{len(questions) - len(pairs)} réponses sur {len(questions)}"
        print(f"{omitted}, vides ou coupées, omises.", file=sys.stderr)
    return pairs


def student_from(teacher: LlamaModel, layers: int | Iterable[int]) -> LlamaModel:
    """Un élève taillé dans le maître : une copie, moins quelques couches (Sanh et al. 2019, §3).

    Args:
        teacher: le maître, qui n’est pas modifié.
        layers: les couches gardées, comptées de 0 ; ou leur nombre, de la première à la dernière.

    Raises:
        LlamaError: couche absente du maître, aucune couche, maître qui porte des adaptateurs.
    """
    config = teacher.config
    if isinstance(layers, int):
        n, last = layers, config.n_layers - 1
        if not 1 <= n <= config.n_layers:
            raise LlamaError(f"L’élève garde entre 1 et {config.n_layers} couches du maître (reçu : {n}).")
        layers = [round(i * last / max(1, n - 1)) for i in range(n)]
    kept = list(layers)
    outside = [i for i in kept if not 0 <= i < config.n_layers]
    if outside or not kept:
        last = config.n_layers - 1
        raise LlamaError(f"Couches à garder : {outside or 'aucune'} ; le maître a les couches 0 à {last}.")
    if adapter_names(teacher):
        raise LlamaError("Le maître porte des adaptateurs : repliez-en un (fold), ôtez-les (remove_lora).")

    def renumbered(chosen: Sequence[int]) -> tuple[int, ...]:
        return tuple(new for new, old in enumerate(kept) if old in chosen)

    moe_layers, nope_layers = renumbered(config.moe_layers), renumbered(config.nope_layers)
    student = LlamaModel(config.replace(n_layers=len(kept), moe_layers=moe_layers, nope_layers=nope_layers))
    for name, part in student.named_children():
        if name == "layers":
            for layer, old in zip(part, kept, strict=True):
                layer.load_state_dict(teacher.layers[old].state_dict())
        else:
            part.load_state_dict(getattr(teacher, name).state_dict())
    reference = next(teacher.parameters())
    return student.to(reference.device, reference.dtype)
