"""`peft_format` : un dossier d’adaptateur est relu tel qu’écrit, et ce qui l’abîme est nommé."""

import errno
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import peft_format
from llama.config import LlamaError
from llama.peft_format import SETTINGS_FILE, TENSORS_FILE, StoredAdapter

MATRICES = {
    f"model.layers.{i}.self_attn.q_proj": (torch.arange(12.0).view(2, 6) + i, torch.ones(4, 2) - i)
    for i in range(2)
}
ADAPTER = StoredAdapter(rank=2, alpha=4, dropout=0.1, base="petit", matrices=MATRICES)
KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
EMBEDDING_KEY = "base_model.model.model.embed_tokens.lora_embedding_A"


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*")}


@pytest.fixture
def folder(tmp_path):
    peft_format.write(tmp_path / "lora", ADAPTER, ["q_proj"], force=False)
    return tmp_path / "lora"


def refused(folder):
    """La seule ligne de l’erreur ; le dossier n’a pas bougé."""
    before = digest(folder)
    with pytest.raises(LlamaError) as error:
        peft_format.read(folder)
    assert digest(folder) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip(folder):
    found = peft_format.read(folder)
    assert found[:4] == ADAPTER[:4]
    assert found.matrices.keys() == MATRICES.keys()
    for layer, pair in MATRICES.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, found.matrices[layer], strict=True))
    assert {p.name for p in folder.iterdir()} == {SETTINGS_FILE, TENSORS_FILE}


def test_nothing_is_overwritten_without_force(folder):
    (folder / "README.md").write_text("une note")
    before = digest(folder)
    with pytest.raises(LlamaError, match="existe déjà"):
        peft_format.write(folder, ADAPTER._replace(alpha=8), ["q_proj"], force=False)
    assert digest(folder) == before
    peft_format.write(folder, ADAPTER._replace(alpha=8), ["q_proj"], force=True)
    assert peft_format.read(folder).alpha == 8
    assert (folder / "README.md").read_text() == "une note"


@pytest.mark.parametrize("file", [SETTINGS_FILE, TENSORS_FILE])
def test_half_an_adapter_is_not_overwritten_either(folder, file):
    (folder / file).unlink()
    before = digest(folder)
    with pytest.raises(LlamaError, match="existe déjà"):
        peft_format.write(folder, ADAPTER, ["q_proj"], force=False)
    assert digest(folder) == before


@pytest.mark.parametrize("step", ["save_file", "json.dumps", "os.replace"])
def test_full_disk_keeps_the_previous_one(folder, monkeypatch, step):
    before = digest(folder)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"llama.peft_format.{step}", full)
    with pytest.raises(LlamaError, match="ne peut pas être écrit .disque plein") as error:
        peft_format.write(folder, ADAPTER._replace(alpha=8), ["q_proj"], force=True)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert digest(folder) == before


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "lora").write_text("occupé")
    with pytest.raises(LlamaError, match="ne peut pas être écrit"):
        peft_format.write(tmp_path / "lora", ADAPTER, ["q_proj"], force=False)
    assert (tmp_path / "lora").read_text() == "occupé"


def edit_settings(**changes):
    def damage(folder):
        settings = json.loads((folder / SETTINGS_FILE).read_text()) | changes
        (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    return damage


def edit_tensors(remove=None, add=None, shape=(2, 6)):
    """Ôte les tenseurs dont le nom contient `remove`, puis ajoute `add`."""
    def damage(folder):
        tensors = load_file(folder / TENSORS_FILE)
        kept = {key: value for key, value in tensors.items() if remove is None or remove not in key}
        save_file(kept | ({add: torch.ones(shape)} if add else {}), folder / TENSORS_FILE)
    return damage


def replace_file(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def truncate(folder):
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-3])


def pickle_instead(folder):
    (folder / TENSORS_FILE).rename(folder / "adapter_model.bin")


DAMAGES = {
    "réglages absents": (lambda folder: (folder / SETTINGS_FILE).unlink(), "introuvable"),
    "tenseurs absents": (lambda folder: (folder / TENSORS_FILE).unlink(), "introuvable : enregistrez"),
    "pickle": (pickle_instead, "est un pickle, qui n’est pas lu"),
    "réglages tronqués": (replace_file(SETTINGS_FILE, b'{"r": 2,'), "n’est pas du JSON complet"),
    "réglages en latin-1": (replace_file(SETTINGS_FILE, b'{"r": "\xe9"}'), "n’est pas de l’UTF-8"),
    "réglages en liste": (replace_file(SETTINGS_FILE, b"[1]"), "ne décrit pas un LoRA"),
    "autre méthode": (edit_settings(peft_type="IA3"), "ne décrit pas un LoRA"),
    "un modèle": (replace_file(SETTINGS_FILE, b'{"model_type": "llama"}'), "ne décrit pas un LoRA"),
    "DoRA": (edit_settings(use_dora=True), "non prise en charge : use_dora"),
    "rsLoRA": (edit_settings(use_rslora=True), "non prise en charge : use_rslora"),
    "rangs par couche": (edit_settings(rank_pattern={"q_proj": 8}), "non prise en charge : rank_pattern"),
    "alphas par couche": (edit_settings(alpha_pattern={"q_proj": 8}), "non prise en charge : alpha_pattern"),
    "modules entiers": (edit_settings(modules_to_save=["lm_head"]), "non prise en charge : modules_to_save"),
    "poids transposés": (edit_settings(fan_in_fan_out=True), "non prise en charge : fan_in_fan_out"),
    "biais": (edit_settings(bias="all"), "non prise en charge : bias"),
    "PiSSA": (edit_settings(init_lora_weights="pissa"), "non prise en charge : init_lora_weights"),
    "option future": (edit_settings(use_superlora=3), "non prise en charge : use_superlora"),
    "rang nul": (edit_settings(r=0), "Le rang est un entier strictement positif (reçu : 0)"),
    "rang textuel": (edit_settings(r="8"), "Le rang est un entier strictement positif (reçu : '8')"),
    "alpha absent": (edit_settings(lora_alpha=None), "alpha est un nombre strictement positif (reçu : None)"),
    "alpha infini": (edit_settings(lora_alpha=float("inf")), "un nombre strictement positif (reçu : inf)"),
    "dropout": (edit_settings(lora_dropout=1.5), "dropout est une probabilité"),
    "autre rang": (edit_settings(r=3), "est de forme (2, 6), sans le rang r = 3 annoncé"),
    "tenseurs tronqués": (truncate, "tronqué ou altéré"),
    "tenseurs vides": (replace_file(TENSORS_FILE, b""), "tronqué ou altéré"),
    "page d’erreur": (replace_file(TENSORS_FILE, b"<html>404 Not Found</html>"), "tronqué ou altéré"),
    "A sans B": (edit_tensors(remove=KEY), "il manque A ou B à model.layers.1.self_attn.q_proj"),
    "rien": (edit_tensors(remove=""), "il manque A ou B à toutes les couches"),
    "plongements": (edit_tensors(add=EMBEDDING_KEY), "lora_embedding_A n’est pas une matrice de LoRA"),
    "poids entiers": (edit_tensors(add="model.norm.weight"), "norm.weight n’est pas une matrice de LoRA"),
    "une convolution": (edit_tensors(add=KEY, shape=(2, 6, 1, 1)), "est de forme (2, 6, 1, 1), sans le rang"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_nothing_is_touched(folder, name):
    damage, cause = DAMAGES[name]
    damage(folder)
    assert cause in refused(folder).replace("\u00a0", " ")


def test_absent_folder(tmp_path):
    assert "introuvable" in refused(tmp_path / "rien")
