"""Le décodage de SmolLM2, une séquence à la fois, contre `generate` de transformers ; et la qualité en int8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from measure import Measure, Report, bandwidth, french, main, race
from transformers import AutoModelForCausalLM

from llama import holdout, inference, pretrained
from llama.evaluation import bits_per_byte
from llama.generation import generate
from llama.model import LlamaModel

PROMPT = "Le contrat de travail à durée déterminée est"
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def ours(source: str, precision: str, prepared: bool, n_tokens: int) -> Callable[[], list[int]]:
    """`n_tokens` jetons, par notre décodage ; `prepared` range d’abord les poids."""
    model = LlamaModel.from_pretrained(source)
    model = inference.prepare(model, precision) if prepared else model.to(DTYPES[precision])
    prompt = pretrained.load_tokenizer(source).encode(PROMPT)
    return lambda: generate(model, [prompt], max_new_tokens=n_tokens)[0]


def theirs(source: str, precision: str, n_tokens: int) -> Callable[[], list[int]]:
    """Les mêmes, par transformers."""
    model = AutoModelForCausalLM.from_pretrained(pretrained.find(source), dtype=DTYPES[precision])
    prompt = torch.tensor([pretrained.load_tokenizer(source).encode(PROMPT)])
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, **settings)[0, prompt.shape[1]:].tolist()


def measure(
    source: str = "smollm2", n_tokens: int = 48, repeats: int = 5, n_texts: int = 4, processes: bool = True
) -> Report:
    """Chaque précision contre la même, puis int8 contre bf16 ; enfin la perte de qualité, sur des fiches inconnues."""
    races = [("float32", True, "float32", 2.0), ("bf16", True, "bf16", 2.0), ("int8", True, "bf16", 3.0),
             ("float32", False, "float32", 1.0), ("bf16", False, "bf16", 1.0)]
    contenders = {(own, prepared): partial(ours, source, own, prepared, n_tokens) for own, prepared, *_ in races}
    contenders |= {peer: partial(theirs, source, peer, n_tokens) for *_, peer, _ in races}
    times, _ = race(contenders, repeats, processes=processes)
    report, speed = Report("Décodage de SmolLM2"), bandwidth()
    model, tokenizer = LlamaModel.from_pretrained(source), pretrained.load_tokenizer(source)
    models = {"float32": model} | {kind: inference.prepare(model, kind) for kind in ("bf16", "int8")}
    for own, prepared, peer, target in races:
        report.measures.append(Measure(
            own + ("" if prepared else ", sans préparation") + ("" if own == peer else f" contre {peer}"), "jetons/s",
            [n_tokens / t for t in times[own, prepared]], [n_tokens / t for t in times[peer]], target,
            speed / inference.size(models[own]),
        ))
    texts = [document.text[:1000] for document in holdout.partition().held_out[:n_texts]]
    for kind, quantized in models.items():
        bits = bits_per_byte(quantized, tokenizer, texts, block_size=256)
        megabytes = french(inference.size(quantized) / 1e6)
        report.notes.append(f"{kind} : {megabytes} Mo de poids, " + f"{bits:.4f} bits par octet".replace(".", ","))
    report.notes.append(f"Limite : lire tous les poids une fois par jeton, à {french(speed / 1e9)} Go/s (mesuré).")
    return report


if __name__ == "__main__":
    main(measure)
