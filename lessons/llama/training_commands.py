"""Les commandes qui entraînent : `llama train`, `llama finetune`, `llama distill`.

Elles lisent leurs options, disent ce qu’elles vont faire, appellent la bibliothèque et résument. Interrompues,
elles reprennent où elles en étaient quand on les relance ; sous torchrun, le premier processus seul écrit.
"""

from __future__ import annotations

import math
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from llama import console
from llama.config import PRESETS, Config, LlamaError, TrainingConfig
from llama.console import command, conclude, number, say

Preset = StrEnum("Preset", {name.upper(): name for name in PRESETS})


@command()
def train(
    data: Annotated[list[str], typer.Option(
        "--data", metavar="DONNÉES", help="Fichier, dossier, source ou jeu du Hub ; peut se répéter.")],
    out: console.Out,
    preset: Annotated[Preset, typer.Option("--preset", help="Architecture.")] = Preset.MINI,
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=1, help="Jetons du tokenizer à entraîner.")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(
        "--tokenizer", metavar="DOSSIER", help="Tokenizer déjà entraîné, au lieu d’en entraîner un.")] = None,
    start: Annotated[str | None, typer.Option(
        "--from", metavar="MODÈLE", help="Modèle dont partir, avec son tokenizer, au lieu de zéro.")] = None,
    block_size: console.BlockSize = 256,
    steps: console.Steps = 1000,
    batch_size: console.BatchSize = 16,
    micro_batch_size: console.MicroBatchSize = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Taux d’apprentissage au sommet.")] = 3e-3,
    precision: console.Numbers = console.Precision.FLOAT32,
    save_precision: Annotated[console.Precision, typer.Option(
        "--save-precision", help="Type des poids écrits.")] = console.Precision.FLOAT32,
    eval_every: console.EvalEvery = None,
    checkpoint_every: console.CheckpointEvery = 100,
    sharded: Annotated[bool, typer.Option(
        "--sharded", help="Sous torchrun, répartit les poids entre les processus (FSDP).")] = False,
    seed: console.Seed = 0,
    threads: console.Threads = None,
    device: console.Where = console.Device.AUTO,
    force: console.Force = False,
    as_json: console.Json = False,
) -> None:
    """Entraîne un modèle de zéro : tokenizer, blocs de texte, poids.

    Le dossier écrit se charge dans transformers, avec son tokenizer. Interrompue, la même commande reprend.

    \b
    Exemples :
      llama train --data atelier --vocab-size 1024 --steps 200 --out modeles/essai
      llama train --data fiches-travail --data contributions --preset petit --save-precision bf16 --out modeles/droit
      llama train --data mes_textes/ --steps 500 --eval-every 50 --out modeles/mien
      llama train --from smollm2 --data fiches-travail --learning-rate 3e-4 --steps 200 --out modeles/juriste
      torchrun --nproc-per-node 2 -m llama train --data fiches-travail --sharded --out modeles/deux
    """
    import torch

    from llama.assembly import folded, load, without_chat_template
    from llama.data import Examples, prepare, split_corpus
    from llama.model import LlamaModel
    from llama.tokenization import BPETokenizer, Tokenizer
    from llama.training import train as run
    from llama.workbench import Output, machine, results_of, sample, settings_of

    with machine(device, threads, seed) as place:
        config = TrainingConfig(
            steps=steps, batch_size=batch_size, micro_batch_size=micro_batch_size, learning_rate=learning_rate,
            precision=precision, eval_every=_every(eval_every, steps), checkpoint_every=checkpoint_every, seed=seed,
            sharded=sharded,
        )
        if start and tokenizer:
            raise LlamaError("--from apporte le tokenizer du modèle : retirez --tokenizer.")
        output = Output(out, force, "train", {
            "data": data, "preset": preset, "vocab_size": vocab_size, "tokenizer": tokenizer, "start": start,
            "block_size": block_size, **settings_of(config),
        }, inputs=[*data, *filter(None, [tokenizer, start])])
        say(f"J’entraîne {start or f'un modèle « {preset} »'} sur {', '.join(data)} : {number(steps)} pas de "
            f"{batch_size} blocs, sur {place.type}, dans {out}.")
        parts = [split_corpus(name, seed=seed) for name in data]
        items = [item for part, _ in parts for item in part]
        if start:
            model, vocabulary = load(start)
            model = folded(model).requires_grad_(True).to(place)
        else:
            if tokenizer:
                vocabulary = Tokenizer.load(tokenizer)
            else:
                say(f"D’abord un tokenizer de {number(vocab_size)} jetons.")
                vocabulary = BPETokenizer.train(
                    [item if isinstance(item, str) else "\n".join(item) for item in items], vocab_size)
            model = LlamaModel(Config(vocab_size=vocabulary.vocab_size, **PRESETS[preset])).to(place)
        length = min(block_size, model.config.block_size)
        examples, val = (
            Examples(*map(torch.cat, zip(*(prepare(part, vocabulary, length) for part in side), strict=True)))
            for side in zip(*parts, strict=True))
        size = model.config.n_parameters()
        say(f"{number(size)} paramètres, {number(model.config.vocab_size)} jetons de vocabulaire ; "
            f"{number(len(examples.ids))} blocs de {length} jetons à apprendre, {number(len(val.ids))} mis de côté.")
        if not start and all(isinstance(item, str) for item in items):  # des textes n’apprennent qu’à continuer
            vocabulary = without_chat_template(vocabulary)
        with output:
            _resume(output)
            history = run(model, examples, config, val=sample(val, seed), out=output.checkpoints)
            summary = output.finish({
                "n_parameters": size, "vocab_size": model.config.vocab_size, "n_examples": len(examples.ids),
                **results_of(history),
            }, history, partial(
                model.save_pretrained, tokenizer=vocabulary,
                dtype=torch.bfloat16 if save_precision == console.Precision.BF16 else torch.float32))
    conclude(summary, [
        f"Perte d’évaluation : {number(summary['val_loss'], 3)} nats par jeton (perplexité "
        f"{number(summary['perplexity'], 1)}), en {number(summary['steps'])} pas.",
        f"Modèle écrit dans {out} : llama generate --model {out} \"Le contrat de travail\"",
    ], as_json)


@command()
def finetune(
    model: console.Model,
    data: console.Data,
    out: console.Out,
    input_key: console.InputKey = None,
    output_key: console.OutputKey = None,
    full: Annotated[bool, typer.Option("--full", help="Entraîne tous les poids, au lieu d’un LoRA.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="Replie le LoRA et écrit le modèle entier.")] = False,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rang du LoRA.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="Échelle du LoRA.")] = 32.0,
    steps: console.Steps = 60,
    batch_size: console.BatchSize = 4,
    micro_batch_size: console.MicroBatchSize = None,
    learning_rate: Annotated[float | None, typer.Option(
        "--learning-rate", help="Taux au sommet ; sinon 1e-3 pour un LoRA, 1e-4 avec --full.")] = None,
    precision: console.Numbers = console.Precision.FLOAT32,
    eval_every: console.EvalEvery = None,
    patience: Annotated[int, typer.Option(
        "--patience", min=0, help="Évaluations sans progrès avant l’arrêt anticipé ; 0 : jamais.")] = 3,
    gradient_checkpointing: Annotated[bool, typer.Option(
        "--gradient-checkpointing", help="Recalcule les activations : moins de mémoire, plus de temps.")] = False,
    checkpoint_every: console.CheckpointEvery = 20,
    seed: console.Seed = 0,
    threads: console.Threads = None,
    device: console.Where = console.Device.AUTO,
    force: console.Force = False,
    as_json: console.Json = False,
) -> None:
    """Affine un modèle sur des questions et leurs réponses.

    Un dixième des questions, cent au plus, est mis de côté : il arrête l’affinage qui ne progresse plus, et l’évalue.
    Le dossier écrit est un adaptateur au format de peft, ou un modèle entier avec --full ou --whole.

    \b
    Exemples :
      llama finetune --model smollm2 --data atelier --out modeles/juriste
      llama finetune --model smollm2 --data questions.csv --input-key question --output-key réponse --out modeles/mien
      llama finetune --model modeles/petit --data contributions --full --steps 200 --out modeles/entier
      llama finetune --model smollm2 --data qa.jsonl --gradient-checkpointing --micro-batch-size 1 --out modeles/sobre
    """
    from llama.corpus import corpus
    from llama.peft_format import check_settings
    from llama.runner import FULL_RATE, LORA_RATE, BasicModelRunner
    from llama.workbench import Output, machine, results_of, settings_of

    with machine(device, threads, seed) as place:
        if learning_rate is None:
            learning_rate = FULL_RATE if full else LORA_RATE
        config = TrainingConfig(
            steps=steps, batch_size=batch_size, micro_batch_size=micro_batch_size, learning_rate=learning_rate,
            precision=precision, eval_every=_every(eval_every, steps), patience=patience,
            checkpoint_every=checkpoint_every, seed=seed,
        )
        output = Output(out, force, "finetune", {
            "model": model, "data": data, "input_key": input_key, "output_key": output_key, "full": full,
            "rank": rank, "alpha": alpha, **settings_of(config),
        }, inputs=[model, data])
        check_settings(rank, alpha, dropout=0.0)
        pairs = corpus(data, input_key, output_key, questions=True)
        if isinstance(pairs[0], str):
            raise LlamaError(f"« {data} » tient des textes, sans questions : donnez des questions et leurs réponses.")
        say(f"J’affine {model} ({'tous les poids' if full else f'LoRA de rang {rank}'}) sur {number(len(pairs))} "
            f"questions de {data} : {number(steps)} pas de {batch_size} au plus, sur {place.type}, dans {out}.")
        runner = BasicModelRunner(model, device=device, seed=seed)
        runner.add_pairs(pairs)
        training, held_out = runner.parts()
        say(f"{number(len(training))} questions à apprendre, {number(len(held_out))} mises de côté ; "
            "je mesure d’abord le modèle tel qu’il est.")
        before = runner.evaluate()
        say(f"Avant : perplexité {number(before['perplexity'], 3)}, F1 {number(before['f1'], 3)}. J’affine.")
        with output:
            _resume(output)
            history = runner.train(
                full=full, rank=rank, alpha=alpha, gradient_checkpointing=gradient_checkpointing,
                out=output.checkpoints, **config.to_dict(),
            )
            say("Je mesure le modèle affiné.")
            metrics = runner.evaluate()
            summary = output.finish(
                {**results_of(history), **metrics}, history, partial(runner.save, whole=whole))
    lines = [f"{label} : {number(metrics[name + '_before'], 3)} → {number(metrics[name], 3)}"
             for name, label in console.METRICS.items() if name in metrics]
    conclude(summary, [
        f"Sur {len(held_out)} questions mises de côté, avant → après {number(summary['steps'])} pas :", *lines,
        f"Modèle écrit dans {out} : llama chat --model {out}",
    ], as_json)


@command()
def distill(
    teacher: console.Teacher,
    data: console.Data,
    out: console.Out,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Couches du maître que l’élève garde.")],
    questions: Annotated[bool, typer.Option(
        "--questions", help="D’une source, prend les questions plutôt que les textes.")] = False,
    input_key: console.InputKey = None,
    output_key: console.OutputKey = None,
    temperature: Annotated[float, typer.Option(
        "--temperature", min=0.01, help="Adoucit les probabilités du maître.")] = 2.0,
    alpha: Annotated[float, typer.Option("--alpha", min=0, max=1, help="Part du maître dans la perte.")] = 0.5,
    block_size: console.BlockSize = 256,
    steps: console.Steps = 200,
    batch_size: console.BatchSize = 8,
    micro_batch_size: console.MicroBatchSize = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Taux d’apprentissage au sommet.")] = 5e-4,
    precision: console.Numbers = console.Precision.FLOAT32,
    eval_every: console.EvalEvery = None,
    checkpoint_every: console.CheckpointEvery = 50,
    seed: console.Seed = 0,
    threads: console.Threads = None,
    device: console.Where = console.Device.AUTO,
    force: console.Force = False,
    as_json: console.Json = False,
) -> None:
    """Distille un modèle en un élève de moins de couches.

    L’élève part d’une copie de quelques couches du maître, de la première à la dernière, et apprend ses
    probabilités.

    \b
    Exemples :
      llama distill --teacher smollm2 --data atelier --layers 15 --out modeles/eleve
      llama distill --teacher modeles/petit --data fiches-travail --layers 3 --steps 500 --out modeles/moitie
      llama distill --teacher smollm2 --data contributions --questions --layers 20 --alpha 0.9 --out modeles/eleve
    """
    from llama.assembly import folded
    from llama.data import load_and_prepare_french_data
    from llama.distillation import soft_target_loss, student_from
    from llama.runner import BasicModelRunner
    from llama.training import mean_loss
    from llama.training import train as run
    from llama.workbench import Output, machine, results_of, sample, settings_of

    with machine(device, threads, seed) as place:
        config = TrainingConfig(
            steps=steps, batch_size=batch_size, micro_batch_size=micro_batch_size, learning_rate=learning_rate,
            precision=precision, eval_every=_every(eval_every, steps), checkpoint_every=checkpoint_every, seed=seed,
        )
        output = Output(out, force, "distill", {
            "teacher": teacher, "data": data, "layers": layers, "questions": questions, "input_key": input_key,
            "output_key": output_key, "temperature": temperature, "alpha": alpha, "block_size": block_size,
            **settings_of(config),
        }, inputs=[teacher, data])
        say(f"Je distille {teacher} en un élève de {layers} couches, sur {data} : {number(steps)} pas de {batch_size} "
            f"exemples, sur {place.type}, dans {out}.")
        runner = BasicModelRunner(teacher, device=device)
        master = folded(runner.model).requires_grad_(False)
        student = student_from(master, layers)
        block_size = min(block_size, master.config.block_size)
        examples, val = load_and_prepare_french_data(
            data, runner.tokenizer, block_size, input_key=input_key, output_key=output_key, questions=questions,
            seed=seed,
        )
        val = sample(val, seed)
        sizes = [network.config.n_parameters() for network in (master, student)]
        say(f"{number(sizes[0])} paramètres au maître, {number(sizes[1])} à l’élève ; {number(len(examples.ids))} "
            f"exemples de {block_size} jetons à apprendre, {number(len(val.ids))} mis de côté.")
        before = {"teacher_loss": mean_loss(master, val), "val_loss_before": mean_loss(student, val)}
        with output:
            _resume(output)
            loss = partial(soft_target_loss, teacher=master, temperature=temperature, alpha=alpha)
            history = run(student, examples, config, val=val, loss=loss, out=output.checkpoints)
            after = mean_loss(student, val)
            summary = output.finish({
                "n_parameters": sizes[1], "teacher_parameters": sizes[0], **results_of(history), **before,
                "val_loss": after, "perplexity": math.exp(after),
            }, history, partial(student.save_pretrained, tokenizer=runner.tokenizer))
    conclude(summary, [
        f"Perte d’évaluation, en nats par jeton : {number(before['val_loss_before'], 3)} avant, {number(after, 3)} "
        f"après ; {number(before['teacher_loss'], 3)} pour le maître.",
        f"Élève écrit dans {out}, {number(sizes[0] / sizes[1], 1)} fois plus petit.",
    ], as_json)


def _every(eval_every: int | None, steps: int) -> int:
    return max(1, steps // 6) if eval_every is None else eval_every


def _resume(output: Any) -> None:
    if output.resumed:
        say(f"Je reprends au pas {number(output.resumed)}.")
