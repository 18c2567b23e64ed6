"""`checkpoint` : un point de reprise est entier ou n’existe pas, et ce qui est abîmé est nommé."""

import errno
import json

import pytest
import torch
from merge_models import snapshot

from llama import checkpoint
from llama.config import LlamaError

TENSORS = {"model": {"a": torch.arange(6.0).view(2, 3)}, "random": {"cpu": torch.arange(8, dtype=torch.uint8)}}


def write(folder, *steps, keep=9):
    for step in steps:
        checkpoint.save(folder, step, TENSORS, {"é": [step, 0.1]}, keep)


def refused(folder):
    """La seule ligne de l’erreur ; le dossier n’a pas bougé."""
    before = snapshot(folder)
    with pytest.raises(LlamaError) as error:
        checkpoint.load(folder)
    message = str(error.value)
    assert "\n" not in message and snapshot(folder) == before
    return message


def test_round_trip(tmp_path):
    write(tmp_path, 3)
    found = checkpoint.load(tmp_path)
    assert found.step == 3 and found.state == {"é": [3, 0.1]}
    for group, content in TENSORS.items():
        for name, tensor in content.items():
            assert torch.equal(found.tensors[group][name], tensor)


def test_absent_is_none(tmp_path):
    assert checkpoint.load(tmp_path / "rien") is None


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000003", "000004"]


def test_leftovers_of_a_kill_are_ignored(tmp_path):
    write(tmp_path, 1)
    partial = tmp_path / ".000002.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"coup")
    assert checkpoint.load(tmp_path).step == 1
    write(tmp_path, 2)
    assert checkpoint.load(tmp_path).step == 2 and not partial.exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_damage_is_named_and_nothing_is_touched(tmp_path, damage):
    write(tmp_path, 1, 2)
    file = tmp_path / "000002" / "model.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
    message = refused(tmp_path)
    assert "tronqué ou altéré" in message and str(file) in message and "point précédent" in message
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("content, cause", [
    ("{", "illisible"), ("[]", "n’est pas un point de reprise"),
    (json.dumps({"format": "autre/9"}), "n’est pas un point de reprise"),
    ("[" * 100_000, "illisible"),
    (json.dumps({"format": checkpoint.FORMAT}), "illisible"),
    (json.dumps({"format": checkpoint.FORMAT, "state": {}, "files": {}}), "illisible"),
    (json.dumps({"format": checkpoint.FORMAT, "step": 1, "state": {}, "files": []}), "illisible"),
    (json.dumps({"format": checkpoint.FORMAT, "step": 1, "state": {}, "files": {"model.safetensors": 3}}), "illisible"),
    (json.dumps({"format": checkpoint.FORMAT, "step": 1, "state": {}, "files": {
        "absent.safetensors": {"size": 1, "sha256": ""}}}), "tronqué ou altéré"),
])
def test_foreign_state_is_named(tmp_path, content, cause):
    write(tmp_path, 1)
    (tmp_path / "000001" / "state.json").write_text(content)
    assert cause in refused(tmp_path)


def test_missing_state_is_named(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "000001" / "state.json").unlink()
    assert "illisible" in refused(tmp_path)


def test_full_disk_keeps_the_previous_one(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(LlamaError, match="disque plein") as error:
        write(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert checkpoint.load(tmp_path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]


def test_no_pickle_on_disk(tmp_path):
    write(tmp_path, 1)
    assert {p.suffix for p in (tmp_path / "000001").iterdir()} == {".safetensors", ".json"}
