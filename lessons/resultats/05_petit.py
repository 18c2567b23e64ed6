"""L’affinage complet de `petit` que la leçon 5 fait passer à l’examen, et l’examen entier, avant et après.

    python lessons/resultats/05_petit.py

Un quart d’heure d’un cœur. À refaire si les poids de `petit` changent.
"""

import copy
import time
from pathlib import Path
from typing import Any

from llama import LlamaModel, TrainingConfig, examination, lesson
from llama.assembly import with_chat_template
from llama.corpus import corpus
from llama.data import question_examples, split
from llama.pretrained import load_tokenizer
from llama.training import mean_loss, train

BLOCK, STEPS, BATCH, RATE = 128, 240, 8, 5e-4
WATCHED = 100


def scores(model: LlamaModel, tokenizer: Any) -> dict[str, float]:
    """L’examen entier, pour un modèle."""
    report = examination.examine(model, tokenizer, n_answers=16)
    accuracy = report.accuracy
    return {"exactitude": accuracy.value, "bas": accuracy.low, "haut": accuracy.high,
            "bits_par_octet": report.bits_per_byte, "f1": report.f1}


def main() -> None:
    plain = load_tokenizer("petit")
    base, tokenizer = LlamaModel.from_pretrained("petit"), with_chat_template(plain)
    pairs = [(question, shorter) for question, answer in corpus("cours", questions=True)
             if (shorter := examination.reference(answer))]
    learnt, kept = split(pairs, val_fraction=0.1, seed=0)
    data = question_examples(learnt, tokenizer, BLOCK)
    val = question_examples(kept, tokenizer, BLOCK).select(slice(0, WATCHED))
    model = copy.deepcopy(base)
    settings = TrainingConfig(
        steps=STEPS, batch_size=BATCH, learning_rate=RATE, precision="float32", eval_every=STEPS // 8, patience=3)
    started = time.perf_counter()
    history = train(model, data, settings, val=val)
    minutes = (time.perf_counter() - started) / 60
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "exemples": len(data.ids), "pas": len(history.losses), "lot": BATCH, "taux": RATE,
        "perte_avant": mean_loss(base, val), "perte_après": mean_loss(model, val),
        "évaluations": history.evaluations,
        "questions": len(examination.multiple_choice()),
        "base": scores(base, plain), "affiné": scores(model, tokenizer),
        "minutes": minutes,
    })


if __name__ == "__main__":
    main()
