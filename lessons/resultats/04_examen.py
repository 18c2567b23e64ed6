"""L’examen du cours, passé par les n-grammes du corpus de `petit` et par `petit`, et ce que valent ces n-grammes.

    python lessons/resultats/04_examen.py

Quelques minutes d’un cœur ; la leçon 4 en montre le résultat. À refaire si les poids de `petit` changent.
"""

from pathlib import Path

from llama import LlamaModel, lesson
from llama.corpus import corpus
from llama.evaluation import bits_per_byte
from llama.examination import examine
from llama.holdout import partition, text_of
from llama.ngrams import NGramModel
from llama.pretrained import load_tokenizer

ORDER = 4


def main() -> None:
    tokenizer = load_tokenizer("petit")
    counts = NGramModel.fit(map(tokenizer.encode_document, corpus("cours")), tokenizer.vocab_size, order=ORDER)
    sheets = [text_of(sheet)[:1500] for sheet in partition().held_out[::14]]
    models = {"n-grammes": counts, "petit": LlamaModel.from_pretrained("petit").eval()}
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "ordre": ORDER,
        "fiches": len(sheets), "octets": sum(len(sheet.encode()) for sheet in sheets),
        "bits_par_octet_n-grammes": bits_per_byte(counts, tokenizer, sheets, block_size=256),
        **{name: examine(model, tokenizer, n_answers=0, progress=True).metrics() for name, model in models.items()},
    })


if __name__ == "__main__":
    main()
