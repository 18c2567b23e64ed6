"""`shards` : ce qu’on écrit, safetensors et transformers le lisent ; ce qui est abîmé est refusé en une ligne."""

import errno
import json
import struct
from pathlib import Path

import pytest
import torch
from merge_models import snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama import shards
from llama.config import LlamaError
from llama.shards import Shards, Spec, new_folder, write_shards


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (3, 5), "b": (7,), "c": (2, 3, 4), "vide": (0, 4), "scalaire": ()}
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float32]
    return {
        name: torch.randn(size, generator=generator).to(dtype)
        for (name, size), dtype in zip(sizes.items(), dtypes, strict=True)
    }


def specs(content: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()}


def write(folder: Path, content: dict[str, torch.Tensor], **options) -> int:
    return write_shards(folder, specs(content), iter(content.values()), **options)


def test_safetensors_reads_what_we_write(tmp_path):
    content = tensors()
    n_bytes = write(tmp_path, content)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == content.keys()
    assert all(read[name].equal(tensor) and read[name].dtype == tensor.dtype for name, tensor in content.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert n_bytes == sum(tensor.nbytes for tensor in content.values())


def test_we_read_what_safetensors_writes(tmp_path):
    content = tensors()
    save_file(content, tmp_path / "model.safetensors")
    read = Shards(tmp_path)
    assert read.specs == specs(content)
    assert all(read[name].equal(tensor) for name, tensor in content.items())


@pytest.mark.parametrize("max_bytes, n_files", [(10**9, 1), (200, 3), (1, 5)])
def test_big_models_are_cut_like_on_the_hub(tmp_path, max_bytes, n_files):
    content = {f"t{i}": torch.full((5, 4), float(i)) for i in range(5)}
    write(tmp_path, content, max_bytes=max_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == n_files
    if n_files > 1:
        assert files[0] == f"model-00001-of-{n_files:05d}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 400
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
        assert all((tmp_path / file).stat().st_size <= max(max_bytes, 80) + 500 for file in files)
    read = Shards(tmp_path)
    assert all(read[name].equal(tensor) for name, tensor in content.items())


def test_tensors_are_written_as_they_come(tmp_path):
    """Le suivant n’est demandé qu’une fois le précédent sur le disque."""
    path, sizes = tmp_path / "model.safetensors", []
    content = {f"t{i}": torch.ones(300_000) for i in range(3)}

    def stream():
        for tensor in content.values():
            sizes.append(path.stat().st_size)
            yield tensor

    write_shards(tmp_path, specs(content), stream())
    assert sizes[0] < 10_000 and sizes[1] > 1_000_000 and sizes[2] > 2_000_000


def test_reading_touches_only_the_tensor_asked_for(tmp_path):
    content = {"a": torch.ones(4), "b": torch.zeros(4)}
    write(tmp_path, content)
    tensor = Shards(tmp_path)["a"]
    tensor += 1  # la projection est privée : le fichier n’est pas touché
    assert load_file(tmp_path / "model.safetensors")["a"].equal(torch.ones(4))


def test_a_wrong_tensor_is_a_bug_not_a_file(tmp_path):
    with pytest.raises(RuntimeError):
        write_shards(tmp_path, {"a": Spec(torch.float32, (2,))}, iter([torch.ones(3)]))


def refused(folder: Path, message: str) -> None:
    """Une ligne qui dit la cause ; rien n’a changé dans le dossier."""
    before = snapshot(folder)
    with pytest.raises(LlamaError, match=message) as refusal:
        Shards(folder)
    assert "\n" not in str(refusal.value) and snapshot(folder) == before


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "vide": b"",
    "en-tête coupé": struct.pack("<Q", 500) + b"{}",
    "longueur absurde": struct.pack("<Q", 2**63) + b"{}",
    "en-tête illisible": header(b"{pas du json"),
    "en-tête qui n’est pas un dictionnaire": header([1, 2]),
    "entrée sans type": header({"a": {"shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
    "places hors du fichier": header({"a": ENTRY}) + bytes(4),
    "places à l’envers": header({"a": ENTRY | {"data_offsets": [8, 0]}}) + bytes(8),
    "places et forme en désaccord": header({"a": ENTRY | {"shape": [3]}}) + bytes(8),
    "texte au lieu de places": header({"a": ENTRY | {"data_offsets": "0-8"}}) + bytes(8),
    "forme négative": header({"a": ENTRY | {"shape": [-2, -1]}}) + bytes(8),
    "forme en texte": header({"a": ENTRY | {"shape": ["2"]}}) + bytes(8),
    "places à virgule": header({"a": ENTRY | {"data_offsets": [0.0, 8.0]}}) + bytes(8),
    "crochets sans fin": header(b"[" * 100_000),
    "pickle renommé": b"\x80\x04\x95" + bytes(64),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[name])
    refused(tmp_path, "tronqué ou altéré : téléchargez-le à nouveau")


def test_a_truncated_model_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, "tronqué")


def test_integers_are_refused(tmp_path):
    save_file({"poids": torch.ones(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    refused(tmp_path, "« poids » est de type I8 ; seuls les poids flottants")


def test_folders_without_safetensors_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path, "Pas de poids safetensors .* pickle")


def test_broken_indexes_are_refused(tmp_path):
    content = {f"t{i}": torch.ones(8) for i in range(4)}
    write(tmp_path, content, max_bytes=64)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text("{")
    refused(tmp_path, "Index de poids illisible")
    index.write_text("[" * 100_000)
    refused(tmp_path, "Index de poids illisible")
    index.write_text(json.dumps({"weight_map": [1]}))
    refused(tmp_path, "Index de poids illisible")
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"absent": good["weight_map"]["t0"]}}))
    refused(tmp_path, "annonce « absent »")
    index.write_text(json.dumps(good))
    (tmp_path / good["weight_map"]["t3"]).unlink()
    refused(tmp_path, "Il manque .*00002.*, annoncé par l’index")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    outside = tmp_path / "dehors.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    model = tmp_path / "modele"
    model.mkdir()
    (model / shards.INDEX).write_text(json.dumps({"weight_map": {"a": "../dehors.safetensors"}}))
    refused(model, "Il manque")


def fill(folder: Path, text: str = "neuf") -> None:
    (folder / "config.json").write_text(text)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("existing", [False, True], ids=["absent", "vide"])
def test_a_new_folder_appears_whole(tmp_path, existing):
    out = tmp_path / "a" / "sortie"
    if existing:
        out.mkdir(parents=True)
    with new_folder(out, False, [], 0) as folder:
        assert not existing or not any(out.iterdir())
        fill(folder)
    assert listing(tmp_path) == {"a", "a/sortie", "a/sortie/config.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, LlamaError("x"), OSError(errno.ENOSPC, "disque plein")])
def test_an_interruption_leaves_what_was_there(tmp_path, error):
    out = tmp_path / "sortie"
    out.mkdir()
    fill(out, "ancien")
    expected = LlamaError if isinstance(error, OSError) else error if isinstance(error, type) else type(error)
    with pytest.raises(expected), new_folder(out, True, [], 0) as folder:
        fill(folder)
        raise error
    assert listing(tmp_path) == {"sortie", "sortie/config.json"}
    assert (out / "config.json").read_text() == "ancien"


def test_force_replaces_a_model(tmp_path):
    out = tmp_path / "sortie"
    out.mkdir()
    fill(out, "ancien")
    (out / "model-00001-of-00002.safetensors").write_text("")
    with pytest.raises(LlamaError, match="existe déjà.*--force"), new_folder(out, False, [], 0):
        pytest.fail("le dossier devait être refusé")
    with new_folder(out, True, [], 0) as folder:
        fill(folder)
    assert listing(tmp_path) == {"sortie", "sortie/config.json"}
    assert (out / "config.json").read_text() == "neuf"


def test_a_failed_replacement_brings_the_old_one_back(tmp_path, monkeypatch):
    out, rename = tmp_path / "sortie", Path.rename
    out.mkdir()
    fill(out, "ancien")

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(LlamaError, match="rien n’a été remplacé"), new_folder(out, True, [], 0) as folder:
        fill(folder)
    assert (out / "config.json").read_text() == "ancien"
    assert listing(tmp_path) == {"sortie", "sortie/config.json"}


def test_force_never_replaces_what_is_not_a_model(tmp_path):
    out = tmp_path / "documents"
    out.mkdir()
    (out / "these.txt").write_text("précieux")
    with pytest.raises(LlamaError, match="n’est pas un dossier de modèle"), new_folder(out, True, [], 0):
        pytest.fail("le dossier devait être refusé")
    file = tmp_path / "fichier"
    file.write_text("précieux")
    with pytest.raises(LlamaError, match="n’est pas un dossier de modèle"), new_folder(file, True, [], 0):
        pytest.fail("le fichier devait être refusé")
    assert listing(tmp_path) == {"documents", "documents/these.txt", "fichier"}


@pytest.mark.parametrize("inside", ["modele", "modele/parent"])
def test_force_never_replaces_an_input(tmp_path, inside):
    parent = tmp_path / inside
    parent.mkdir(parents=True)
    fill(tmp_path / "modele")
    with pytest.raises(LlamaError, match="à lire entre-temps"), new_folder(tmp_path / "modele", True, [parent], 0):
        pytest.fail("le dossier devait être refusé")


def test_a_full_disk_is_seen_beforehand(tmp_path):
    with pytest.raises(LlamaError, match=r"Pas assez de place.*il faut 1000000000.0 Go"):
        with new_folder(tmp_path / "sortie", False, [], 10**18):
            pytest.fail("le disque devait être trop petit")
    assert not any(tmp_path.iterdir())


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "fichier").write_text("")
    with pytest.raises(LlamaError, match="n’a pas été écrit"), new_folder(tmp_path / "fichier" / "x", False, [], 0):
        pytest.fail("le dossier devait être refusé")
