"""`llama merge`, `generate`, `chat`, `evaluate` : ce qu’elles rendent, écrivent et refusent."""

import json

import pytest
import torch
import yaml
from test_console import assert_french
from tiny_models import PAIRS, TEXTS, make_model, snapshot, write_pairs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llama import cli, examination
from llama.chat import EOS, PAD
from llama.config import Config
from llama.conversation import Conversation
from llama.evaluation import MultipleChoice, bits_per_byte, perplexity
from llama.holdout import Partition
from llama.model import LlamaModel
from llama.runner import BasicModelRunner
from llama.sheets import Document
from llama.tokenization import BPETokenizer

MERGE = ("merge", "recette.yml", "fusion")
GENERATE = ("generate", "--model", "base", "Combien font 2 et 2 ?", "--max-new-tokens", "8")
CHAT = ("chat", "--model", "base", "--max-new-tokens", "6")
EVALUATE = ("evaluate", "--model", "base", "--data", "qa.jsonl", "--answers", "3", "--max-new-tokens", "8")
COMMANDS = {"merge": MERGE, "generate": GENERATE, "chat": CHAT, "evaluate": EVALUATE}


def run(*arguments: str, typed: str = ""):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="llama", input=typed)


def recipe(work, **changes):
    content = {"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0.5}, "dtype": "float32",
               "slices": [{"sources": [{"model": name, "layer_range": [0, 3]} for name in ("base", "autre")]}]}
    (work / "recette.yml").write_text(yaml.safe_dump(content | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modèles")
    return make_model(folder / "base"), make_model(folder / "autre", seed=1)


@pytest.fixture(autouse=True)
def work(models, tmp_path, monkeypatch):
    """Un dossier de travail : deux modèles, une recette, des textes, des questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for model in models:
        (tmp_path / model.name).symlink_to(model)
    recipe(tmp_path)
    (tmp_path / "textes.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    write_pairs(tmp_path / "qa.jsonl", PAIRS)
    return tmp_path


# merge


def test_merge_saves_and_tries_the_model(work):
    result = run(*MERGE, "--test", "Combien font 2 et 2 ?", "--json")
    summary = json.loads(result.stdout)
    assert result.exit_code == 0 and summary == json.loads((work / "fusion/summary.json").read_text())
    assert summary["method"] == "slerp" and summary["n_layers"] == 3 and summary["command"] == "merge"
    assert summary["test"]["text"] == BasicModelRunner(work / "fusion").predict("Combien font 2 et 2 ?")
    assert AutoModelForCausalLM.from_pretrained(work / "fusion").config.num_hidden_layers == 3


def test_merge_prints_what_it_does(work):
    result = run(*MERGE, "--test", "Bonjour.")
    assert result.exit_code == 0 and "méthode slerp" in result.stderr and "Bonjour." in result.stderr
    assert "fusion" in result.stdout and len(result.stdout.splitlines()) >= 2
    assert_french(result.output)


def test_merge_by_mergekit_gives_the_same_weights(work):
    from safetensors.torch import load_file

    assert run(*MERGE).exit_code == 0
    result = run("merge", "recette.yml", "témoin", "--mergekit", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["arguments"]["mergekit"] is True
    ours, theirs = (load_file(work / name / "model.safetensors") for name in ("fusion", "témoin"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_merge_replaces_only_with_force(work):
    assert run(*MERGE).exit_code == 0
    before = snapshot(work)
    assert run(*MERGE).exit_code == 2 and snapshot(work) == before
    recipe(work, parameters={"t": 0.1})
    assert run(*MERGE, "--force").exit_code == 0 and snapshot(work / "fusion") != before


def test_a_failed_try_leaves_the_merged_model(work):
    result = run(*MERGE, "--test", "mot " * 200)
    assert result.exit_code == 2 and "son essai a échoué" in result.stderr and "Texte trop long" in result.stderr
    assert (work / "fusion/summary.json").exists() and BasicModelRunner(work / "fusion").predict("Bonjour.")


# generate


def test_generate_streams_what_predict_gives(work):
    expected = BasicModelRunner("base").predict("Combien font 2 et 2 ?", max_new_tokens=8)
    result = run(*GENERATE)
    assert result.exit_code == 0 and result.stdout == expected + "\n" and "Je charge base." in result.stderr
    summary = json.loads(run(*GENERATE, "--json", "--out", "réponse.json").stdout)
    assert summary["text"] == expected and summary == json.loads((work / "réponse.json").read_text())


def test_generate_passes_its_settings(work):
    runner = BasicModelRunner("base")
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3}
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    expected = "".join(runner.stream("Combien font 2 et 2 ?", max_new_tokens=8, **options))
    assert run(*GENERATE, *given).stdout == expected + "\n"
    stop = expected[2:4]
    stopped = "".join(runner.stream("Combien font 2 et 2 ?", max_new_tokens=8, stop=[stop], **options))
    assert run(*GENERATE, *given, "--stop", stop).stdout == stopped + "\n" and stop not in stopped


def test_generate_raw_continues_the_text(work):
    runner = BasicModelRunner("base")
    raw = "".join(runner.stream("Combien font 2 et 2 ?", max_new_tokens=8, raw=True))
    assert run(*GENERATE, "--raw").stdout == raw + "\n" != run(*GENERATE).stdout


# chat


def test_chat_answers_each_line(work):
    runner = BasicModelRunner("base")
    conversation = Conversation(runner, "Bref.", max_new_tokens=6)
    expected = ["".join(conversation.ask(line)) for line in ("Bonjour.", "Encore.")]
    result = run(*CHAT, "--system", "Bref.", "--out", "échange.json", typed="Bonjour.\nEncore.\n/quitter\nJamais.\n")
    assert result.exit_code == 0 and result.stdout == "".join(text + "\n" for text in expected)
    saved = json.loads((work / "échange.json").read_text())
    assert saved["messages"] == conversation.head + conversation.messages and "échange.json" in result.stderr


def test_chat_ends_with_its_input(work):
    assert run(*CHAT, typed="Bonjour.\n").exit_code == 0


def test_chat_says_when_the_model_only_continues(work):
    make_model(work / "nu", template=False)
    assert "il continue chaque texte" in run("chat", "--model", "nu", typed="/quitter\n").stderr


def test_ctrl_c_while_typing_keeps_the_conversation(work, monkeypatch):
    def read(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama.conversation.converse.__defaults__", (read,))
    result = run(*CHAT, "--out", "échange.json")
    assert result.exit_code == 130 and json.loads((work / "échange.json").read_text())["messages"] == []
    assert "Conversation écrite dans échange.json." in result.stderr


# evaluate


def test_evaluate_texts(work):
    runner = BasicModelRunner("base")
    summary = json.loads(run("evaluate", "--model", "base", "--data", "textes.txt", "--json").stdout)
    text = (work / "textes.txt").read_text()
    expected = bits_per_byte(runner.model, runner.tokenizer, [text], block_size=96)
    assert summary["bits_per_byte"] == pytest.approx(expected)
    ids = runner.tokenizer.encode_document(text)
    assert summary["perplexity"] == pytest.approx(perplexity(runner.model, [ids], block_size=96))
    assert summary["n_bytes"] == len(text.encode()) and summary["n_tokens"] == len(ids) - 1


def test_evaluate_texts_with_a_tokenizer_that_has_no_beginning(work):
    own = BPETokenizer.train(TEXTS, 330, (EOS, PAD))
    LlamaModel(Config(own.vocab_size, d_model=16, n_layers=1, n_heads=2)).save_pretrained(work / "nu", tokenizer=own)
    summary = json.loads(run("evaluate", "--model", "nu", "--data", "textes.txt", "--json").stdout)
    assert 0 < summary["bits_per_byte"] < 16


def test_evaluate_questions(work):
    summary = json.loads(run(*EVALUATE, "--limit", "0", "--json", "--out", "mesures.json").stdout)
    expected = BasicModelRunner("base").measure(PAIRS, n_answers=3, max_new_tokens=8)
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert summary == json.loads((work / "mesures.json").read_text())


def test_evaluate_draws_at_most_what_is_asked(work):
    result = run(*EVALUATE, "--limit", "5", "--answers", "0", "--json")
    summary = json.loads(result.stdout)
    assert summary["n_questions"] == 5 and summary["n_answers"] == 0 and "f1" not in summary
    assert f"5 tirés au hasard sur {len(PAIRS)}" in result.stderr
    again = json.loads(run(*EVALUATE, "--limit", "5", "--answers", "0", "--seed", "1", "--json").stdout)
    assert again["loss"] != summary["loss"]


def test_evaluate_prints_in_french(work):
    result = run(*EVALUATE, "--limit", "5")
    assert [line.split("\u00a0: ")[0] for line in result.stdout.splitlines()] == [
        "perte (nats par jeton)", "perplexité", "F1", "exactitude"]
    assert all("." not in line for line in result.stdout.splitlines())
    assert_french(result.output)


@pytest.fixture
def examined(monkeypatch):
    """Un examen de douze questions, sans les sources."""
    choices = [f"Cela fait {n}." for n in (4, 7, 9, 12)]
    items = [MultipleChoice(f"Combien font {i} et {n} ?", choices, n) for i in range(3) for n in range(4)]
    monkeypatch.setattr(examination, "_examination", lambda: items)
    return items


def test_evaluate_passes_the_examination(work, examined):
    arguments = ("evaluate", "--model", "base", "--data", "examen", "--answers", "2", "--max-new-tokens", "4")
    runner = BasicModelRunner("base")
    expected = examination.examine(runner.model, runner.tokenizer, n_answers=2, max_new_tokens=4).metrics()
    summary = json.loads(run(*arguments, "--json", "--out", "examen.json").stdout)
    assert {name: summary[name] for name in expected} == pytest.approx(expected) and summary["n_questions"] == 12
    assert summary == json.loads((work / "examen.json").read_text())
    result = run(*arguments, "--limit", "6")
    assert "4 questions de l’examen" in result.stderr.replace("\u00a0", " ")
    lines = [line.replace("\u00a0", " ") for line in result.stdout.splitlines()]
    assert [line.split(" : ")[0] for line in lines] == ["choix multiple", "bits par octet", "F1"]
    assert lines[0].endswith(" à 95 %)") and "entre" in lines[0]
    assert_french(result.output)


def test_evaluate_on_the_held_out_sheets(work, monkeypatch):
    sheets = [Document(f"{i}", f"Fiche {i}", text) for i, text in enumerate(TEXTS)]
    monkeypatch.setattr("llama.holdout.partition", lambda: Partition([], sheets, frozenset()))
    runner = BasicModelRunner("base")
    summary = json.loads(run("evaluate", "--model", "base", "--data", "reserve", "--limit", "0", "--json").stdout)
    texts = [f"Fiche {i}\n{text}" for i, text in enumerate(TEXTS)]
    expected = bits_per_byte(runner.model, runner.tokenizer, texts, block_size=96)
    assert summary["bits_per_byte"] == pytest.approx(expected) and summary["n_texts"] == len(TEXTS)


# Ce qu’elles refusent


def nothing(work):
    pass


def write(name, text):
    return lambda work: (work / name).write_text(text, encoding="utf-8")


BAD = [
    ("merge", ("merge", "absente.yml", "fusion"), nothing, "absente.yml"),
    ("merge", MERGE, write("recette.yml", "a: [1"), "recette.yml"),
    ("merge", MERGE, write("recette.yml", "- base\n- autre\n"), "elle doit être un dictionnaire"),
    ("merge", MERGE, lambda work: recipe(work, merge_method="mélange"), "mélange"),
    ("merge", MERGE, lambda work: recipe(work, merge_methode="slerp"), "merge_methode"),
    ("merge", MERGE, lambda work: recipe(work, dtype="int3"), "int3"),
    ("merge", MERGE, lambda work: recipe(work, slices=[{"sources": [{"model": "absent", "layer_range": [0, 3]}]}]),
     "absent"),
    ("merge", ("merge", "recette.yml", "base"), nothing, "existe déjà"),
    ("merge", ("merge", "recette.yml", "qa.jsonl", "--force"), nothing, "n’est pas un dossier de modèle"),
    ("merge", ("merge", "recette.yml"), nothing, "il manque l’argument"),
    ("merge", (*MERGE, "--threads", "0"), nothing, "il faut au moins 1"),
    ("generate", ("generate", "--model", "base"), nothing, "il manque l’argument 'TEXTE'"),
    ("generate", ("generate", "Bonjour."), nothing, "il manque l’option '--model'"),
    ("generate", ("generate", "--model", "base", " "), nothing, "Le texte est vide"),
    ("generate", ("generate", "--model", "base", "mot " * 200), nothing, "Texte trop long"),
    ("generate", ("generate", "--model", "absent", "Bonjour."), nothing, "Modèle introuvable"),
    ("generate", ("generate", "--model", "auteur/absent", "Bonjour."), nothing, "llama fetch smollm2"),
    ("generate", ("generate", "--model", "poids.bin", "Bonjour."), write("poids.bin", "x"), "pickle"),
    ("generate", ("generate", "--model", "faux.gguf", "Bonjour."), write("faux.gguf", "x"), "GGUF"),
    ("generate", ("generate", "--model", "contributions", "Bonjour."), nothing, "n’est pas un modèle"),
    ("generate", (*GENERATE, "--temperature", "-1"), nothing, "il faut au moins 0"),
    ("generate", (*GENERATE, "--top-p", "2"), nothing, "--top-p = 2.0"),
    ("generate", (*GENERATE, "--min-p", "-0.1"), nothing, "--min-p = -0.1"),
    ("generate", (*GENERATE, "--top-k", "0"), nothing, "il faut au moins 1"),
    ("generate", (*GENERATE, "--repetition-penalty", "0"), nothing, "--repetition-penalty = 0.0"),
    ("generate", (*GENERATE, "--max-new-tokens", "0"), nothing, "il faut au moins 1"),
    ("generate", (*GENERATE, "--device", "cuda"), nothing, "Aucun GPU"),
    ("generate", (*GENERATE, "--out", "qa.jsonl"), nothing, "existe déjà"),
    ("generate", (*GENERATE, "--out", "."), nothing, "est un dossier"),
    ("chat", ("chat",), nothing, "il manque l’option '--model'"),
    ("chat", ("chat", "--model", "absent"), nothing, "Modèle introuvable"),
    ("chat", (*CHAT, "--temperature", "chaud"), nothing, "un nombre est attendu"),
    ("chat", (*CHAT, "--top-p", "0"), nothing, "--top-p = 0.0"),
    ("chat", (*CHAT, "--out", "qa.jsonl"), nothing, "existe déjà"),
    ("chat", (*CHAT, "--device", "cuda"), nothing, "Aucun GPU"),
    ("chat", (*CHAT, "Bonjour."), nothing, "argument en trop"),
    ("evaluate", ("evaluate", "--model", "absent", "--data", "qa.jsonl"), nothing, "Modèle introuvable"),
    ("evaluate", ("evaluate", "--model", "base", "--data", "absent.csv"), nothing, "introuvable"),
    ("evaluate", ("evaluate", "--model", "base", "--data", "absente"), nothing, "ni une source"),
    ("evaluate", ("evaluate", "--model", "base", "--data", "vide.csv"), write("vide.csv", ""), "est vide"),
    ("evaluate", ("evaluate", "--model", "base", "--data", "rien.csv"), write("rien.csv", "question,réponse\n"),
     "aucune donnée"),
    ("evaluate", (*EVALUATE, "--input-key", "question"), nothing, "--output-key"),
    ("evaluate", (*EVALUATE, "--input-key", "q", "--output-key", "r"), nothing, "n’a pas de colonne"),
    ("evaluate", ("evaluate", "--model", "base", "--data", "examen", "--limit", "3"), nothing, "par groupes de 4"),
    ("evaluate", (*EVALUATE, "--limit", "-1"), nothing, "il faut au moins 0"),
    ("evaluate", (*EVALUATE, "--batch-size", "0"), nothing, "il faut au moins 1"),
    ("evaluate", (*EVALUATE, "--out", "qa.jsonl"), nothing, "existe déjà"),
]


@pytest.mark.parametrize("command, arguments, prepare, message", BAD)
def test_bad_input_is_one_french_line_and_touches_nothing(work, monkeypatch, command, arguments, prepare, message):
    monkeypatch.setattr("llama.sources.fetch", lambda name: work)  # la source, sans le réseau
    prepare(work)
    before = snapshot(work)
    result = run(*arguments)
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert result.exit_code == 2 and message in last, result.output
    assert result.stdout == "" and "Traceback" not in result.output and snapshot(work) == before
    assert_french(last)
    assert arguments[0] == command
