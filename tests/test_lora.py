"""`lora` : égal à peft au bit près ou presque, réversible, et le modèle de base n’est jamais touché."""

import copy
import json
import re
import tempfile
from functools import lru_cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llama.config import Config, LlamaError, TrainingConfig
from llama.data import Examples
from llama.lora import (
    LoRALinear,
    adapter_names,
    add_lora,
    fold,
    load_adapter,
    remove_lora,
    save_adapter,
    unfold,
    use_adapter,
)
from llama.model import LlamaModel
from llama.training import train

TARGETS = ["q_proj", "v_proj", "down_proj"]
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = Config(vocab_size=32, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=24, block_size=12)
IDS = torch.randint(32, (10, 4, 12), generator=torch.Generator().manual_seed(7))


def reference(seed=0, **changes) -> LlamaForCausalLM:
    """Un Llama de transformers de l’architecture de `CONFIG`, aux poids assez grands pour que tout compte."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()


def own(**changes) -> LlamaModel:
    """Le même modèle, chez nous."""
    return copy.deepcopy(_converted(tuple(changes.items())))


@lru_cache
def _converted(changes) -> LlamaModel:
    with tempfile.TemporaryDirectory() as folder:
        reference(**dict(changes)).save_pretrained(folder)
        return LlamaModel.from_pretrained(folder).eval()


def logits(model, ids=IDS[0]):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def peft_model(model, rank=4, alpha=7, dropout=0.0, seed=3, targets=TARGETS):
    torch.manual_seed(seed)
    options = {"lora_dropout": dropout, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **options))


def adapter_weights(model):
    """Les poids à entraîner, sous le nom que leur donne peft."""
    def renamed(name):
        name = re.sub(r"\.adapters\.(\w+)\.([AB])$", r".lora_\2.\1.weight", name)
        return name.removeprefix("base_model.model.")

    return {renamed(name): p for name, p in model.named_parameters() if p.requires_grad}


def randomize(model, seed=0):
    """Donne à B des valeurs quelconques : nulle, elle cacherait tout."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_weights(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".adapters." not in name}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# Égal à peft


@pytest.mark.parametrize("targets", [TARGETS, ALL_TARGETS, ["layers.1.self_attn.q_proj"]])
def test_same_seed_same_initial_weights_as_peft(targets):
    ours, theirs = reference(), peft_model(reference(), targets=targets)
    add_lora(ours, 4, 7, targets, seed=3)
    assert_same(adapter_weights(ours), adapter_weights(theirs))


def test_a_new_adapter_changes_nothing():
    model = reference()
    before = logits(model)
    add_lora(model, 4, 7, ALL_TARGETS)
    assert torch.equal(logits(model), before)


def test_an_adapted_head_counts():
    """La tête n’est pas qu’une matrice : son adaptateur agit sur les logits, comme chez peft."""
    ours, theirs = own(tie_word_embeddings=False), peft_model(reference(tie_word_embeddings=False), targets=["lm_head"])
    add_lora(ours, 4, 7, ["lm_head"], seed=3)
    with torch.no_grad():
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                if "lora_B" in name or name.endswith(".B"):
                    parameter.fill_(0.1)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(ours), logits(own(tie_word_embeddings=False)), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_forward_as_peft(dtype):
    ours, theirs = reference().to(dtype), peft_model(reference().to(dtype))
    add_lora(ours, 4, 7, TARGETS)
    for model in (ours, theirs):
        randomize(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=tolerance, atol=tolerance)
    assert (logits(ours) - logits(reference().to(dtype))).abs().max() > 1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [8, 7])
def test_ten_steps_of_adamw_give_the_weights_of_peft(alpha, dropout):
    """Avec dropout aussi : les mêmes tirages, dans le même ordre."""
    ours, theirs = reference(), peft_model(reference(), alpha=alpha, dropout=dropout)
    add_lora(ours, 4, alpha, TARGETS, dropout=dropout, seed=3)
    start = {name: p.detach().clone() for name, p in adapter_weights(ours).items()}
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(11)
        optimizer = torch.optim.AdamW(adapter_weights(model).values(), lr=1e-2)
        for ids in IDS:
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = adapter_weights(theirs)
    for name, parameter in adapter_weights(ours).items():
        torch.testing.assert_close(parameter, trained[name], rtol=0, atol=1e-5)
        assert (parameter - start[name]).abs().max() > 1e-2, name


# Les dossiers de peft, dans les deux sens, pour un modèle de transformers et pour le nôtre


@pytest.mark.parametrize("kind", [reference, own])
@pytest.mark.parametrize("targets", [TARGETS, ["layers.1.self_attn.q_proj"]])
def test_what_we_save_peft_loads(tmp_path, kind, targets):
    ours = kind()
    add_lora(ours, 4, 7, targets)
    randomize(ours)
    save_adapter(ours, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(reference(), tmp_path / "lora")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert len(adapter_weights(ours)) == sum("lora_" in name for name, _ in theirs.named_parameters())


@pytest.mark.parametrize("kind", [reference, own])
def test_what_peft_saves_we_load(tmp_path, kind):
    theirs = peft_model(reference(), dropout=0.1).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "lora")
    ours = kind()
    load_adapter(ours, tmp_path / "lora", "droit")
    assert adapter_names(ours) == ["droit"]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_again_bitwise(tmp_path):
    first, second = own(), own()
    add_lora(first, 3, 5.5, ["up_proj", "o_proj"], dropout=0.25)
    randomize(first)
    save_adapter(first, tmp_path / "lora")
    load_adapter(second, tmp_path / "lora")
    assert_same(adapter_weights(first), adapter_weights(second))
    save_adapter(second, tmp_path / "copie")
    for file in (tmp_path / "lora").iterdir():
        assert file.read_bytes() == (tmp_path / "copie" / file.name).read_bytes()


# Replier, déplier


@settings(max_examples=40, deadline=None)
@given(
    d_in=st.integers(1, 9), d_out=st.integers(1, 9), rank=st.integers(1, 5),
    alpha=st.floats(0.01, 100), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(), seed=st.integers(0, 99),
)
def test_fold_then_unfold_is_bitwise(d_in, d_out, rank, alpha, dtype, bias, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).to(dtype)
    x = torch.randn(2, 3, d_in, dtype=dtype)
    before, plain = base_weights(model), model(x)
    add_lora(model, rank, alpha, ["0"])
    nn.init.normal_(model[0].adapters["default"].B)
    adapted = model(x)
    fold(model)
    correction = (alpha / rank) * model[0].adapters["default"].B @ model[0].adapters["default"].A
    exact = before["0.weight"].to(correction.dtype) + correction
    half_ulp = torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(model[0].weight.to(exact.dtype), exact, rtol=0, atol=4 * half_ulp)
    scale = max(1.0, correction.abs().max().item()) * x.abs().max().item() * (d_in + rank)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)
    unfold(model)
    assert_same(base_weights(model), before)
    assert torch.equal(model(x), adapted)
    use_adapter(model, None)
    assert torch.equal(model(x), plain)


def test_folded_in_bf16_is_rounded_once():
    """Arrondir B A puis la somme, comme peft, perd davantage."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    weight = model[0].weight.detach().double()
    add_lora(model, 4, 4, ["0"])
    nn.init.normal_(model[0].adapters["default"].B)
    adapter = model[0].adapters["default"]
    exact = weight + adapter.B.detach().double() @ adapter.A.detach().double()
    fold(model)
    assert torch.equal(model[0].weight, exact.to(torch.bfloat16))


def test_folded_adapter_saved_with_the_model(tmp_path):
    model = own()
    add_lora(model, 4, 7, TARGETS)
    randomize(model)
    adapted = logits(model)
    fold(model)
    remove_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "replié")
    reloaded = LlamaModel.from_pretrained(tmp_path / "replié")
    torch.testing.assert_close(logits(reloaded), adapted, rtol=1e-4, atol=1e-4)


def test_removed_unfolded_leaves_the_base_model():
    model = own()
    before, names = logits(model), set(model.state_dict())
    add_lora(model, 4, 7, TARGETS)
    randomize(model)
    remove_lora(model)
    assert torch.equal(logits(model), before) and set(model.state_dict()) == names


def test_folded_model_does_not_train():
    model = own()
    add_lora(model, 4, 7, TARGETS)
    fold(model)
    with pytest.raises(LlamaError, match="Aucun paramètre à entraîner"):
        train(model, examples(), TrainingConfig(steps=1, batch_size=2), progress=False)
    unfold(model)
    assert train(model, examples(), TrainingConfig(steps=1, batch_size=2), progress=False).losses


# Plusieurs adaptateurs


def test_adapters_are_kept_apart():
    """Chacun donne ce qu’il donnerait seul, même quand ils ne corrigent pas les mêmes couches."""
    alone = {}
    for name, targets in (("droit", ["q_proj"]), ("poésie", ["q_proj", "up_proj"])):
        model = own()
        add_lora(model, 4, 7, targets, name=name, seed=len(name))
        randomize_named(model, name)
        alone[name] = logits(model)
    both = own()
    add_lora(both, 4, 7, ["q_proj"], name="droit", seed=5)
    randomize_named(both, "droit")
    add_lora(both, 4, 7, ["q_proj", "up_proj"], name="poésie", seed=6)
    randomize_named(both, "poésie")
    assert adapter_names(both) == ["droit", "poésie"]
    for name in ("droit", "poésie", "droit"):
        use_adapter(both, name)
        assert torch.equal(logits(both), alone[name])
        trained = [n for n, p in both.named_parameters() if p.requires_grad]
        assert trained and all(f".adapters.{name}." in n for n in trained)
    use_adapter(both, None)
    assert torch.equal(logits(both), logits(own()))
    assert not any(p.requires_grad for p in both.parameters())


def randomize_named(model, name):
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if f".adapters.{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def test_each_is_saved_under_its_own_name(tmp_path):
    model = own()
    add_lora(model, 4, 7, ["q_proj"], name="droit")
    randomize(model)
    add_lora(model, 2, 7, ["up_proj"], name="poésie")
    randomize(model)
    save_adapter(model, tmp_path / "droit", "droit")
    save_adapter(model, tmp_path / "poésie", "poésie")
    fresh = own()
    for name in ("droit", "poésie"):
        load_adapter(fresh, tmp_path / name, name)
        use_adapter(model, name)
        assert torch.equal(logits(fresh), logits(model)) and not torch.equal(logits(fresh), logits(own()))


# S’entraîner


def examples(n=8):
    ids = IDS.flatten(0, 1)[:n]
    labels = ids.roll(-1, dims=1)
    labels[:, :4] = -100
    return Examples(ids, labels, torch.ones_like(ids))


def test_training_moves_the_adapter_only():
    model = own()
    before = base_weights(model)
    add_lora(model, 8, 16, ALL_TARGETS)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    widths = [16 + 16, 16 + 8, 16 + 8, 16 + 16, 16 + 24, 16 + 24, 24 + 16]
    assert count == 8 * CONFIG.n_layers * sum(widths)
    settings = TrainingConfig(steps=40, batch_size=8, learning_rate=2e-2)
    history = train(model, examples(), settings, progress=False)
    assert history.losses[-1] < history.losses[0] / 2
    assert_same(base_weights(model), before)


def test_weights_are_shared_not_copied_and_chance_is_left_alone():
    model = own()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    add_lora(model, 4, 7, ALL_TARGETS, seed=9)
    assert torch.equal(torch.rand(1), expected)
    after = {name: p.data_ptr() for name, p in model.named_parameters() if ".adapters." not in name}
    assert after == pointers


def test_dropout_follows_the_mode_of_the_model():
    model = own()
    model.eval()
    add_lora(model, 4, 7, TARGETS, dropout=0.5)
    randomize(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


# Ce qui est refusé


def adapted(**changes):
    model = own()
    add_lora(model, 4, 7, TARGETS, **changes)
    return model


def folded():
    model = adapted()
    fold(model)
    return model


def tied():
    """Une tête qui partage la table des plongements : replier l’une changerait l’autre."""
    model = reference()
    add_lora(model, 4, 7, ["lm_head"])
    return model


def call(function, *settings, **options):
    return lambda model, _: function(model, *settings, **options)


def at(function, place, *settings):
    return lambda model, folder: function(model, folder / place, *settings)


MISUSES = {
    "rang nul": (own, call(add_lora, 0, 7, TARGETS), "Le rang est un entier strictement positif"),
    "rang négatif": (own, call(add_lora, -4, 7, TARGETS), "(reçu : -4)"),
    "rang fractionnaire": (own, call(add_lora, 1.5, 7, TARGETS), "(reçu : 1.5)"),
    "alpha": (own, call(add_lora, 4, 0, TARGETS), "alpha est un nombre strictement positif"),
    "dropout": (own, call(add_lora, 4, 7, TARGETS, dropout=1.0), "dropout est une probabilité"),
    "sans cible": (own, call(add_lora, 4, 7, []), "targets est une liste non vide"),
    "cible en texte": (own, call(add_lora, 4, 7, "q_proj"), "targets est une liste non vide"),
    "cible inconnue": (own, call(add_lora, 4, 7, ["q_proj", "w_q"]), "introuvable : w_q ; couches linéaires"),
    "cibles possibles": (own, call(add_lora, 4, 7, ["w_q"]), "q_proj, k_proj, v_proj, o_proj, gate_proj"),
    "cible non linéaire": (own, call(add_lora, 4, 7, ["embed_tokens"]), "Cible introuvable : embed_tokens"),
    "fin de nom partielle": (own, call(add_lora, 4, 7, ["proj"]), "Cible introuvable : proj"),
    "nom à point": (own, call(add_lora, 4, 7, TARGETS, name="a.b"), "Nom d’adaptateur impossible : 'a.b'"),
    "nom réservé": (own, call(add_lora, 4, 7, TARGETS, name="keys"), "Nom d’adaptateur impossible : 'keys'"),
    "sans adaptateur": (own, call(use_adapter, "droit"), "Pas d’adaptateur « droit » ; ce modèle a : aucun"),
    "rien à replier": (own, call(fold), "Aucun adaptateur actif à replier"),
    "rien à déplier": (own, call(unfold), "Rien à déplier"),
    "rien à enregistrer": (own, at(save_adapter, "inutile"), "Pas d’adaptateur « default »"),
    "dossier absent": (own, at(load_adapter, "rien"), "introuvable"),
    "moins de couches": (
        partial(own, num_hidden_layers=2), at(load_adapter, "lora"),
        "») : la couche model.layers.2.",
    ),
    "autre largeur": (
        partial(own, intermediate_size=32), at(load_adapter, "lora"),
        "down_proj, (16, 24), est ici (16, 32) ; chargez le modèle de base",
    ),
    "autre architecture": (partial(nn.Linear, 16, 16), at(load_adapter, "lora"), "est ici absente"),
    "nom pris": (adapted, call(add_lora, 4, 7, TARGETS), "L’adaptateur « default » existe déjà"),
    "nom pris au chargement": (adapted, at(load_adapter, "lora"), "L’adaptateur « default » existe déjà"),
    "nom inconnu": (adapted, call(use_adapter, "droit"), "ce modèle a : default"),
    "dossier occupé": (adapted, at(save_adapter, "lora"), "existe déjà : écrivez ailleurs"),
    "déjà replié": (folded, call(fold), "dépliez-le d’abord"),
    "changer replié": (folded, call(use_adapter, None), "dépliez-le d’abord"),
    "ajouter replié": (folded, call(add_lora, 4, 7, TARGETS, name="b"), "dépliez-le d’abord"),
    "charger replié": (folded, at(load_adapter, "lora", "b"), "dépliez-le d’abord"),
    "tête liée": (tied, call(fold), "lm_head partage son poids avec une autre couche"),
}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, adapter_names(model)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptateur")
    save_adapter(adapted(), folder / "lora")
    return folder


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_named_and_nothing_is_touched(stored, name):
    make, action, cause = MISUSES[name]
    model = make()
    files = {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()}
    (weights, names), trainable = state(model), list(adapter_weights(model))
    with pytest.raises(LlamaError) as error:
        action(model, stored)
    message = str(error.value).replace("\u00a0", " ")
    assert cause in message and "\n" not in message
    assert {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()} == files
    after, names_after = state(model)
    assert_same(after, weights)
    assert names_after == names and list(adapter_weights(model)) == trainable


def test_foreign_adapter_names_its_base(tmp_path):
    """Le nom du modèle annoncé par le dossier aide à retrouver le bon."""
    peft_model(reference(num_hidden_layers=4)).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(path.read_text()) | {"base_model_name_or_path": "exemple/quatre-couches"}
    path.write_text(json.dumps(content))
    with pytest.raises(LlamaError, match="exemple/quatre-couches"):
        load_adapter(own(), tmp_path / "lora")
