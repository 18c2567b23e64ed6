"""`workbench` : un dossier est neuf, en cours ou achevé ; on ne touche pas à celui d’autrui."""

import json

import pytest
import torch
from tiny_models import snapshot

from llama import checkpoint, distributed
from llama.config import LlamaError
from llama.history import History
from llama.workbench import Output, check_summary_file, find_device, machine, write_summary

ARGUMENTS = {"data": "atelier", "rank": 8}


def output(folder, force=False, command="finetune", inputs=(), **changes):
    return Output(folder, force, command, ARGUMENTS | changes, inputs)


def save(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("poids")


def checkpointed(folder, step=3):
    """Un apprentissage interrompu après un point de reprise."""
    with pytest.raises(KeyboardInterrupt), output(folder) as out:
        checkpoint.save(out.checkpoints, step, {"model": {"w": torch.ones(2)}}, {})
        raise KeyboardInterrupt


def test_a_finished_folder_holds_the_model_the_history_and_the_summary(tmp_path):
    folder = tmp_path / "a/b"
    with output(folder) as out:
        checkpoint.save(out.checkpoints, 3, {"model": {"w": torch.ones(2)}}, {})
        summary = out.finish({"loss": 1.5}, History(), save)
    assert {path.name for path in folder.iterdir()} == {"history.json", "model.safetensors", "summary.json"}
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["command"] == "finetune" and summary["arguments"] == ARGUMENTS and summary["loss"] == 1.5
    assert summary["files"] == ["model.safetensors"] and summary["seconds"] >= 0 and summary["folder"] == str(folder)


def test_interrupted_then_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="point de reprise du pas 3 est dans .*relancez la même commande"):
        with output(tmp_path / "a") as out:
            checkpoint.save(out.checkpoints, 3, {"model": {"w": torch.ones(2)}}, {})
            raise KeyboardInterrupt
    again = output(tmp_path / "a")
    assert again.resumed == 3
    with again:
        assert checkpoint.steps(again.checkpoints) == [3]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LlamaError("La perte n’est plus un nombre.")])
def test_nothing_is_left_when_nothing_can_be_resumed(tmp_path, error):
    with pytest.raises(type(error)) as raised, output(tmp_path / "a"):
        raise error
    assert not (tmp_path / "a").exists()
    assert ("rien n’est gardé" in str(raised.value)) == isinstance(error, KeyboardInterrupt)


def test_force_starts_again(tmp_path):
    checkpointed(tmp_path / "a")
    out = output(tmp_path / "a", force=True, rank=16)
    assert out.resumed == 0
    with out:
        assert checkpoint.steps(out.checkpoints) == []


def test_force_erases_only_what_the_command_wrote(tmp_path):
    prepare_finished(tmp_path / "a")
    (tmp_path / "a/notes.txt").write_text("dix ans")
    (tmp_path / "a/vieux.safetensors").write_text("autres poids")
    with pytest.raises(LlamaError), output(tmp_path / "a", force=True):
        assert not (tmp_path / "a/model.safetensors").exists()
        raise LlamaError("La perte n’est plus un nombre.")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"notes.txt", "vieux.safetensors"}


def test_a_save_cut_short_is_done_again(tmp_path):
    checkpointed(tmp_path / "a")

    def broken(folder):
        save(folder)
        raise LlamaError("Disque plein.")

    with pytest.raises(LlamaError, match="Disque plein"), output(tmp_path / "a") as out:
        out.finish({}, History(), broken)
    assert not (tmp_path / "a/summary.json").exists()
    with output(tmp_path / "a") as out:
        assert out.resumed == 3
        out.finish({}, History(), save)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"history.json", "model.safetensors", "summary.json"}


def prepare_finished(folder):
    with output(folder) as out:
        out.finish({}, History(), save)


def foreign_file(folder, name, content):
    folder.mkdir()
    (folder / name).write_text(content)


def prepare_foreign(folder):
    folder.mkdir()
    (folder / "thèse.txt").write_text("dix ans")


@pytest.mark.parametrize("prepare, options, message", [
    (lambda folder: folder.write_text("x"), {}, "est un fichier"),
    (prepare_foreign, {}, "ne vient pas de llama"),
    (prepare_foreign, {"force": True}, "ne vient pas de llama"),
    (prepare_finished, {}, "existe déjà"),
    (checkpointed, {"rank": 16}, "rank\u00a0: 8 ≠ 16"),
    (checkpointed, {"command": "train"}, "commande finetune"),
    (lambda folder: foreign_file(folder, "command.json", "{"), {"force": True}, "ne vient pas de llama"),
    (lambda folder: foreign_file(folder, "command.json", "[]"), {"force": True}, "ne vient pas de llama"),
    (lambda folder: foreign_file(folder, "summary.json", '{"pages": 12}'), {"force": True}, "ne vient pas de llama"),
    (prepare_finished, {"force": True, "inputs": ["a/model.safetensors"]}, "contient «\u00a0a/model.safetensors"),
    (prepare_finished, {"force": True, "inputs": ["a"]}, "contient «\u00a0a\u00a0»"),
])
def test_refusals_leave_the_folder_as_it_was(tmp_path, monkeypatch, prepare, options, message):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "a")
    before = snapshot(tmp_path)
    with pytest.raises(LlamaError) as refusal:
        output(tmp_path / "a", **options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value) and snapshot(tmp_path) == before


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with output(tmp_path / "a") as out:
        out.finish({}, History(), save)
    assert not (tmp_path / "a").exists()


def test_summary_files(tmp_path):
    path = tmp_path / "mesures.json"
    write_summary(None, {}, force=False)
    write_summary(path, {"f1": 0.5}, force=False)
    for wrong, message in ((path, "existe déjà"), (tmp_path, "est un dossier")):
        with pytest.raises(LlamaError, match=message):
            check_summary_file(wrong, force=False)
    write_summary(path, {"f1": 0.6}, force=True)
    assert json.loads(path.read_text()) == {"f1": 0.6}


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(LlamaError, match="Aucun GPU"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 1) and find_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for name in ("auto", "cuda"):
        with pytest.raises(LlamaError, match="3 processus pour 2 GPU"):
            find_device(name)
    assert find_device("cpu").type == "cpu"


def test_a_seed_too_large_is_refused():
    with pytest.raises(LlamaError, match="--seed est un entier de 32 bits"), machine("cpu", seed=2**32):
        pytest.fail("la graine devait être refusée")


def test_the_machine_has_its_seed_and_its_threads():
    threads = torch.get_num_threads()
    try:
        with machine("cpu", threads=2, seed=5) as place:
            first = torch.rand(3)
            assert place.type == "cpu" and torch.get_num_threads() == 2
        with machine("cpu", seed=5):
            assert torch.equal(torch.rand(3), first)
    finally:
        torch.set_num_threads(threads)
