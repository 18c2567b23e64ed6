"""Entraîne `petit`, puis en fait la fiche : échantillons, mesures, README.

    python tools/petit.py train      # les deux lectures du corpus, dans modeles/, puis le dossier publié
    python tools/petit.py samples    # cinquante échantillons, sans choix ; un lecteur y compte ensuite les fautes
    python tools/petit.py measures   # bits par octet des fiches réservées, et ceux des compresseurs
    python tools/petit.py card       # la fiche, faite de tout ce qui précède et du journal de l’entraînement
"""

import gzip
import json
import lzma
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from llama import LlamaModel, sources
from llama.config import PRESETS
from llama.corpus import corpus
from llama.evaluation import bits_per_byte
from llama.generation import generate
from llama.history import History
from llama.holdout import SHEETS, partition, text_of
from llama.lesson import french, load_results, save_results
from llama.ngrams import NGramModel
from llama.pretrained import COURSE_MODELS, load_tokenizer
from llama.vocabulary import write_json

FOLDER = COURSE_MODELS / "petit"
SAMPLES, MEASURES, CARD = FOLDER / "samples.jsonl", FOLDER / "measures.json", FOLDER / "README.md"
N_SAMPLES, MAX_NEW_TOKENS = 50, 80
SAMPLING = {"temperature": 0.4, "top_p": 0.9, "repetition_penalty": 1.1}
WATTS = 20  # un cœur de serveur, mémoire et refroidissement compris : un ordre de grandeur
READINGS = tuple(Path(f"modeles/petit-{rank}") for rank in (1, 2))
COMMON = "--batch-size 8 --precision bf16 --save-precision bf16 --eval-every 400 --threads 1"
COMMANDS = (
    f"llama train --data cours --preset petit --vocab-size 4096 --steps 7400 --learning-rate 2e-3 {COMMON} "
    f"--out {READINGS[0]}",
    f"llama train --data cours --from {READINGS[0]} --steps 4600 --learning-rate 1.5e-3 {COMMON} --out {READINGS[1]}",
)


def train() -> None:
    """Lance les deux commandes, qui reprennent où elles en étaient, et publie ce qu’elles donnent."""
    for command in COMMANDS:
        subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)
    publish(*READINGS)


def publish(first: Path, second: Path) -> None:
    """Met dans le paquet les poids de la seconde lecture, et le journal des deux."""
    folders = (first, second)
    histories = [History.from_json(folder / "history.json") for folder in folders]
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    summaries[1]["arguments"]["start"] = str(READINGS[0])
    for name in ("preset", "vocab_size"):  # sans objet quand on part d’un modèle
        del summaries[1]["arguments"][name]
    for summary, folder in zip(summaries, READINGS, strict=True):
        summary["folder"] = str(folder)
    start = len(histories[0].steps)
    later = {kind: [{**record, "step": record["step"] + start} for record in getattr(histories[1], kind)]
             for kind in ("steps", "evaluations")}
    joined = History(histories[0].steps + later["steps"], histories[0].evaluations + later["evaluations"])
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "petit"
        LlamaModel.from_pretrained(second).save_pretrained(
            weights, tokenizer=load_tokenizer(second), dtype=torch.bfloat16)
        shutil.copytree(weights, FOLDER, dirs_exist_ok=True)
    joined.to_json(FOLDER / "history.json")
    totals = {key: sum(summary[key] for summary in summaries) for key in ("steps", "tokens", "seconds")}
    write_json(FOLDER / "summary.json", {**summaries[1], **totals, "readings": summaries})


def samples() -> None:
    """Les titres de cinquante fiches réservées, et ce que le modèle écrit à leur suite, la graine étant le rang."""
    model, tokenizer = LlamaModel.from_pretrained("petit"), load_tokenizer("petit")
    titles = sorted(sheet.title for sheet in partition().held_out if sheet.title in partition().subjects)
    rows = []
    for seed, title in enumerate(random.Random(0).sample(titles, N_SAMPLES)):
        (ids,) = generate(model, [tokenizer.encode_document(f"{title}\n")], max_new_tokens=MAX_NEW_TOKENS, seed=seed,
                          eos_id=tokenizer.eos_id, **SAMPLING)
        rows.append({"seed": seed, "title": title, "text": tokenizer.decode(ids, skip_special_tokens=True)})
    SAMPLES.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def measures() -> None:
    """Les bits par octet de toutes les fiches réservées : `petit`, des n-grammes, deux compresseurs."""
    model, tokenizer = LlamaModel.from_pretrained("petit"), load_tokenizer("petit")
    texts = [text_of(sheet) for sheet in partition().held_out]
    raw = "".join(texts).encode()
    counts = NGramModel.fit(map(tokenizer.encode_document, corpus("cours")), tokenizer.vocab_size, order=4)

    def bits(network: nn.Module) -> float:
        return bits_per_byte(network, tokenizer, texts, block_size=model.config.block_size, progress=True)

    save_results(MEASURES, {
        "sheets": len(texts), "bytes": len(raw), "parameters": model.config.n_parameters(),
        "bits_per_byte": {
            "petit": bits(model), "n-grammes": bits(counts),
            "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw), "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
        },
    })


def card() -> None:
    """Écrit README.md."""
    summary = json.loads((FOLDER / "summary.json").read_text(encoding="utf-8"))
    history = History.from_json(FOLDER / "history.json")
    results = load_results(MEASURES)
    rows = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    hours = sum(record["seconds"] for record in history.steps) / 3600
    faults = {kind: sum(row["faults"][kind] for row in rows) for kind in rows[0]["faults"]}
    sound = sum(not any(row["faults"].values()) for row in rows)
    by_faults = sorted(rows, key=lambda row: (sum(row["faults"].values()), row["seed"]))
    examples = "\n".join(
        f"> **{row['title']}** {' '.join(row['text'].split())}…\n> *({_faults(row['faults'])})*\n"
        for row in (*by_faults[:2], *by_faults[-2:]))
    credits = "\n".join(
        f"- {sources.CATALOGUE[name].credit} ; {sources.CATALOGUE[name].licence} "
        f"({sources.CATALOGUE[name].package} {sources.CATALOGUE[name].version})" for name in (*SHEETS, "legi-data"))
    bits = results["bits_per_byte"]
    CARD.write_text(f"""---
language: fr
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# petit

Le modèle du cours « L’atelier des LLM » : un Llama de {french(results['parameters'])} paramètres, entraîné de zéro
sur des textes de droit du travail et de service public, par la boucle et le tokenizer de la bibliothèque `llama`.
Il continue un texte ; il ne répond pas aux questions (la leçon 5 le lui apprend).

**C’est un exercice, pas un conseil juridique.** Il imite la langue de l’administration,
souvent avec des fautes, et invente des faits : délais, montants, articles. Ses textes sont
d’une date donnée, et le droit change.

```python
from llama import LlamaModel                        # ou transformers.AutoModelForCausalLM, sur ce dossier
model = LlamaModel.from_pretrained("petit")
```

## Données

{french(summary['n_examples'] * PRESETS['petit']['block_size'] / 1e6, 1)} millions de jetons : les fiches, les
réponses et le Code du travail de quatre publications, moins une fiche de droit du travail sur quatre et une autre
sur vingt, réservées par sujet avec leurs quasi-doublons (`llama.holdout`).

{credits}

## Entraînement

```
{chr(10).join(COMMANDS)}
```

Graine {summary['arguments']['seed']}, {french(summary['tokens'] / 1e6, 1)} millions de jetons lus en
{french(hours, 1)} heures d’un cœur, parfois deux ({load_origin()}), soit au plus
{french(2 * hours * WATTS / 1000, 2)} kWh à {WATTS} W par cœur, mémoire et refroidissement compris (un ordre de
grandeur). Le journal des deux lectures est dans `history.json`. Les poids publiés sont en bfloat16. La seconde lecture,
partie pour 5 600 pas sur deux cœurs, a été ramenée au millième à 4 600 pas sur un cœur : son taux n’y suit donc pas
exactement la commande.

## Mesures

Sur {french(results['sheets'])} fiches réservées ({french(results['bytes'] / 1e6, 1)} Mo), en bits par octet :

| petit | n-grammes (n = 4, même corpus) | xz | gzip |
|---|---|---|---|
| {french(bits['petit'])} | {french(bits['n-grammes'])} | {french(bits['xz'])} | {french(bits['gzip'])} |

Cinquante échantillons, sans choix (`samples.jsonl` : titres de fiches réservées, {MAX_NEW_TOKENS} jetons, température
{french(SAMPLING['temperature'], 1)}, top-p {french(SAMPLING['top_p'], 1)}, pénalité de répétition
{french(SAMPLING['repetition_penalty'], 1)}), lus phrase à phrase :
{sound} sans faute relevée ; {_faults(faults)}. Les deux moins fautifs, puis les deux plus fautifs :

{examples}
## Limites

Il ne connaît que le français administratif, ne lit que {PRESETS['petit']['block_size']} jetons à la fois, invente des
articles et des chiffres, se répète, et reflète ses sources : des textes de l’administration, de 2020 à 2026.
""", encoding="utf-8")


def _faults(faults: dict[str, int]) -> str:
    return ", ".join(f"{kind} : {count}" for kind, count in faults.items())


def load_origin() -> str:
    return json.loads(MEASURES.read_text(encoding="utf-8"))["origine"]["machine"].partition(",")[0]


if __name__ == "__main__":
    steps = {"train": train, "samples": samples, "measures": measures, "card": card}
    if len(sys.argv) != 2 or sys.argv[1] not in steps:
        sys.exit(f"usage : python tools/petit.py {'|'.join(steps)}")
    steps[sys.argv[1]]()
