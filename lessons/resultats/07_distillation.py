"""Ce que valent des élèves de `petit` : taille, vitesse, qualité, avec et sans maître, et les réponses du maître.

    python lessons/resultats/07_distillation.py

Six minutes d’un cœur ; la leçon 7 en montre les résultats à côté d’un entraînement qu’elle refait en petit.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama import LlamaModel, TrainingConfig, lesson
from llama.assembly import with_chat_template
from llama.data import Examples, pack, question_examples
from llama.distillation import soft_target_loss, student_from, teacher_answers
from llama.evaluation import answer_nats, bits_per_byte
from llama.examination import examine, questions, reference
from llama.generation import generate
from llama.holdout import partition, text_of
from llama.holdout import questions as course_questions
from llama.pretrained import load_tokenizer
from llama.training import next_token_loss, train

STEPS, BATCH, BLOCK, RATE, RANDOM_RATE = 24, 8, 128, 5e-4, 3e-3
TEMPERATURES, ALPHA = (1.0, 2.0, 4.0), 1.0
SIZES, MIDDLE = (1, 2, 3, 4), 3
TUNING, TUNING_RATE, ASKED = 30, 5e-4, 128
torch.manual_seed(0)
torch.set_num_threads(1)
petit = LlamaModel.from_pretrained("petit").requires_grad_(False)
tokenizer = load_tokenizer("petit")
chat = with_chat_template(tokenizer)
sheets = [text_of(sheet)[:1000] for sheet in partition().held_out[::24]]


def bits(model: nn.Module) -> float:
    """Bits par octet du début de fiches réservées."""
    with torch.autocast("cpu", torch.bfloat16):
        return bits_per_byte(model, tokenizer, sheets, block_size=256)


def fit(
    model: nn.Module, data: Examples, steps: int, rate: float, teacher: nn.Module | None = None,
    temperature: float = TEMPERATURES[0],
) -> float:
    """Entraîne sur place, avec ou sans maître ; rend les secondes de calcul, charge de la machine exclue."""
    loss = next_token_loss
    if teacher is not None:
        loss = partial(soft_target_loss, teacher=teacher, temperature=temperature, alpha=ALPHA)
    settings = TrainingConfig(steps=steps, batch_size=BATCH, learning_rate=rate, precision="bf16")
    started = time.process_time()
    train(model, data, settings, loss=loss, progress=False)
    return time.process_time() - started


def speeds(model: nn.Module) -> dict[str, float]:
    """Jetons lus et écrits par seconde de calcul : le meilleur de trois essais."""
    ids, read, written = torch.arange(4 * 128).view(4, 128) + 3, 0.0, 0.0
    for _ in range(3):
        started = time.process_time()
        with torch.no_grad():
            model(ids)
        read = max(read, ids.numel() / (time.process_time() - started))
        started = time.process_time()
        generate(model, [[0, 5, 6, 7]], max_new_tokens=32)
        written = max(written, 32 / (time.process_time() - started))
    return {"lus_par_seconde": read, "écrits_par_seconde": written}


def passed(model: nn.Module, vocabulary: Any = tokenizer) -> dict[str, float]:
    """L’examen entier, choix multiple seulement."""
    with torch.autocast("cpu", torch.bfloat16):
        return examine(model, vocabulary, n_answers=0, batch_size=16).metrics()


def sizes(data: Examples) -> tuple[list[dict], list[dict], LlamaModel]:
    """Chaque taille avec et sans maître ; au milieu, d’autres départs et températures ; enfin un autre maître."""
    models = [{"couches": 6, "paramètres": petit.config.n_parameters(), "bits": bits(petit), **speeds(petit),
               "examen": passed(petit)}]
    trials = []

    def trial(
        layers: int, steps: int, teacher: LlamaModel | None, *, cut: bool = True, temperature: float = TEMPERATURES[0]
    ) -> tuple[LlamaModel, float]:
        torch.manual_seed(0)
        student = student_from(petit, layers) if cut else LlamaModel(petit.config.replace(n_layers=layers))
        seconds = fit(student, data, steps, RATE if cut else RANDOM_RATE, teacher, temperature)
        trials.append({
            "couches": layers, "départ": "coupé" if cut else "hasard", "pas": steps, "secondes": seconds,
            "maître": teacher.config.n_layers if teacher else 0, "température": temperature, "bits": bits(student),
        })
        print(trials[-1], flush=True)
        return student, seconds

    kept, same_time = {}, {}
    for n in SIZES:
        kept[n], with_teacher = trial(n, STEPS, petit)
        _, without = trial(n, STEPS, None)
        same_time[n] = round(STEPS * with_teacher / without)
        trial(n, same_time[n], None)
        models.append({
            "couches": n, "paramètres": kept[n].config.n_parameters(), "bits_coupé": bits(student_from(petit, n)),
            "bits": trials[-3]["bits"], **speeds(kept[n]), "examen": passed(kept[n]),
        })
    trial(MIDDLE, STEPS, petit, cut=False)
    trial(MIDDLE, same_time[MIDDLE], None, cut=False)
    for temperature in TEMPERATURES[1:]:
        trial(MIDDLE, STEPS, petit, temperature=temperature)
    trial(1, STEPS, kept[MIDDLE])
    return models, trials, kept[MIDDLE]


def sequences(student: LlamaModel) -> dict[str, Any]:
    """Les réponses du maître affiné, ou celles des fiches, comme textes d’un élève."""
    short = ((row["question"], reference(row["réponse"])) for row in course_questions()[0])
    pairs = [(question, answer) for question, answer in short if answer]
    master = LlamaModel.from_pretrained("petit")
    tuning = fit(master, question_examples(pairs, chat, BLOCK), TUNING, TUNING_RATE)
    master.requires_grad_(False)
    asked = pairs[:: len(pairs) // ASKED][:ASKED]
    writing = {"max_new_tokens": 96, "batch_size": 32, "repetition_penalty": 1.1, "progress": False}
    started = time.process_time()
    answers = teacher_answers(master, chat, [question for question, _ in asked], **writing)
    seconds_writing = time.process_time() - started
    references = [pair for pair in asked if pair[0] in dict(answers)]
    unseen = questions()[::6]
    theirs = teacher_answers(master, chat, [question for question, _ in unseen], **writing)

    def surprise(model: nn.Module, kept: Sequence[tuple[str, str]]) -> float:
        asked = [chat.encode_chat([{"role": "user", "content": q}], add_generation_prompt=True)[0] for q, _ in kept]
        nats = answer_nats(model, chat, list(zip(asked, (a for _, a in kept), strict=True)))
        return sum(nats) / math.log(2) / sum(len(a.encode()) for _, a in kept)

    def judged(name: str, model: LlamaModel) -> dict[str, Any]:
        return {"nom": name, "sur_le_maître": surprise(model, theirs), "sur_les_fiches": surprise(model, unseen)}

    results = [judged("maître affiné", master), judged("élève, avant", student)]
    for name, texts, teacher in (
        ("réponses des fiches", references, None), ("réponses du maître", answers, None),
        ("probabilités du maître", references, master),
    ):
        model = student_from(student, student.config.n_layers)
        seconds = fit(model, question_examples(texts, chat, BLOCK), TUNING, TUNING_RATE, teacher)
        results.append(judged(name, model) | {"secondes": seconds})
        print(results[-1], flush=True)
    return {
        "affinage": len(pairs), "questions": len(asked), "achevées": len(answers), "réponses": answers,
        "nouvelles": theirs, "exemples": [(q, dict(unseen)[q], a) for q, a in theirs[:: max(1, len(theirs) // 3)]][:3],
        "secondes_affinage": tuning, "secondes_écriture": seconds_writing, "élèves": results,
        "examen_maître": passed(master, chat),
    }


def main() -> None:
    texts = [text_of(document) for document in partition().train[::57]]
    data = pack(map(tokenizer.encode_document, texts), BLOCK, eos_id=tokenizer.eos_id, separate=False)
    models, trials, student = sizes(data)
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "pas": STEPS, "lot": BATCH, "bloc": BLOCK, "taux": RATE, "alpha": ALPHA,
        "octets": sum(len(sheet.encode()) for sheet in sheets), "modèles": models, "essais": trials,
        "séquences": sequences(student), "minutes": time.process_time() / 60,
    })


if __name__ == "__main__":
    main()
