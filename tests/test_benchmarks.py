"""`benchmarks` : chaque commande tourne, sur des réglages minuscules, et rend un tableau et un JSON valides."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

from llama.config import Config

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 32, "block_size": 16}
TRAINING = {"batch_size": 2, "repeats": 1, "processes": False}
COMMANDS = {
    "training_moe": TRAINING | {"config": Config(**TINY, num_local_experts=4)},
    "training_dense": TRAINING | {"config": Config(**TINY)},
    "decoding": {"source": "modèle", "n_tokens": 2, "repeats": 1, "n_texts": 1, "processes": False},
    "merging": {"source": "modèle", "repeats": 1},
    "lora": {"source": "modèle", "shape": (2, 8), "repeats": 1, "processes": False},
    "tokenizer": {"n_bytes": 20_000, "vocab_size": 300, "repeats": 1, "processes": False},
}
READS_SOURCES = ("decoding", "tokenizer")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "bandwidth", lambda: 5e10)
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype: 1e11)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.reseau) if name in READS_SOURCES else name for name in COMMANDS]
)
def test_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(COMMANDS[name])
    if "source" in settings:
        settings["source"] = str(make_model(tmp_path / "modèle"))
    report = importlib.import_module(name).measure(**settings)
    out = tmp_path / "neuf" / "mesure.json"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--json", str(out)])
    importlib.import_module("measure").main(lambda: report)
    printed, content = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert content["title"] == report.title and content["title"] in printed
    assert content["measures"] and content["machine"]["threads"] >= 1
    for measure in content["measures"]:
        assert measure["name"] in printed and measure["ratio"] > 0
        assert measure["reached"] is (None if measure["target"] is None else measure["ratio"] >= measure["target"])
    assert all(note in printed for note in content["notes"])
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def sleeper() -> object:
    """Une préparation que `pickle` sait transmettre."""
    return int


def test_contenders_race_in_their_own_processes_turn_by_turn() -> None:
    times, peaks = importlib.import_module("measure").race({"a": sleeper, "b": sleeper}, repeats=2)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}
    assert all(second >= 0 for seconds in times.values() for second in seconds) and min(peaks.values()) > 1e6


def test_ratio_is_above_one_when_ours_is_better() -> None:
    measure = importlib.import_module("measure")
    speed = measure.Measure("vitesse", "jetons/s", [20, 30, 40], [10, 10, 10], target=3, limit=60)
    cost = measure.Measure("temps", "s", [1, 2], [4, 4], target=5, limit=1, smaller_is_better=True)
    assert speed.ratios == [2, 3, 4] and cost.ratios == [2, 4]
    assert speed.to_dict()["reached"] and not cost.to_dict()["reached"]
    assert speed.to_dict()["share_of_limit"] == 0.5 and cost.to_dict()["share_of_limit"] == 1 / 1.5


@pytest.mark.parametrize("value, text", [(1234.5, "1\u202f230"), (0.01234, "0,0123"), (2, "2"), (18.64, "18,6")])
def test_numbers_are_french(value: float, text: str) -> None:
    assert importlib.import_module("measure").french(value) == text


def test_all_gathers_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Une commande qui échoue n’empêche pas les autres, et se voit au code de retour."""
    everything = importlib.import_module("all")
    program = (
        "import sys, measure\n"
        "if 'rate' in sys.argv[0]: sys.exit(1)\n"
        "measure.main(lambda: measure.Report('Titre', [measure.Measure('m', 's', [1.0], [2.0])]))\n"
    )
    for name in ("tient", "rate"):
        (tmp_path / f"{name}.py").write_text(program, encoding="utf-8")
    monkeypatch.setattr(everything, "__file__", str(tmp_path / "all.py"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    assert everything.main(["tient", "rate", "--json", str(tmp_path / "bench.json")]) == 1
    reports = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [(r["name"], r["measures"][0]["ratio"]) for r in reports] == [("tient", 0.5)]
    assert "Récapitulation" in capsys.readouterr().out
