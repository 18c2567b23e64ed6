"""`cli` : chaque commande, son aide, et une fois pour de bon, dans son processus."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_console import assert_french
from tiny_models import PAIRS, make_model, snapshot, write_pairs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llama
from llama import cli

COMMANDS = ["fetch", "train", "finetune", "distill", "merge", "generate", "chat", "evaluate"]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(Path(llama.__file__).parents[1]), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def help_of(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, [*arguments, "--help"], prog_name="llama")
    assert result.exit_code == 0
    return result.output


# L’aide


def test_the_commands_come_in_the_order_of_the_course():
    listed = help_of().partition("Commandes\u00a0:\n")[2]
    assert re.findall(r"^  (\w+)", listed, flags=re.MULTILINE) == COMMANDS
    assert "…" not in listed  # aucun résumé n’est coupé
    assert_french(help_of())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_french_and_shows_examples(command):
    text = help_of(command)
    assert_french(text)
    assert not re.search(r"[^\s\u00a0][;:]\s", text)  # une espace insécable devant
    assert text.partition("Exemples\u00a0:\n")[2].count(f"    llama {command} ") >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_the_examples_exist(command):
    text = help_of(command)
    examples, _, options = text.partition("Exemples\u00a0:\n")[2].partition("Options\u00a0:\n")
    known = set(re.findall(r"^  (--[\w-]+)", options, flags=re.MULTILINE))
    used = set(re.findall(r"(?<=\s)--[\w-]+", examples)) - {"--nproc-per-node"}
    assert used <= known and used | {"--help"} <= known


def test_the_same_option_is_said_the_same_way():
    """`--seed`, `--force`, `--json`… n’ont qu’un sens d’une commande à l’autre."""
    texts = {}
    for command in COMMANDS[1:]:
        for option in ("--seed", "--threads", "--force", "--json", "--model", "--input-key"):
            found = re.search(rf"^  {option} .*\n(?: {{10,}}.*\n)*", help_of(command), flags=re.MULTILINE)
            if found:
                texts.setdefault(option, set()).add(re.sub(r"\s+", " ", found[0]))
    assert len(texts) == 6 and all(len(variants) == 1 for variants in texts.values()), texts


# Pour de bon


def launch(*arguments: str, folder: Path, typed: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llama", *arguments], cwd=folder, env=ENVIRONMENT, input=typed, capture_output=True,
        text=True, timeout=120,
    )


def done(*arguments: str, folder: Path) -> dict:
    result = launch(*arguments, "--json", folder=folder)
    assert result.returncode == 0, result.stderr
    assert_french(result.stderr)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("travail")
    make_model(folder / "base")
    make_model(folder / "autre", seed=1)
    write_pairs(folder / "qa.jsonl", PAIRS)
    return folder


def test_help_answers_at_once(work):
    """Ni torch ni transformers ne se chargent pour dire l’aide : on compte le temps du processeur."""
    program = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'llama', '--help'], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.5


def test_fetch(work):
    before = snapshot(work)
    result = launch("fetch", "inconnue", folder=work)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith("Source inconnue")
    assert result.stderr.count("\n") == 1 and snapshot(work) == before
    listed = launch("fetch", "--list", "--json", folder=work)
    assert listed.returncode == 0 and json.loads(listed.stdout)[0]["name"] == "contributions"


def test_train(work):
    """Sur le corpus livré avec la bibliothèque, sans réseau."""
    arguments = ("--data", "atelier", "--vocab-size", "300", "--steps", "2", "--batch-size", "2", "--eval-every", "0")
    summary = done("train", *arguments, "--out", "neuf", folder=work)
    assert summary["steps"] == 2 and AutoModelForCausalLM.from_pretrained(work / "neuf").config.vocab_size == 300


def test_train_on_two_processes(work):
    """Les mêmes pertes qu’en un seul processus ; un seul parle et écrit."""
    arguments = ("train", "--data", str(work / "qa.jsonl"), "--vocab-size", "300", "--steps", "3", "--batch-size", "4",
                 "--eval-every", "0")
    alone = CliRunner().invoke(cli.app, [*arguments, "--out", str(work / "un")])
    assert alone.exit_code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, "-m", "llama", *arguments, "--out", "deux", "--json"], cwd=work, env=ENVIRONMENT,
        capture_output=True, text=True, timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 3 and result.stderr.count("J’entraîne un modèle") == 1
    losses = [[record["loss"] for record in json.loads((work / name / "history.json").read_text())["steps"]]
              for name in ("un", "deux")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_finetune_then_generate(work):
    arguments = ("--model", "base", "--data", "qa.jsonl", "--input-key", "question", "--output-key", "réponse")
    summary = done("finetune", *arguments, "--steps", "2", "--out", "appris", folder=work)
    assert summary["steps"] == 2 and summary["n_questions"] == 4
    result = launch("generate", "--model", "appris", "Combien font 2 et 2 ?", "--max-new-tokens", "5", folder=work)
    assert result.returncode == 0 and result.stdout.strip("\n") and "Je charge appris." in result.stderr


def test_distill(work):
    arguments = ("--teacher", "base", "--data", "qa.jsonl", "--layers", "1", "--steps", "2", "--batch-size", "2")
    assert done("distill", *arguments, "--out", "élève", folder=work)["steps"] == 2


def test_merge(work):
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "autre")]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
    (work / "config.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    summary = done("merge", "config.yml", "fusion", "--test", "Bonjour.", folder=work)
    assert summary["method"] == "linear" and summary["test"]["prompt"] == "Bonjour."


def test_evaluate(work):
    summary = done("evaluate", "--model", "base", "--data", "qa.jsonl", "--answers", "2", folder=work)
    assert summary["n_questions"] == len(PAIRS) and summary["loss"] > 0 and 0 <= summary["f1"] <= 1


def test_chat(work):
    result = launch("chat", "--model", "base", "--max-new-tokens", "4", folder=work, typed="Bonjour.\n/quitter\n")
    assert result.returncode == 0 and result.stdout.strip("\n") and "/quitter" in result.stderr


def test_ctrl_c_then_the_same_command(work, monkeypatch):
    arguments = ("train", "--data", "qa.jsonl", "--vocab-size", "300", "--batch-size", "2", "--eval-every", "0",
                 "--checkpoint-every", "1", "--steps", "60", "--out", "coupé")
    process = subprocess.Popen([sys.executable, "-m", "llama", *arguments], cwd=work, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any((work / "coupé/checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, complaint = process.communicate(timeout=60)
    last = complaint.rstrip("\n").splitlines()[-1]
    assert process.returncode == 130 and printed == "" and "relancez la même commande" in last
    assert not (work / "coupé/config.json").exists()
    monkeypatch.chdir(work)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0 and "Je reprends au pas " in result.stderr
    history = json.loads((work / "coupé/history.json").read_text())
    assert [record["step"] for record in history["steps"]] == list(range(1, 61))
