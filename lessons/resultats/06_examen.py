"""Affinage complet et LoRA de `petit`, à données et pas égaux : leur perte, l’oubli, et l’examen du cours.

    python lessons/resultats/06_examen.py

Quelques minutes d’un cœur ; la leçon 6 en montre le résultat à côté de courses plus courtes. Les questions sont celles
de la leçon : en droit du travail, avec la réponse courte de l’examen, une fiche tout entière d’un côté.
"""

import copy
import time
from pathlib import Path
from typing import Any

from torch import nn

from llama import LlamaModel, TrainingConfig, evaluation, examination, holdout, lesson, pretrained
from llama.assembly import with_chat_template
from llama.data import question_examples, split
from llama.lora import add_lora
from llama.training import mean_loss, train

BLOCK, BATCH, STEPS = 80, 8, 70
RANK, FULL_RATE, LORA_RATE = 16, 5e-4, 3e-3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def labour_questions() -> list[list[tuple[str, str]]]:
    """Les questions de droit du travail à apprendre, fiche par fiche."""
    sheets: dict[str, list[tuple[str, str]]] = {}
    for row in holdout.questions()[0]:
        answer = examination.reference(row["réponse"])
        if answer and (row["thème"] == "Travail" or "service-public" not in row["url"]):
            sheets.setdefault(row["url"].split("#")[0], []).append((row["question"], answer))
    return list(sheets.values())


def main() -> None:
    started = time.perf_counter()
    tokenizer, base = pretrained.load_tokenizer("petit"), LlamaModel.from_pretrained("petit")
    chat = with_chat_template(tokenizer)
    data, val = (
        question_examples([pair for sheet in part for pair in sheet], tokenizer, BLOCK)
        for part in split(labour_questions(), val_fraction=0.15, seed=0)
    )
    val = val.select(slice(0, 64))
    sheets = [holdout.text_of(sheet)[:1000] for sheet in holdout.partition().held_out[::25]]

    def measure(model: nn.Module, tokenizer: Any = chat) -> dict:
        report = examination.examine(model, tokenizer, n_answers=8)
        fiches = evaluation.bits_per_byte(model, tokenizer, sheets, block_size=256)
        return {**report.metrics(), "perte": mean_loss(model, val), "fiches": fiches}

    models = {"base": measure(base, tokenizer)}  # la base continue un texte
    print("base", models["base"], flush=True)
    for name, rate in (("complet", FULL_RATE), ("lora", LORA_RATE)):
        model = copy.deepcopy(base)
        if name == "lora":
            add_lora(model, RANK, 2 * RANK, TARGETS)
        settings = TrainingConfig(steps=STEPS, batch_size=BATCH, learning_rate=rate, weight_decay=0.0)
        train(model, data, settings)
        models[name] = measure(model)
        print(name, models[name], flush=True)
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "questions": len(data.ids), "pas": STEPS, "lot": BATCH, "rang": RANK, "modèles": models,
        "minutes": (time.perf_counter() - started) / 60,
    })


if __name__ == "__main__":
    main()
