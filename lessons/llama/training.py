"""La boucle d’entraînement, la seule du cours.

Préentraînement, affinage, LoRA et distillation n’en diffèrent que par la perte et par les paramètres entraînés.
Elle tient en une idée : la perte d’un pas est la somme des pertes des jetons du lot global, divisée par leur
nombre. Découper le lot, en micro-lots ou entre processus, ne change donc rien que l’ordre des additions.
L’ordre des données ne dépend que de la graine et du pas : une reprise retrouve la suite exacte, bit pour bit sur la
même machine avec autant de fils et de processus, aux arrondis près avec un autre nombre de processus (une perte qui
tire au hasard, elle, change alors de tirages). Ce qui passe d’un processus à l’autre est dans `distributed`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, distributed, kernels
from .config import LlamaError, TrainingConfig
from .data import Examples, check_vocabulary
from .history import History
from .progress import progress_bar

Loss = Callable[[nn.Module, Examples], Tensor]


def next_token_loss(model: nn.Module, batch: Examples) -> Tensor:
    """Somme, en nats, des entropies croisées des jetons à apprendre (ceux dont l’étiquette n’est pas -100)."""
    mask = None if bool((batch.mask == 1).all()) else batch.mask
    if type(getattr(model, "lm_head", None)) in (nn.Linear, type(None)) and hasattr(model, "hidden_states"):
        hidden = model.hidden_states(batch.ids, mask=mask)  # (B, T, d_model)
        return kernels.linear_cross_entropy(hidden.flatten(0, 1), model.head, batch.labels.flatten())
    logits = model(batch.ids, mask=mask)  # (B, T, V) ; une tête adaptée (LoRA) n’est pas qu’une matrice
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Taux du pas `step` (compté de 0) : montée linéaire, puis demi-cosinus (Loshchilov et Hutter 2017, §3)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.min_lr_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_indices(step: int, n: int, config: TrainingConfig) -> list[int]:
    """Les exemples du pas `step` parmi `n` : chaque époque les parcourt tous, dans un ordre tiré de la graine."""
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    return [_permutation(config.seed, position // n, n)[position % n] for position in positions]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW sur les paramètres à entraîner ; la décroissance ne touche que les matrices, ni gains ni biais."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise LlamaError("Aucun paramètre à entraîner : tous sont gelés (requires_grad=False).")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


@torch.no_grad()
def mean_loss(model: nn.Module, data: Examples, batch_size: int = 16, loss: Loss = next_token_loss) -> float:
    """Perte moyenne sur `data`, en nats par jeton à apprendre ; le modèle est laissé dans son mode."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total = 0.0
    for start in range(0, len(data.ids), batch_size):
        total += loss(model, _rows(data, slice(start, start + batch_size), device)).item()
    model.train(was_training)
    return total / max(1, int((data.labels != -100).sum()))


def train(
    model: nn.Module,
    data: Examples,
    config: TrainingConfig,
    *,
    val: Examples | None = None,
    loss: Loss = next_token_loss,
    out: Path | str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> History:
    """Entraîne `model` sur place.

    Args:
        model: ses paramètres à entraîner sont ceux qui demandent un gradient.
        data: exemples `(N, T)`, étiquettes déjà décalées.
        config: réglages.
        val: exemples d’évaluation ; sans eux, ni évaluation ni arrêt anticipé.
        loss: somme des pertes des jetons à apprendre d’un lot, en nats.
        out: dossier des points de reprise ; `None` n’écrit rien.
        resume: reprendre là où `out` s’était arrêté.
        progress: montrer la barre de progression.

    Returns:
        L’historique complet, pas d’avant une reprise compris. Après un arrêt anticipé, le modèle a ses meilleurs poids.

    Raises:
        LlamaError: données vides ou hors du vocabulaire, `out` tient une autre exécution, point abîmé, disque plein.
        KeyboardInterrupt: après avoir écrit un point de reprise, si `out` est donné.
    """
    if len(data.ids) == 0:
        raise LlamaError("Rien à apprendre : le corpus ne donne aucun exemple ; vérifiez-le, ou réduisez block_size.")
    if hasattr(getattr(model, "config", None), "vocab_size"):
        check_vocabulary(data, model.config)
    if config.patience and val is None:
        raise LlamaError("L’arrêt anticipé (patience) demande des exemples d’évaluation (val).")
    kernels.keep_freed_memory()
    distributed.align(model, config.seed)
    with distributed.together(), distributed.sharded(model, config.sharded) as trained:
        run = _Run(trained, data, config, val, loss, Path(out) if out else None)
        run.restore(resume)
        shown = progress and distributed.rank() == 0
        bar = progress_bar(total=config.steps, shown=shown, initial=run.step, unit="pas")
        trained.train()
        with bar, distributed.interruption(enabled=out is not None) as interrupted:
            while run.step < config.steps and not run.stopped():
                run.advance()
                record = run.history.steps[-1]
                bar.update()
                bar.set_postfix_str(
                    f"perte {record['loss']:.3f}, {record['tokens'] / record['seconds']:,.0f} jetons/s")
                if interrupted():
                    run.save()
                    raise KeyboardInterrupt
        run.finish()
    return run.history


class _Run:
    """Une exécution en cours : tout ce qu’un point de reprise doit retrouver."""

    def __init__(self, model, data, config, val, loss, out) -> None:
        self.model, self.data, self.config, self.loss, self.out = model, data, config, loss, out
        self.val = None if val is None else distributed.share(val)
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config)
        self.history = History()
        self.step = 0
        self.saved_step: int | None = None
        self.best: dict[str, Tensor] = {}
        self.n_labels = (data.labels != -100).sum(1)  # (N,)

    def advance(self) -> None:
        """Un pas d’optimiseur, et ce qui tombe à sa suite : évaluation, point de reprise."""
        started = time.perf_counter()
        config, size = self.config, self.config.micro_batch_size
        indices = batch_indices(self.step, len(self.data.ids), config)
        tokens = int(self.n_labels[indices].sum())
        mine = distributed.share(self.data.select(indices))
        total = torch.zeros((), device=self.device)
        for start in range(0, len(mine.ids), size):
            batch = _rows(mine, slice(start, start + size), self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                value = self.loss(self.model, batch)
                auxiliary = self.model.auxiliary_loss() if hasattr(self.model, "auxiliary_loss") else 0.0
            weights = (batch.labels != -100).sum(1)  # (B,)
            ((value + (auxiliary * weights).sum()) / max(1, tokens)).backward()
            total += value.detach().float()
        distributed.sum_gradients(self.model.parameters())
        mean = distributed.total(total.item()) / max(1, tokens)
        if not math.isfinite(mean):
            raise LlamaError(
                f"La perte n’est plus un nombre au pas {self.step + 1} : baissez learning_rate "
                f"({config.learning_rate:g}), allongez warmup_steps, ou vérifiez grad_clip."
            )
        lr = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        norm = distributed.whole(nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.history.steps.append({
            "step": self.step, "loss": mean, "lr": lr, "grad_norm": norm.item(), "tokens": tokens,
            "seconds": time.perf_counter() - started,
        })
        if self.val is not None and config.eval_every and self.step % config.eval_every == 0:
            self.evaluate()
        if self.out and config.checkpoint_every and self.step % config.checkpoint_every == 0:
            self.save()

    def evaluate(self) -> None:
        """Mesure la perte d’évaluation ; garde une copie des meilleurs poids si l’arrêt anticipé en a besoin."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            value = mean_loss(self.model, self.val, self.config.micro_batch_size, self.loss)
        distributed.reshard(self.model)
        share = int((self.val.labels != -100).sum())
        value = distributed.total(value * share) / max(1, distributed.total(share))
        previous = [record["val_loss"] for record in self.history.evaluations]
        self.history.evaluations.append({"step": self.step, "val_loss": value})
        if self.config.patience and value < min(previous, default=math.inf):
            self.best = {name: tensor.clone() for name, tensor in self._trainable().items()}

    def stopped(self) -> bool:
        """Les `patience` dernières évaluations sont-elles toutes sans progrès ?"""
        losses = [record["val_loss"] for record in self.history.evaluations]
        patience = self.config.patience
        return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def finish(self) -> None:
        evaluated = self.history.evaluations and self.history.evaluations[-1]["step"] == self.step
        if self.val is not None and not evaluated:
            self.evaluate()
        if self.out and self.saved_step != self.step:
            self.save()
        if self.best:
            self.model.load_state_dict(self.best, strict=False)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Ce qui doit être égal pour que reprendre ait un sens ; les réglages sans effet sur le calcul n’y sont pas."""
        settings = self.config.to_dict()
        for name in ("checkpoint_every", "keep", "micro_batch_size", "sharded"):
            settings.pop(name)
        digest = hashlib.sha256()
        for tensor in self.data:
            digest.update(tensor.numpy().tobytes())
        architecture = self.model.config.to_dict() if hasattr(self.model, "config") else {}
        identity = {"modèle": architecture, "réglages": settings, "données": {"sha256": digest.hexdigest()}}
        return json.loads(json.dumps(identity))

    def save(self) -> None:
        tensors = {
            "model": distributed.gathered(self._trainable()),
            "optimizer": distributed.gathered(checkpoint.optimizer_tensors(self.model, self.optimizer)),
            "random": distributed.by_rank(checkpoint.random_tensors()),
        }
        if self.best:
            tensors["best"] = distributed.gathered(self.best)
        state = {"identity": self.identity, "history": dataclasses.asdict(self.history)}
        distributed.on_first(lambda: checkpoint.save(self.out, self.step, tensors, state, self.config.keep))
        self.saved_step = self.step

    def restore(self, resume: bool) -> None:
        found = checkpoint.load(self.out) if self.out else None
        if found is not None:
            self._check(found, resume)
            self.model.load_state_dict(self._parts(found.tensors["model"]), strict=False)
            checkpoint.restore_optimizer(self.model, self.optimizer, found.tensors["optimizer"])
            checkpoint.restore_random(distributed.of_rank(found.tensors["random"]))
            self.best = self._parts(found.tensors.get("best", {}))
            self.history = History(**found.state["history"])
            self.step = self.saved_step = found.step
        elif self.out and self.out.is_dir() and any(p for p in self.out.iterdir() if p.suffix != ".partial"):
            raise LlamaError(f"{self.out} n’est pas vide et ne tient aucune exécution : prenez-en un autre.")
        if distributed.world_size() > 1:
            distributed.check_same([self.identity, self.step, self.out is not None, self.val is not None])

    def _check(self, found: checkpoint.Checkpoint, resume: bool) -> None:
        if not resume:
            raise LlamaError(f"{self.out} tient déjà une exécution : reprenez-la, ou choisissez un autre dossier.")
        differences = _differences(found.state["identity"], self.identity)
        if differences:
            raise LlamaError(f"{self.out} tient une autre exécution ({differences}) : choisissez un autre dossier.")
        ours, theirs = ({(name, tensor.shape) for name, tensor in part.items()}
                        for part in (self._trainable(), found.tensors["model"]))
        if ours != theirs:
            raise LlamaError(f"{self.out} a été écrit pour un autre modèle (paramètre {min(ours ^ theirs)[0]}).")

    def _parts(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        trainable = self._trainable()
        return {name: distributed.part_of(tensor, trainable[name]) for name, tensor in tensors.items()}

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}


def _rows(data: Examples, rows: Any, device: torch.device) -> Examples:
    return Examples(*(tensor[rows].to(device, non_blocking=True) for tensor in data))


def _differences(saved: Any, current: Any, name: str = "") -> str:
    """Ce qui diffère entre deux dictionnaires, en une ligne : `réglages.seed : 0 ≠ 1`."""
    if isinstance(saved, dict) and isinstance(current, dict):
        parts = [_differences(saved.get(key), current.get(key), f"{name}.{key}".lstrip("."))
                 for key in sorted({*saved, *current})]
        return ", ".join(part for part in parts if part)
    return "" if saved == current else f"{name} : {saved} ≠ {current}"
