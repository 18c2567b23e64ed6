"""`parents` : ce qui ne se fusionne pas est refusé, et le message dit ce qui diffère."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from merge_models import assert_refused, edit_config, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from llama.config import LlamaError
from llama.parents import Parent, aligned, check_compatible, token_order
from llama.recipe import merge

WORDS = ["<unk>", *(f"m{i}" for i in range(39))]


def linear(*models: str) -> dict:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models]}


@pytest.fixture
def pair(tmp_path) -> tuple[str, str]:
    return make_model(tmp_path / "a", 1), make_model(tmp_path / "b", 2)


def edit_weights(folder: str, change) -> None:
    path = Path(folder) / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("key, value", [
    ("model_type", "mistral"), ("hidden_size", 32), ("intermediate_size", 48), ("num_attention_heads", 2),
    ("num_key_value_heads", 4), ("head_dim", 8), ("tie_word_embeddings", True), ("num_local_experts", 4),
])
def test_other_architectures_are_refused(tmp_path, pair, key, value):
    edit_config(pair[0], head_dim=4, num_local_experts=0)
    edit_config(pair[1], **{key: value})
    assert_refused(linear(*pair), tmp_path, f"Architectures différentes : {key} vaut .* dans .*/a et {value} dans .*/b")


def test_what_an_old_configuration_does_not_say_is_not_held_against_it(pair):
    edit_config(pair[0], head_dim=4)
    edit_config(pair[1], head_dim=None)
    check_compatible([Parent(name) for name in pair])


def test_missing_tensors_are_refused(tmp_path, pair):
    edit_weights(pair[1], lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))
    assert_refused(linear(*pair), tmp_path, r"/b n’a pas « \.mlp\.up_proj\.weight », que .*/a a")


def test_missing_tensors_out_of_layers_are_refused(tmp_path, pair):
    edit_weights(pair[0], lambda weights: (weights.pop("lm_head.weight"), weights.pop("model.norm.weight")))
    assert_refused(linear(*pair), tmp_path, r"/a n’a pas « lm_head\.weight » \(et 1 autres\), que .*/b a")


def test_other_shapes_are_refused(tmp_path, pair):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(pair[1], lambda weights: weights.update({name: weights[name][:-1].clone()}))
    message = r"Formes différentes : model\.layers\.1\..*\(24, 16\) dans .*\(23, 16\) dans"
    assert_refused(linear(*pair), tmp_path, message)


def test_other_vocabulary_sizes_are_refused(tmp_path, pair):
    other = make_model(tmp_path / "c", 3, vocab=48)
    assert_refused(linear(pair[0], other), tmp_path, r"lm_head\.weight est \(40, 16\) .* \(48, 16\)")


def test_other_depths_are_refused(tmp_path, pair):
    other = make_model(tmp_path / "c", 3, n_layers=6)
    assert_refused(linear(pair[0], other), tmp_path, "autant de couches : 4 pour .*/a, 6 pour .*/c")


@pytest.mark.parametrize("n_layers", [3, 5])
def test_a_configuration_that_lies_about_its_layers_is_refused(tmp_path, pair, n_layers):
    edit_config(pair[1], num_hidden_layers=n_layers)
    assert_refused(linear(*pair), tmp_path, f"annonce {n_layers} couches, les poids en ont 4")


def test_quantised_models_are_refused(tmp_path, pair):
    edit_config(pair[1], quantization_config={"quant_method": "gptq"})
    assert_refused(linear(*pair), tmp_path, "est quantifié")


def test_configurations_without_depth_are_refused(tmp_path, pair):
    edit_config(pair[1], num_hidden_layers=None)
    assert_refused(linear(*pair), tmp_path, "ne dit pas num_hidden_layers")


def test_unknown_architectures_are_refused(tmp_path, pair):
    edit_weights(pair[1], lambda weights: weights.update({"vision.layers.0.x": torch.ones(1)}))
    assert_refused(linear(*pair), tmp_path, r"architecture non reconnue \(2 piles")
    edit_weights(pair[1], lambda weights: [weights.pop(name) for name in list(weights) if "layers" in name])
    assert_refused(linear(*pair), tmp_path, r"architecture non reconnue \(0 piles")


@pytest.mark.parametrize("text, message", [
    ("{", "n’est pas du JSON complet"), ("[]", "un objet JSON est attendu"), ("\xff", "n’est pas de l’UTF-8"),
], ids=["coupé", "liste", "encodage"])
def test_unreadable_configurations_are_refused(tmp_path, pair, text, message):
    (Path(pair[1]) / "config.json").write_text(text, encoding="latin-1")
    assert_refused(linear(*pair), tmp_path, rf"config\.json.* {message}")


def test_folders_that_are_not_models_are_refused(tmp_path, pair):
    empty = tmp_path / "vide"
    empty.mkdir()
    message = r"n’est pas un dossier de modèle : pas de config\.json"
    assert_refused(linear(pair[0], str(empty)), tmp_path, message)


def test_truncated_weights_are_refused(tmp_path, pair):
    path = Path(pair[1]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert_refused(linear(*pair), tmp_path, "tronqué ou altéré")


@pytest.mark.parametrize("name", ["./absent", "/absent", "absent", "a/b/c"])
def test_missing_folders_are_refused(tmp_path, name):
    assert_refused(linear(name), tmp_path, rf"Modèle introuvable\s: «\s{name}\s»")


def test_hub_names_are_downloaded_or_refused(tmp_path, pair, monkeypatch):
    asked = []

    def download(repository, revision, **options):
        asked.append((repository, revision))
        if repository == "absent/absent":
            raise ConnectionError("pas de réseau")
        return pair[0]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_refused(linear("absent/absent"), tmp_path, r"absent/absent\s» .*Hub")
    assert Parent("equipe/modele@v2").folder == Path(pair[0])
    assert asked == [("absent/absent", None), ("equipe/modele", "v2")]


def test_lora_references_are_refused(tmp_path, pair):
    assert_refused(linear(pair[0] + "+equipe/lora"), tmp_path, "un LoRA se replie d’abord")


def test_old_rotary_tables_are_ignored(tmp_path, pair):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(pair[1], lambda weights: weights.update({name: torch.ones(2)}))
    assert merge(linear(*pair), tmp_path / "sortie", progress=False)["n_tensors"] == 39


def with_tokenizer(folder: str, words: list[str]) -> str:
    make_tokenizer(Path(folder), words)
    return folder


def test_other_vocabularies_are_refused(tmp_path, pair):
    a, b = with_tokenizer(pair[0], WORDS), with_tokenizer(pair[1], [*WORDS[:-2], WORDS[-1], WORDS[-2]])
    message = r"Vocabulaires différents : .*/a a 40 jetons et .*/b 40 ; 'm37' y porte le numéro 38 et 39"
    assert_refused(linear(a, b), tmp_path, message)
    with_tokenizer(b, WORDS[:-1])
    assert_refused(linear(a, b), tmp_path, r"40 jetons et .*/b 39 ; 'm38' y porte le numéro 39 et \(absent\)")
    with_tokenizer(b, WORDS)
    merge(linear(a, b), tmp_path / "sortie", progress=False)


def test_an_added_token_makes_another_vocabulary(tmp_path, pair):
    a, b = with_tokenizer(pair[0], WORDS[:-1]), with_tokenizer(pair[1], WORDS[:-1])
    path = Path(b) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 39, "content": "<|im_start|>"})
    path.write_text(json.dumps(content))
    assert_refused(linear(a, b), tmp_path, r"'<\|im_start\|>' y porte le numéro \(absent\) et 39")


def test_a_missing_tokenizer_is_refused_unless_all_lack_it(tmp_path, pair):
    with_tokenizer(pair[1], WORDS)
    assert_refused(linear(*pair), tmp_path, r"/a n’a pas de tokenizer\.json et .*/b en a un")


def test_unigram_vocabularies_are_read(pair):
    content = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["le", -1.5]]}, "added_tokens": None}
    (Path(pair[0]) / "tokenizer.json").write_text(json.dumps(content))
    assert Parent(pair[0]).vocabulary == {"<unk>": 0, "le": 1}


@pytest.mark.parametrize("content", ["{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}}, "added_tokens": [1]}'])
def test_unreadable_tokenizers_are_refused(tmp_path, pair, content):
    for folder in pair:
        (Path(folder) / "tokenizer.json").write_text(content)
    assert_refused(linear(*pair), tmp_path, r"tokenizer\.json n’est pas un tokenizer lisible")


def test_token_order_wants_consecutive_numbers(tmp_path, pair):
    parent = Parent(pair[0])
    with pytest.raises(LlamaError, match=r"n’a pas de tokenizer\.json"):
        token_order(parent)
    (Path(pair[0]) / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 2}}}')
    with pytest.raises(LlamaError, match="ne se suivent pas"):
        token_order(Parent(pair[0]))
    with_tokenizer(pair[0], WORDS)
    assert token_order(Parent(pair[0])) == WORDS


def test_aligned_gives_each_token_its_row(tmp_path, pair):
    """Le sien d’abord ; sinon celui du modèle de base ; sinon la moyenne de ceux qui l’ont."""
    third = make_model(tmp_path / "c", 3)
    names = [
        with_tokenizer(pair[0], ["<unk>", "le", "chat"]), with_tokenizer(pair[1], ["<unk>", "chat", "dort"]),
        with_tokenizer(third, ["<unk>", "dort", "le", "bien"]),
    ]
    a, b, c = parents = [Parent(name) for name in names]
    name, wanted = "model.embed_tokens.weight", ["<unk>", "bien", "le", "dort"]
    rows = {parent: parent.weights[name] for parent in parents}
    assert aligned(c, name, wanted, parents, a).equal(rows[c][[0, 3, 2, 1]])
    table = aligned(a, name, wanted, parents, a)
    assert table[[0, 1, 2]].equal(torch.stack([rows[a][0], rows[c][3], rows[a][1]]))
    torch.testing.assert_close(table[3], (rows[b][2] + rows[c][1]) / 2)
    assert aligned(b, name, wanted, parents, a)[2].equal(rows[a][1]), "la base l’a : la sienne, pas la moyenne"
    torch.testing.assert_close(aligned(b, name, wanted, parents, None)[2], (rows[a][1] + rows[c][2]) / 2)


def test_a_vocabulary_larger_than_its_table_is_refused(tmp_path, pair):
    with_tokenizer(pair[0], [*WORDS, "de trop"])
    with_tokenizer(pair[1], [*WORDS, "de trop"])
    recipe = linear(*pair) | {"tokenizer_source": "base"}
    assert_refused(recipe, tmp_path, "son tokenizer a plus de jetons")
