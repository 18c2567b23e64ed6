"""Affinage complet et LoRA de `petit`, à données et pas égaux : leur perte, l’oubli, et l’examen du cours.

    python lessons/resultats/06_examen.py

Quelques minutes d’un cœur ; la leçon 6 en montre le résultat à côté de courses plus courtes. Les questions sont celles
de la leçon : en droit du travail, avec la réponse courte de l’examen, une fiche tout entière d’un côté.
"""

import copy
import time
from pathlib import Path

import torch
from torch import nn

from llama import LlamaModel, TrainingConfig, evaluation, examination, holdout, lesson, pretrained
from llama.data import Examples, split
from llama.lora import add_lora
from llama.training import mean_loss, train

BLOCK, BATCH, STEPS = 80, 8, 70
RANK, FULL_RATE, LORA_RATE = 16, 5e-4, 3e-3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def examples(pairs: list[tuple[str, str]], tokenizer) -> Examples:
    """L’invite de l’examen est lue, la réponse seule est apprise ; remplissage à droite, `(N, BLOCK)`."""
    ask = evaluation.prompter(tokenizer, examination.TEMPLATE)
    ids = torch.full((len(pairs), BLOCK + 1), tokenizer.pad_id)
    labels = torch.full_like(ids, -100)
    for row, (question, answer) in enumerate(pairs):
        prompt, learnt = ask(question), [*tokenizer.encode(answer), tokenizer.eos_id]
        full = torch.tensor([*prompt, *learnt])[: BLOCK + 1]
        ids[row, : len(full)] = full
        labels[row, len(prompt) : len(full)] = full[len(prompt) :]
    ids, labels = ids[:, :-1], labels[:, 1:]
    return Examples(ids, labels, (ids != tokenizer.pad_id).long())


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
    data, val = (
        examples([pair for sheet in part for pair in sheet], tokenizer)
        for part in split(labour_questions(), val_fraction=0.15, seed=0)
    )
    val = val.select(slice(0, 64))
    sheets = [holdout.text_of(sheet)[:1000] for sheet in holdout.partition().held_out[::25]]

    def measure(model: nn.Module) -> dict:
        report = examination.examine(model, tokenizer, n_answers=8)
        fiches = evaluation.bits_per_byte(model, tokenizer, sheets, block_size=256)
        return {**report.metrics(), "perte": mean_loss(model, val), "fiches": fiches}

    models = {"base": measure(base)}
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
