"""Les commandes qui se servent d’un modèle : `llama merge`, `generate`, `chat`, `evaluate`.

Elles lisent leurs options, disent ce qu’elles vont faire, appellent la bibliothèque et résument.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llama import __version__, console
from llama.config import LlamaError
from llama.console import command, conclude, number, say

EXAMINATION, HELD_OUT = "examen", "reserve"
"""Ce que seule l’évaluation nomme, puisque aucun modèle du cours ne l’apprend : l’examen, et les fiches réservées."""


@command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECETTE", help="Fichier YAML de mergekit.")],
    out: Annotated[Path, typer.Argument(metavar="DOSSIER", help="Dossier à créer.")],
    test: Annotated[str | None, typer.Option(
        "--test", metavar="TEXTE", help="Question à poser au modèle fusionné, pour l’essayer.")] = None,
    mergekit: Annotated[bool, typer.Option("--mergekit", help="Confie la recette au vrai mergekit.")] = False,
    seed: console.Seed = 0,
    threads: console.Threads = None,
    force: console.Force = False,
    as_json: console.Json = False,
) -> None:
    """Fusionne des modèles selon une recette de mergekit.

    Les tenseurs passent un à un : la mémoire suit le plus gros d’entre eux, non les modèles. Le dossier écrit se
    charge dans transformers.

    \b
    Exemples :
      llama merge config.yml modeles/fusion
      llama merge config.yml modeles/fusion --test "Qu’est-ce qu’un préavis ?"
      llama merge ties.yml modeles/fusion --mergekit --force
    """
    from llama.mergekit_yaml import load_yaml
    from llama.recipe import merge as run
    from llama.recipe import run_mergekit
    from llama.vocabulary import write_json
    from llama.workbench import SUMMARY, machine

    started = time.perf_counter()
    with machine("cpu", threads, seed):
        method = load_yaml(recipe).get("merge_method", "?")
        say(f"Je fusionne selon {recipe} (méthode {method}{', par mergekit' if mergekit else ''}), dans {out}.")
        if mergekit:
            results = {"folder": str(run_mergekit(recipe, out, force=force, seed=seed)), "method": method}
        else:
            results = run(recipe, out, force=force, seed=seed)
        summary = {
            "command": "merge", "arguments": {"recipe": str(recipe), "seed": seed, "mergekit": mergekit},
            **results, "version": __version__, "seconds": round(time.perf_counter() - started, 3),
        }
        write_json(out / SUMMARY, summary)
        lines = [f"Modèle écrit dans {out}, en {number(summary['seconds'], 1)} s."]
        if test:
            from llama.runner import BasicModelRunner

            say(f"Je l’essaie : {test}")
            try:
                answer = BasicModelRunner(out).predict(test)
            except LlamaError as error:
                raise LlamaError(f"Fusion écrite dans {out}, mais son essai a échoué : {error}") from error
            summary["test"] = {"prompt": test, "text": answer}
            write_json(out / SUMMARY, summary)
            lines.append(answer)
    conclude(summary, lines, as_json)


@command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="TEXTE", help="Question, ou début de texte.")],
    model: console.Model,
    raw: Annotated[bool, typer.Option("--raw", help="Continue le texte, sans gabarit de conversation.")] = False,
    max_new_tokens: console.MaxNewTokens = 128,
    temperature: console.Temperature = 0.0,
    top_k: console.TopK = None,
    top_p: console.TopP = None,
    min_p: console.MinP = None,
    repetition_penalty: console.RepetitionPenalty = 1.0,
    stop: Annotated[list[str] | None, typer.Option(
        "--stop", metavar="TEXTE", help="Texte qui arrête la réponse ; peut se répéter.")] = None,
    seed: console.Seed = 0,
    threads: console.Threads = None,
    device: console.Where = console.Device.AUTO,
    out: console.SummaryFile = None,
    force: console.Force = False,
    as_json: console.Json = False,
) -> None:
    """Répond à une question, ou continue un texte, au fil de l’eau.

    \b
    Exemples :
      llama generate --model smollm2 "Qu’est-ce qu’un contrat de travail ?"
      llama generate --model modeles/petit "Le salarié peut" --max-new-tokens 60
      llama generate --model smollm2 "Écrivez un haïku." --temperature 0.8 --top-p 0.9 --seed 3
    """
    from llama.generation import Sampling
    from llama.runner import BasicModelRunner
    from llama.workbench import check_summary_file, machine, write_summary

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
                "repetition_penalty": repetition_penalty}
    Sampling(**sampling)  # un réglage impossible se dit avant de charger le modèle
    if not prompt.strip():
        raise LlamaError("Le texte est vide : posez une question, ou donnez le début d’un texte.")
    check_summary_file(out, force)
    with machine(device, threads, seed):
        say(f"Je charge {model}.")
        runner = BasicModelRunner(model, device=device)
        started = time.perf_counter()
        pieces = []
        for piece in runner.stream(
            prompt, raw=raw, max_new_tokens=max_new_tokens, stop=stop or (), seed=seed, **sampling
        ):
            pieces.append(piece)
            if not as_json:
                typer.echo(piece, nl=False)
        seconds = time.perf_counter() - started
    text = "".join(pieces)
    summary = {
        "command": "generate", "model": model, "prompt": prompt, "text": text,
        "seconds": round(seconds, 3), "seed": seed, **sampling,
    }
    write_summary(out, summary, force)
    conclude(summary, [""], as_json)


@command()
def chat(
    model: console.Model,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXTE", help="Consigne donnée en tête.")] = None,
    max_new_tokens: console.MaxNewTokens = 256,
    temperature: console.Temperature = 0.0,
    top_k: console.TopK = None,
    top_p: console.TopP = None,
    min_p: console.MinP = None,
    repetition_penalty: console.RepetitionPenalty = 1.0,
    seed: console.Seed = 0,
    threads: console.Threads = None,
    device: console.Where = console.Device.AUTO,
    out: console.SummaryFile = None,
    force: console.Force = False,
) -> None:
    """Converse avec un modèle dans le terminal.

    /quitter sort, /oublier recommence, /historique relit. Ctrl-C arrête la réponse en cours.

    \b
    Exemples :
      llama chat --model smollm2
      llama chat --model modeles/juriste --system "Répondez en une phrase."
      llama chat --model smollm2 --temperature 0.7 --top-p 0.9 --out conversation.json
    """
    from llama.conversation import Conversation, converse
    from llama.generation import Sampling
    from llama.runner import BasicModelRunner
    from llama.workbench import check_summary_file, machine, write_summary

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
                "repetition_penalty": repetition_penalty}
    Sampling(**sampling)
    check_summary_file(out, force)
    with machine(device, threads, seed):
        say(f"Je charge {model}.")
        runner = BasicModelRunner(model, device=device)
        if not runner.chat:
            say("Ce modèle n’a pas appris à converser : il continue chaque texte que vous tapez.")
        conversation = Conversation(runner, system, max_new_tokens, seed=seed, **sampling)
        try:
            converse(conversation)
        finally:
            if out:
                say(f"Conversation écrite dans {out}.")
            write_summary(out, {
                "command": "chat", "model": model, "messages": conversation.head + conversation.messages,
                "forgotten": conversation.forgotten, "seed": seed, **sampling,
            }, force)


@command()
def evaluate(
    model: console.Model,
    data: Annotated[str, typer.Option("--data", metavar="DONNÉES", help=(
        "Fichier CSV, JSON, JSONL ou TXT, dossier, source, jeu du Hub, « examen » ou « reserve »."))],
    questions: Annotated[bool, typer.Option(
        "--questions", help="D’une source, prend les questions plutôt que les textes.")] = False,
    input_key: console.InputKey = None,
    output_key: console.OutputKey = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help=(
        "Textes ou questions, au plus ; 0 : tous. Sans cette option, 100 tirés au hasard, ou tout l’examen."))] = None,
    answers: Annotated[int, typer.Option(
        "--answers", min=0, help="Questions auxquelles le modèle répond vraiment, au plus.")] = 16,
    max_new_tokens: console.MaxNewTokens = 64,
    batch_size: console.BatchSize = 8,
    seed: console.Seed = 0,
    threads: console.Threads = None,
    device: console.Where = console.Device.AUTO,
    out: console.SummaryFile = None,
    force: console.Force = False,
    as_json: console.Json = False,
) -> None:
    """Mesure un modèle sur des textes ou des questions, ou lui fait passer l’examen du cours.

    Sur des textes, en bits par octet et en perplexité ; sur des questions, en perplexité, F1 et exactitude. Les
    bits par octet comparent des modèles de vocabulaires différents ; le F1 compte les mots communs à la réponse du
    modèle et à la vraie.

    Aucun modèle du cours n’apprend « reserve », des fiches, ni « examen », leurs questions de droit du travail : un
    choix multiple (0,25 au hasard, avec son intervalle à 95 %), les bits par octet des réponses, et leur F1.

    \b
    Exemples :
      llama evaluate --model petit --data examen
      llama evaluate --model smollm2 --data examen --limit 60 --answers 4 --out examen.json
      llama evaluate --model petit --data reserve --limit 0
      llama evaluate --model modeles/petit --data fiches-travail
      llama evaluate --model modeles/juriste --data atelier --questions --answers 50
      llama evaluate --model smollm2 --data qa.csv --input-key demande --output-key reponse --out mesures.json
    """
    import random

    from llama.corpus import corpus
    from llama.evaluation import bits_per_byte
    from llama.examination import examine, multiple_choice
    from llama.runner import BasicModelRunner
    from llama.workbench import check_summary_file, machine, write_summary

    check_summary_file(out, force)
    started = time.perf_counter()
    examined = data == EXAMINATION and not Path(data).exists()
    if examined:
        items = multiple_choice(limit or None)
    else:
        held_out = data == HELD_OUT and not Path(data).exists()
        items = _held_out() if held_out else corpus(data, input_key, output_key, questions)
        limit = 100 if limit is None else limit
        if limit and len(items) > limit:
            say(f"{limit} tirés au hasard sur {number(len(items))} (--limit 0 les prend tous).")
            items = random.Random(seed).sample(items, limit)
    texts = isinstance(items[0], str)
    kind, source = "textes" if texts else "questions", "l’examen" if examined else data
    say(f"Je mesure {model} sur {number(len(items))} {kind} de {source}.")
    with machine(device, threads, seed):
        runner = BasicModelRunner(model, device=device)
        if examined:
            metrics = examine(runner.model, runner.tokenizer, limit=limit or None, n_answers=answers,
                              max_new_tokens=max_new_tokens, batch_size=batch_size, progress=True).metrics()
        elif texts:
            length = min(1024, runner.model.config.block_size)
            bits = bits_per_byte(
                runner.model, runner.tokenizer, items, block_size=length, batch_size=batch_size, progress=True)
            n_bytes = sum(len(text.encode()) for text in items)
            n_tokens = sum(len(runner.tokenizer.encode(text)) for text in items)
            metrics = {"bits_per_byte": bits, "perplexity": math.exp(bits * math.log(2) * n_bytes / n_tokens),
                       "n_texts": len(items), "n_bytes": n_bytes, "n_tokens": n_tokens}
        else:
            metrics = runner.measure(items, n_answers=answers, max_new_tokens=max_new_tokens, batch_size=batch_size)
    summary = {"command": "evaluate", "model": model, "data": data, **metrics, "seed": seed,
               "seconds": round(time.perf_counter() - started, 3)}
    write_summary(out, summary, force)
    conclude(summary, [f"{label} : {number(metrics[name], 3)}{_interval(metrics, name)}"
                       for name, label in console.METRICS.items() if name in metrics], as_json)


def _held_out() -> list[str]:
    from llama.holdout import partition, text_of

    return [text_of(document) for document in partition().held_out]


def _interval(metrics: dict[str, Any], name: str) -> str:
    if f"{name}_low" not in metrics:
        return ""
    low, high = (number(metrics[f"{name}_{end}"], 3) for end in ("low", "high"))
    return f" (entre {low} et {high} à 95 %)"
