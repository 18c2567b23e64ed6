"""L’affinage complet de `petit` que la leçon 5 fait passer à l’examen, et l’examen entier, avant et après.

    python lessons/resultats/05_petit.py

Deux minutes d’un cœur. À refaire si les poids de `petit` changent.
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama import LlamaModel, TrainingConfig, evaluation, examination, lesson
from llama.assembly import with_chat_template
from llama.corpus import corpus
from llama.data import question_examples, split
from llama.pretrained import load_tokenizer
from llama.training import mean_loss, train

BLOCK, STEPS, BATCH, RATE, OFTEN = 112, 80, 8, 3e-4, 10
WATCHED = 64


def sitting(model: LlamaModel, tokenizer: Any, ask: Callable[[str], list[int]]) -> tuple[dict[str, float], list[bool]]:
    """L’examen entier, comme `examination.examine` sans réponses écrites : les mesures, et les questions réussies."""
    items = examination.multiple_choice()
    nats = evaluation.choice_nats(model, tokenizer, items, ask=ask, batch_size=8)
    alone = evaluation.choice_nats(model, tokenizer, items, ask=lambda _: ask(""), batch_size=8)
    chosen = evaluation.choose(items, nats, alone)
    right = [guess == item.answer for guess, item in zip(chosen, items, strict=True)]
    n_bytes = sum(len(item.choices[item.answer].encode()) for item in items)
    total = sum(own[item.answer] for own, item in zip(nats, items, strict=True))
    accuracy = evaluation.grouped_proportion(right, examination.GROUP)
    return {"exactitude": accuracy.value, "bas": accuracy.low, "haut": accuracy.high,
            "bits_par_octet": total / math.log(2) / n_bytes}, right


def main() -> None:
    plain = load_tokenizer("petit")
    base, tokenizer = LlamaModel.from_pretrained("petit"), with_chat_template(plain)
    pairs = [(question, shorter) for question, answer in corpus("cours", questions=True)
             if (shorter := examination.reference(answer))]
    learnt, kept = split(pairs, val_fraction=0.1, seed=0)
    data = question_examples(learnt, tokenizer, BLOCK)
    val = question_examples(kept, tokenizer, BLOCK).select(slice(0, WATCHED))
    model = copy.deepcopy(base)
    settings = TrainingConfig(steps=STEPS, batch_size=BATCH, learning_rate=RATE, eval_every=OFTEN, patience=3)
    started = time.perf_counter()
    history = train(model, data, settings, val=val)
    minutes = (time.perf_counter() - started) / 60

    def conversation(question: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True)[0]

    before, right_before = sitting(base, plain, evaluation.prompter(plain, examination.TEMPLATE))
    after, right_after = sitting(model, tokenizer, conversation)
    gains = [int(b) - int(a) for a, b in zip(right_before, right_after, strict=True)]  # -1, 0 ou 1 par question
    gain = evaluation.grouped_proportion(gains, examination.GROUP)
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "exemples": len(data.ids), "pas": len(history.losses), "lot": BATCH, "taux": RATE,
        "perte_avant": mean_loss(base, val), "perte_après": mean_loss(model, val),
        "évaluations": history.evaluations,
        "questions": len(gains), "base": before, "affiné": after,
        "écart": {"valeur": gain.value, "bas": gain.low, "haut": gain.high,
                  "gagnées": gains.count(1), "perdues": gains.count(-1)},
        "minutes": minutes,
    })


if __name__ == "__main__":
    main()
