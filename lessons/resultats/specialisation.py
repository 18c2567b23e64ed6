"""Ce que vaut une spécialisation : SmolLM2 avant et après un LoRA sur les textes du cours, en bits par octet.

    python lessons/resultats/specialisation.py

Un quart d’heure d’un cœur ; la leçon 4 en montre le résultat à côté de `petit`.
"""

import time
from pathlib import Path

import torch

from llama import LlamaModel, TrainingConfig, lesson
from llama.corpus import corpus
from llama.data import pack
from llama.evaluation import bits_per_byte
from llama.holdout import partition, text_of
from llama.lora import add_lora
from llama.pretrained import load_tokenizer
from llama.runner import ATTENTION
from llama.training import train

BLOCK, EVALUATION_BLOCK = 256, 512
STEPS, BATCH, RANK = 100, 4, 16


def main() -> None:
    model, tokenizer = LlamaModel.from_pretrained("smollm2"), load_tokenizer("smollm2")
    sheets = [text_of(sheet)[:1500] for sheet in partition().held_out[::14]]

    def measure() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return bits_per_byte(model, tokenizer, sheets, block_size=EVALUATION_BLOCK, batch_size=4, progress=True)

    before = measure()
    texts = corpus("cours")[::20]
    examples = pack(map(tokenizer.encode_document, texts), BLOCK, eos_id=tokenizer.eos_id)
    add_lora(model, RANK, 2 * RANK, ATTENTION)
    started = time.perf_counter()
    settings = TrainingConfig(steps=STEPS, batch_size=BATCH, learning_rate=1e-3, precision="bf16")
    history = train(model, examples, settings)
    minutes = (time.perf_counter() - started) / 60
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "fiches": len(sheets), "octets": sum(len(sheet.encode()) for sheet in sheets),
        "bits_par_octet_avant": before, "bits_par_octet_après": measure(),
        "rang": RANK, "pas": STEPS, "jetons": sum(record["tokens"] for record in history.steps),
        "minutes": minutes,
    })


if __name__ == "__main__":
    main()
