"""Un pas de LoRA sur SmolLM2, contre peft : temps et mémoire."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from measure import Measure, Report, main, matmul_peak, profile, race
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llama import kernels, lora, pretrained
from llama.config import TrainingConfig
from llama.data import Examples
from llama.model import LlamaModel
from llama.training import make_optimizer, next_token_loss

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA = 16, 32


def ours(source: str, shape: tuple[int, int]) -> Callable[[], None]:
    """Un pas sur `shape` (séquences, jetons), par `llama.lora`."""
    kernels.keep_freed_memory()
    model = LlamaModel.from_pretrained(source).train()
    lora.add_lora(model, RANK, ALPHA, TARGETS)
    optimizer = make_optimizer(model, TrainingConfig(steps=1))
    ids = _ids(model.config.vocab_size, shape)
    batch = Examples(ids, ids.roll(-1, 1), torch.ones_like(ids))

    def run() -> None:
        (next_token_loss(model, batch) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def theirs(source: str, shape: tuple[int, int]) -> Callable[[], None]:
    """Le même pas, par peft."""
    base = AutoModelForCausalLM.from_pretrained(pretrained.find(source), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = _ids(base.config.vocab_size, shape)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure(
    source: str = "smollm2", shape: tuple[int, int] = (4, 256), repeats: int = 3, processes: bool = True
) -> Report:
    """Quatre séquences de 256 jetons, en float32, adaptateurs de rang 16 sur toute l’attention."""
    contenders = {"llama": partial(ours, source, shape), "peft": partial(theirs, source, shape)}
    times, peaks = race(contenders, repeats, processes=processes)
    spent, peak = profile(ours(source, shape)), matmul_peak(torch.float32)
    cost = {"smaller_is_better": True}
    return Report("LoRA sur SmolLM2", [
        Measure("pas", "s", times["llama"], times["peft"], 1.0, spent.flops / peak, **cost),
        Measure("mémoire, au plus", "Go", [peaks["llama"] / 1e9], [peaks["peft"] / 1e9], 1.0, **cost),
    ], [spent.note(peak)])


def _ids(vocab_size: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main(measure)
