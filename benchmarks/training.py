"""Un pas d’entraînement, par `llama` et par transformers : ce que les mesures de l’entraînement partagent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import measure
import torch
from measure import Measure, Report
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llama import kernels
from llama.config import Config, TrainingConfig
from llama.data import Examples
from llama.model import LlamaModel
from llama.training import make_optimizer, next_token_loss
from llama.transformers_format import from_config

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def our_step(config: Config, batch_size: int, precision: str) -> Callable[[], None]:
    """Un pas comme `training.train` en fait : perte, gradient, coupure, AdamW."""
    kernels.keep_freed_memory()
    torch.manual_seed(0)
    model = LlamaModel(config)
    optimizer = make_optimizer(model, TrainingConfig(steps=1))
    batch = _batch(config, batch_size)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = next_token_loss(model, batch) / batch.ids.numel()
            balance = model.auxiliary_loss()
        (loss + (balance.mean() if isinstance(balance, torch.Tensor) else 0.0)).backward()
        _update(model, optimizer)

    return run


def their_step(config: Config, batch_size: int, precision: str) -> Callable[[], None]:
    """Le même pas, par transformers, avec le même AdamW."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**from_config(config, torch.float32)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    batch = _batch(config, batch_size)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=batch.ids, labels=batch.ids, use_cache=False).loss
        loss.backward()
        _update(model, optimizer)

    return run


def compare(
    title: str, config: Config, batch_size: int, races: list[tuple[str, str, float]], repeats: int, processes: bool
) -> Report:
    """Fait courir les deux pas.

    Args:
        title: celui du rapport.
        config: l’architecture, la même des deux côtés.
        batch_size: séquences par pas.
        races: (notre précision, celle du concurrent, rapport visé).
        repeats: pas comptés.
        processes: voir `measure.race`.
    """
    ours = {precision: partial(our_step, config, batch_size, precision) for precision, _, _ in races}
    theirs = {precision: partial(their_step, config, batch_size, precision) for _, precision, _ in races}
    contenders = {f"llama {p}": setup for p, setup in ours.items()} | {f"pair {p}": s for p, s in theirs.items()}
    times, _ = measure.race(contenders, repeats, processes=processes)
    tokens, report = batch_size * config.block_size, Report(title)
    for own, peer, target in races:
        profile, peak = measure.profile(ours[own]()), measure.matmul_peak(DTYPES[own])
        report.measures.append(Measure(
            f"llama {own} contre {peer}", "jetons/s", [tokens / t for t in times[f"llama {own}"]],
            [tokens / t for t in times[f"pair {peer}"]], target, tokens * peak / profile.flops,
        ))
        report.notes.append(f"{own}. {profile.note(peak)}")
    report.notes.append("Limite : les produits de matrices d’un pas à la vitesse du sommet mesuré, et rien d’autre.")
    return report


def _batch(config: Config, batch_size: int) -> Examples:
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size))
    return Examples(ids, ids.roll(-1, 1), torch.ones_like(ids))


def _update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
