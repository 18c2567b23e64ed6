"""L’affinage de SmolLM2 que la leçon 5 montre à côté de sa course réduite : un LoRA sur les questions quotidiennes.

    python lessons/resultats/05_smollm2.py

Quatre minutes d’un cœur.
"""

import time
from pathlib import Path

from llama import BasicModelRunner, lesson, sources

STEPS, BATCH, RANK = 40, 4, 16
SHORT = 190  # caractères d’une question et de sa réponse
PROMPTS = [
    "Tell me how to fix a broken car window",
    "Que faire si la vitre de ma voiture est cassée ?",
    "Comment remercier une voisine qui m’a aidé ?",
    "Quelle est la capitale de la France ?",
]


def main() -> None:
    rows = [row for row in sources.questions("atelier") if not row["articles"]]
    rows = [row for row in rows if len(row["question"] + row["réponse"]) <= SHORT]
    runner = BasicModelRunner("smollm2")
    runner.load_data(rows, input_key="question", output_key="réponse")
    before = runner.predict(PROMPTS, max_new_tokens=48)
    started = time.perf_counter()
    runner.train(steps=STEPS, batch_size=BATCH, rank=RANK, alpha=2 * RANK, patience=0, eval_every=STEPS // 2)
    minutes = (time.perf_counter() - started) / 60
    metrics = runner.evaluate()
    after = runner.predict(PROMPTS, max_new_tokens=48)
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "questions": len(runner.parts()[0]), "mises_de_côté": len(runner.parts()[1]), "pas": STEPS, "rang": RANK,
        "perplexité_avant": metrics["perplexity_before"], "perplexité_après": metrics["perplexity"],
        "f1_avant": metrics["f1_before"], "f1_après": metrics["f1"],
        "réponses": [
            {"question": prompt, "avant": " ".join(first.split()), "après": " ".join(second.split())}
            for prompt, first, second in zip(PROMPTS, before, after, strict=True)
        ],
        "minutes": minutes,
    })


if __name__ == "__main__":
    main()
