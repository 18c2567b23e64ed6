"""SmolLM2 à l’examen du cours, et ce que lui coûtent des poids plus courts ; la leçon 9 en montre le résultat.

    python lessons/resultats/09_smollm2.py

Les nats de chaque choix sont gardés, non la note : la leçon les classe de plusieurs façons. Cinq minutes d’un cœur.
"""

from pathlib import Path

import torch

from llama import LlamaModel, examination, inference, lesson
from llama.evaluation import bits_per_byte, choice_nats
from llama.holdout import partition, text_of
from llama.pretrained import load_tokenizer

BLOCK, CHARACTERS, SHEETS = 512, 700, 8


def main() -> None:
    model, tokenizer = LlamaModel.from_pretrained("smollm2"), load_tokenizer("smollm2")
    held_out = partition().held_out
    sheets = [text_of(sheet)[:CHARACTERS] for sheet in held_out[:: len(held_out) // SHEETS][:SHEETS]]
    bits = {}
    for precision in inference.PRECISIONS:
        prepared = inference.prepare(model, precision)
        bits[precision] = bits_per_byte(prepared, tokenizer, sheets, block_size=BLOCK, batch_size=4)
    items = examination.multiple_choice()

    def ask(question: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True)[0]

    with torch.autocast("cpu", torch.bfloat16):
        own = choice_nats(model, tokenizer, items, ask=ask, batch_size=8, progress=True)
        alone = choice_nats(model, tokenizer, items, ask=lambda _: ask(""), batch_size=8, progress=True)
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "fiches": len(sheets), "octets": sum(len(sheet.encode()) for sheet in sheets), "bits_par_octet": bits,
        "questions": [item.question for item in items],
        "nats": [[round(nats, 2) for nats in row] for row in own],
        "nats_sans_question": [[round(nats, 2) for nats in row] for row in alone],
    })


if __name__ == "__main__":
    main()
