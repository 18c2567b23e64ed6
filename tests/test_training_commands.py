"""`llama train`, `finetune`, `distill` : ce qu’elles écrivent, reprennent et refusent."""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_console import assert_french
from tiny_models import PAIRS, TEXTS, make_model, snapshot, tokenizer, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llama import cli, training, training_commands
from llama.evaluation import bits_per_byte
from llama.runner import BasicModelRunner

TRAIN = ("train", "--data", "textes.txt", "--vocab-size", "300", "--steps", "4", "--batch-size", "2",
         "--eval-every", "0")
FINETUNE = ("finetune", "--model", "base", "--data", "qa.jsonl", "--steps", "6", "--batch-size", "4",
            "--learning-rate", "0.02")
DISTILL = ("distill", "--teacher", "base", "--data", "textes.txt", "--layers", "2", "--steps", "4",
           "--block-size", "48", "--batch-size", "4")
COMMANDS = {"train": TRAIN, "finetune": FINETUNE, "distill": DISTILL}


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="llama")


def done(*arguments: str) -> dict:
    """Lance une commande qui doit réussir, et rend son résumé."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """Un dossier de travail : un modèle, des textes, des questions, quelques fichiers fautifs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training_commands, "PRESETS", {
        "mini": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "block_size": 32},
    })
    make_model(tmp_path / "base")
    (tmp_path / "textes.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    write_pairs(tmp_path / "qa.jsonl", PAIRS)
    return tmp_path


def weights(folder):
    return load_file(folder / "model.safetensors")


# Ce qu’elles écrivent


def test_train_writes_a_model_that_transformers_loads(work):
    summary = done(*TRAIN, "--out", "neuf")
    assert summary == json.loads((work / "neuf/summary.json").read_text())
    assert summary["steps"] == 4 and summary["tokens"] == 4 * 2 * 32 and summary["n_parameters"] > 0
    assert summary["arguments"]["data"] == ["textes.txt"] and summary["arguments"]["preset"] == "mini"
    history = json.loads((work / "neuf/history.json").read_text())
    assert summary["train_loss"] == history["steps"][-1]["loss"] and len(history["steps"]) == 4
    runner = BasicModelRunner(work / "neuf")
    ids = runner.prompt(TEXTS[0])
    published = AutoModelForCausalLM.from_pretrained(work / "neuf").eval()
    own = AutoTokenizer.from_pretrained(work / "neuf")
    with torch.no_grad():
        expected = runner.model(torch.tensor([ids]))
        torch.testing.assert_close(published(torch.tensor([ids])).logits, expected, atol=1e-4, rtol=0)
    assert own(TEXTS[0]).input_ids == runner.tokenizer.encode(TEXTS[0]) and own.chat_template is None
    assert {path.name for path in (work / "neuf").iterdir()} == {
        "config.json", "history.json", "model.safetensors", "summary.json", "tokenizer.json", "tokenizer_config.json"}


def test_train_writes_weights_in_sixteen_bits(work):
    for precision in ("float32", "bf16"):
        done(*TRAIN, "--save-precision", precision, "--out", precision)
    whole, half = (weights(work / precision) for precision in ("float32", "bf16"))
    assert all(torch.equal(whole[name].bfloat16(), half[name]) for name in whole)


def test_train_learns(work):
    done(*TRAIN, "--out", "début")
    done(*TRAIN, "--steps", "40", "--out", "fin")
    bits = [bits_per_byte(r.model, r.tokenizer, TEXTS, block_size=32)
            for r in (BasicModelRunner(work / name) for name in ("début", "fin"))]
    assert bits[1] < 0.8 * bits[0]


def test_train_takes_a_tokenizer_and_several_corpora(work):
    tokenizer().save(work / "jetons")
    (work / "autres.txt").write_text("\n".join(TEXTS[::-1]), encoding="utf-8")
    alone = done(*TRAIN, "--tokenizer", "jetons", "--out", "un")
    both = done(*TRAIN, "--data", "autres.txt", "--tokenizer", "jetons", "--out", "deux")
    assert both["vocab_size"] == alone["vocab_size"] == tokenizer().vocab_size
    assert both["n_examples"] > 1.9 * alone["n_examples"]


def test_train_starts_from_a_model_and_its_tokenizer(work):
    base = BasicModelRunner(work / "base")
    summary = done("train", "--from", "base", *TRAIN[1:], "--block-size", "16", "--out", "suite")
    after = BasicModelRunner(work / "suite")
    assert after.tokenizer.to_transformers().get_vocab() == base.tokenizer.to_transformers().get_vocab()
    assert summary["n_parameters"] == base.model.config.n_parameters()
    bits = [bits_per_byte(r.model, r.tokenizer, TEXTS, block_size=16) for r in (base, after)]
    assert bits[1] < bits[0]


def test_train_on_questions_makes_a_model_that_converses(work):
    done(*TRAIN, "--data", "qa.jsonl", "--out", "mêlé")
    done(*TRAIN[:1], "--data", "qa.jsonl", *TRAIN[3:], "--out", "converse")
    assert BasicModelRunner(work / "mêlé").chat and BasicModelRunner(work / "converse").chat


def test_finetune_measures_before_and_after(work):
    summary = done(*FINETUNE, "--steps", "40", "--out", "appris")
    assert summary["loss"] < 0.8 * summary["loss_before"]
    assert summary["n_questions"] == round(0.1 * len(PAIRS)) and {"f1", "f1_before"} <= summary.keys()
    runner = BasicModelRunner(work / "appris")
    runner.add_pairs(PAIRS)
    assert runner.evaluate()["loss"] == pytest.approx(summary["loss"], abs=1e-5)
    names = {path.name for path in (work / "appris").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_finetune_names_its_columns_and_prints_the_progress(work):
    write_pairs(work / "autres.jsonl", [*PAIRS, ("Et rien ?", "")], ("demande", "dit"))
    arguments = (*FINETUNE[:4], "autres.jsonl", *FINETUNE[5:], "--input-key", "demande", "--output-key", "dit")
    result = run(*arguments, "--out", "appris")
    assert result.exit_code == 0 and "réponse vide" in result.stderr
    assert "mises de côté" in result.stderr and "perplexité\u00a0: " in result.stdout and " → " in result.stdout
    assert_french(result.output)


@pytest.mark.parametrize("option", ["--full", "--whole"])
def test_finetune_writes_the_whole_model_when_asked(work, option):
    done(*FINETUNE, option, "--out", "entier")
    assert not (work / "entier/adapter_config.json").exists()
    assert weights(work / "entier").keys() == weights(work / "base").keys()
    assert AutoModelForCausalLM.from_pretrained(work / "entier").config.num_hidden_layers == 3


def test_finetune_stops_early(work):
    options = ("--steps", "100", "--learning-rate", "0.5", "--eval-every", "2", "--patience", "1")
    assert done(*FINETUNE[:5], "--batch-size", "4", *options, "--out", "appris")["steps"] < 100


def test_finetune_saves_memory_with_the_same_losses(work):
    plain = done(*FINETUNE, "--out", "un")
    sober = done(*FINETUNE, "--gradient-checkpointing", "--micro-batch-size", "1", "--out", "deux")
    assert sober["loss"] == pytest.approx(plain["loss"], abs=1e-4)


def test_distill_cuts_a_student_that_learns(work):
    summary = done(*DISTILL, "--steps", "30", "--out", "élève")
    assert summary["n_parameters"] < summary["teacher_parameters"]
    assert summary["val_loss"] < 0.9 * summary["val_loss_before"]
    alone = done(*DISTILL, "--steps", "30", "--alpha", "1", "--out", "imitateur")
    assert alone["val_loss"] == pytest.approx(alone["teacher_loss"], abs=0.1)  # il n’apprend que du maître, ignorant
    assert AutoModelForCausalLM.from_pretrained(work / "élève").config.num_hidden_layers == 2
    assert BasicModelRunner(work / "élève").predict("Bonjour.", max_new_tokens=4)


def test_distill_from_an_adapter_and_questions(work):
    done(*FINETUNE, "--out", "maître")
    arguments = ("distill", "--teacher", "maître", "--data", "qa.jsonl", *DISTILL[5:])
    assert done(*arguments, "--out", "élève")["steps"] == 4


# Ce qu’elles reprennent


def interrupt_at(monkeypatch, step):
    """Un vrai Ctrl-C pendant le pas `step` ; rend de quoi l’ôter."""
    advance = training._Run.advance

    def interrupted(self):
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self)

    monkeypatch.setattr(training._Run, "advance", interrupted)
    return lambda: monkeypatch.setattr(training._Run, "advance", advance)


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_then_relaunched_gives_the_same_weights(work, monkeypatch, command):
    done(*COMMANDS[command], "--out", "témoin")
    restore = interrupt_at(monkeypatch, 2)
    result = run(*COMMANDS[command], "--out", "repris")
    assert result.exit_code == 130 and result.stderr.rstrip().splitlines()[-1] == (
        "Interrompu\u00a0: le point de reprise du pas 2 est dans repris/checkpoints\u00a0; "
        "relancez la même commande pour continuer."
    )
    restore()
    other = run(*COMMANDS[command], "--seed", "1", "--out", "repris")
    assert other.exit_code == 2 and "seed\u00a0: 0 ≠ 1" in other.stderr
    result = run(*COMMANDS[command], "--out", "repris")
    assert result.exit_code == 0 and "Je reprends au pas 2." in result.stderr
    file = "adapter_model.safetensors" if command == "finetune" else "model.safetensors"
    expected, found = load_file(work / "témoin" / file), load_file(work / "repris" / file)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("command, changes", [
    ("train", [("--preset", "petit"), ("--vocab-size", "310")]),
    ("finetune", [("--rank", "4"), ("--alpha", "8"), ("--full",), ("--model", "autre")]),
    ("distill", [("--teacher", "autre"), ("--layers", "1"), ("--temperature", "3"), ("--alpha", "0.9")]),
])
def test_resuming_wants_the_same_adapter_teacher_and_settings(work, monkeypatch, command, changes):
    make_model(work / "autre", seed=1)
    interrupt_at(monkeypatch, 2)
    assert run(*COMMANDS[command], "--out", "coupé").exit_code == 130
    before = snapshot(work)
    for change in changes:
        result = run(*COMMANDS[command], *change, "--out", "coupé")
        assert result.exit_code == 2 and "Traceback" not in result.output and snapshot(work) == before
        assert re.search(rf"tient un autre apprentissage en cours \((--)?{change[0].strip('-')}\b", result.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_overwritten_without_force(work, command):
    arguments = (*COMMANDS[command], "--out", "sortie")
    first = done(*arguments)
    before = snapshot(work)
    result = run(*arguments)
    assert result.exit_code == 2 and "existe déjà" in result.stderr and snapshot(work) == before
    steps = done(*arguments, "--steps", "2", "--force")["steps"]
    assert steps == 2 != first["steps"] and not (work / "sortie/checkpoints").exists()


# Ce qu’elles refusent


def foreign(work):
    (work / "pris").mkdir()
    (work / "pris/thèse.txt").write_text("dix ans")


def write(name, text):
    return lambda work: (work / name).write_text(text, encoding="utf-8")


def pairs(name, content):
    return lambda work: write_pairs(work / name, content)


def base(**changes):
    return lambda work: make_model(work / "autre", **changes)


def without(name):
    def prepare(work):
        make_model(work / "autre")
        (work / "autre" / name).unlink()

    return prepare


def nothing(work):
    pass


BAD = [
    # train
    ("train", ("--data", "absent.txt"), nothing, "introuvable"),
    ("train", ("--data", "vide.txt"), write("vide.txt", ""), "est vide"),
    ("train", ("--data", "court.txt"), write("court.txt", "Trop court."), "Texte trop court"),
    ("train", ("--data", "nombres.csv"), write("nombres.csv", "a,b\n1,2\n"), "n’a pas de colonne de texte"),
    ("train", ("--data", "latin.txt"), lambda work: (work / "latin.txt").write_bytes("été".encode("cp1252")), "UTF-8"),
    ("train", ("--data", "base"), nothing, "une liste d’objets est attendue"),
    ("train", ("--vocab-size", "100"), nothing, "--vocab-size (100) doit être d’au moins 262"),
    ("train", ("--vocab-size", "0"), nothing, "il faut au moins 1"),
    ("train", ("--steps", "0"), nothing, "il faut au moins 1"),
    ("train", ("--steps", "mille"), nothing, "un entier est attendu"),
    ("train", ("--learning-rate", "-1"), nothing, "--learning-rate doit être positif"),
    ("train", ("--learning-rate", "nan"), nothing, "--learning-rate doit être positif"),
    ("train", ("--preset", "géant"), nothing, "'géant' n’est pas parmi"),
    ("train", ("--precision", "fp8"), nothing, "'fp8' n’est pas parmi"),
    ("train", ("--device", "cuda"), nothing, "Aucun GPU"),
    ("train", ("--device", "tpu"), nothing, "'tpu' n’est pas parmi"),
    ("train", ("--tokenizer", "absent"), nothing, "introuvable"),
    ("train", ("--tokenizer", "qa.jsonl"), nothing, "qa.jsonl"),
    ("train", ("--out", "pris"), foreign, "ne vient pas de llama"),
    ("train", ("--from", "absent"), nothing, "Modèle introuvable"),
    ("train", ("--from", "base", "--tokenizer", "base"), nothing, "retirez --tokenizer"),
    ("train", ("--from", "base", "--out", "base", "--force"), nothing, "ne vient pas de llama"),
    ("train", ("--out", "pris", "--force"), foreign, "ne vient pas de llama"),
    ("train", ("--out", "textes.txt"), nothing, "est un fichier"),
    ("train", ("--out", "textes.txt/sous/dossier"), nothing, "est un fichier"),
    ("train", ("--patience", "3"), nothing, "option inconnue"),
    ("train", ("--seed", str(10**20)), nothing, "--seed est un entier de 32 bits"),
    ("train", ("--out", "y" * 300), nothing, "nom trop long"),
    # finetune
    ("finetune", ("--model", "absent"), nothing, "Modèle introuvable"),
    ("finetune", ("--model", "textes.txt"), nothing, "n’est pas un modèle"),
    ("finetune", ("--model", "autre"), without("tokenizer.json"), "n’a pas de tokenizer"),
    ("finetune", ("--model", "autre"), without("model.safetensors"), "autre"),
    ("finetune", ("--model", "autre"), base(block_size=8), "Aucune question ne laisse de place"),
    ("finetune", ("--data", "textes.txt"), nothing, "tient des textes, sans questions"),
    ("finetune", ("--data", "une.jsonl"), pairs("une.jsonl", PAIRS[:1]), "au moins deux questions"),
    ("finetune", ("--data", "faux.jsonl"), write("faux.jsonl", '{"question": "a",'), "JSON mal formé"),
    ("finetune", ("--data", "vides.jsonl"), pairs("vides.jsonl", [("a", " ")]), "réponse vide"),
    ("finetune", ("--input-key", "question"), nothing, "--input-key et --output-key"),
    ("finetune", ("--input-key", "demande", "--output-key", "réponse"), nothing, "n’a pas de colonne"),
    ("finetune", ("--rank", "0"), nothing, "il faut au moins 1"),
    ("finetune", ("--alpha", "-1"), nothing, "alpha est un nombre strictement positif"),
    ("finetune", ("--alpha", "nan"), nothing, "alpha est un nombre strictement positif"),
    ("finetune", ("--eval-every", "0"), nothing, "patience demande --eval-every > 0"),
    ("finetune", ("--micro-batch-size", "0"), nothing, "il faut au moins 1"),
    ("finetune", ("--learning-rate", "0"), nothing, "--learning-rate doit être positif"),
    ("finetune", ("--out", "base"), nothing, "ne vient pas de llama"),
    # distill
    ("distill", ("--layers", "0"), nothing, "il faut au moins 1"),
    ("distill", ("--layers", "9"), nothing, "entre 1 et 3 couches"),
    ("distill", ("--temperature", "0"), nothing, "il faut au moins 0.01"),
    ("distill", ("--alpha", "2"), nothing, "il faut au plus 1"),
    ("distill", ("--teacher", "absent"), nothing, "Modèle introuvable"),
    ("distill", ("--teacher", "autre"), lambda work: (work / "autre").mkdir(), "n’a pas de config.json"),
    ("distill", ("--data", "inconnue"), nothing, "« inconnue » introuvable"),
    ("distill", ("--data", "court.txt"), write("court.txt", "Trop court."), "Texte trop court"),
    ("distill", ("--block-size", "0"), nothing, "il faut au moins 1"),
    ("distill", ("--out", "pris"), foreign, "ne vient pas de llama"),
]


@pytest.mark.parametrize("command, options, prepare, message", BAD)
def test_bad_input_is_one_french_line_and_touches_nothing(work, command, options, prepare, message):
    prepare(work)
    before = snapshot(work)
    given = () if "--out" in options else ("--out", "sortie")
    arguments = list(COMMANDS[command])
    if "--data" in options:  # la commande les cumulerait
        position = arguments.index("--data")
        del arguments[position:position + 2]
    result = run(*arguments, *given, *options)
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert result.exit_code == 2 and message.replace("« ", "«\u00a0").replace(" »", "\u00a0»") in last, result.output
    assert result.stdout == "" and "Traceback" not in result.output and snapshot(work) == before
    assert_french(last)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("missing", ["--out", "--data"])
def test_what_is_obligatory(command, missing):
    arguments = [*COMMANDS[command], "--out", "sortie"]
    position = arguments.index(missing)
    result = run(*arguments[:position], *arguments[position + 2:])
    assert result.exit_code == 2 and f"il manque l’option '{missing}'" in result.stderr
