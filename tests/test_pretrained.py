"""Les poids publiés : aller et retour avec transformers, GGUF, Hub, et tout ce qui est refusé, en une ligne."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import errors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama import pretrained, sources
from llama.bpe import byte_alphabet
from llama.chat import TransformersTokenizer
from llama.config import Config, LlamaError
from llama.lora import add_lora, fold, remove_lora
from llama.model import LlamaModel
from llama.tokenization import BPETokenizer, SimpleCharTokenizer
from llama.transformers_format import from_config, to_config

DENSE = Config(vocab_size=64, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48)
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA4 = Config(
    vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_k=12, d_ff=24, d_ff_dense=40,
    tie_word_embeddings=False, num_local_experts=3, num_experts_per_tok=2, moe_layers=(1, 3), qk_norm=True,
    nope_layers=(2,), attention_chunk_size=6, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.5,
)
MODELS = {
    "tied": DENSE,
    "untied": replace(DENSE, tie_word_embeddings=False, d_k=16, rope_theta=500.0),
    "scaled": replace(DENSE, rope_scaling=SCALING),
    "llama4": LLAMA4,
    "llama4_unchunked": replace(LLAMA4, attention_chunk_size=None, nope_layers=(), tie_word_embeddings=True),
    "llama4_dense": Config(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_ff=48, qk_norm=True),
}
TEXT = "L’été, le préavis est de deux mois ; l’employeur doit l’écrire. " * 20


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def random_model(config: Config) -> LlamaModel:
    model = LlamaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.0 if parameter.dim() > 1 else 1.0, std=0.2)
    return model


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def same_weights(a: LlamaModel, b: LlamaModel) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def content(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_round_trip(config: Config, tmp_path: Path) -> None:
    """Nous écrivons, transformers lit, avec les mêmes logits ; il réécrit, nous relisons les mêmes poids."""
    model, ids = random_model(config), torch.randint(64, (2, 20))
    model.save_pretrained(tmp_path / "ours")
    again = LlamaModel.from_pretrained(tmp_path / "ours")
    assert again.config == config and same_weights(again, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    back = LlamaModel.from_pretrained(tmp_path / "theirs")
    assert back.config == config and same_weights(back, model)


@pytest.mark.parametrize("config", [DENSE, LLAMA4], ids=["llama", "llama4"])
def test_shards(config: Config, tmp_path: Path) -> None:
    """Au-delà de la taille donnée, plusieurs fichiers et un index, que transformers lit aussi ; et l’inverse."""
    model, ids = random_model(config), torch.randint(64, (2, 20))
    pretrained.save(model, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    assert same_weights(LlamaModel.from_pretrained(tmp_path / "ours"), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert same_weights(LlamaModel.from_pretrained(tmp_path / "theirs"), model)


def test_types(tmp_path: Path) -> None:
    """Écrit en bf16, relu en float32 : les poids arrondis, dans le type demandé."""
    model = random_model(DENSE)
    model.save_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    assert same_weights(LlamaModel.from_pretrained(tmp_path / "m"), model.bfloat16().float())
    assert next(LlamaModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_loaded_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    model = random_model(DENSE)
    model.save_pretrained(tmp_path / "m")
    loaded = LlamaModel.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    assert same_weights(loaded, model)
    logits_of = loaded.train()(torch.randint(64, (1, 8)))
    logits_of.sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize("kind", [BPETokenizer, SimpleCharTokenizer])
def test_tokenizer_travels(kind: type, tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train([TEXT], 300) if kind is BPETokenizer else SimpleCharTokenizer.train([TEXT])
    model = random_model(replace(DENSE, vocab_size=tokenizer.vocab_size))
    model.save_pretrained(tmp_path / "m", tokenizer=tokenizer)
    loaded = pretrained.load_tokenizer(tmp_path / "m")
    assert isinstance(loaded, kind) and loaded.encode("préavis") == tokenizer.encode("préavis")
    settings = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == tokenizer.eos_id and settings["bos_token_id"] == tokenizer.bos_id
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("préavis") == tokenizer.encode("préavis")


def test_foreign_chat_template_is_applied(tmp_path: Path) -> None:
    """Un gabarit qui n’est pas le nôtre passe par transformers, sous notre interface ; il se réenregistre."""
    theirs = BPETokenizer.train([TEXT], 300).to_transformers()
    theirs.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    model = random_model(replace(DENSE, vocab_size=300))
    model.save_pretrained(tmp_path / "a", tokenizer=TransformersTokenizer(theirs))
    tokenizer = pretrained.load_tokenizer(tmp_path / "a")
    assert isinstance(tokenizer, TransformersTokenizer)
    ids, mask = tokenizer.encode_chat([{"role": "user", "content": "Bonjour"}])
    assert tokenizer.decode(ids) == f"[user] Bonjour{theirs.eos_token}" and sum(mask) == 0


def test_no_tokenizer(tmp_path: Path) -> None:
    random_model(DENSE).save_pretrained(tmp_path / "m")
    with pytest.raises(LlamaError, match="n’a pas de tokenizer"):
        pretrained.load_tokenizer(tmp_path / "m")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Un modèle n’est remplacé qu’avec `force`, autre chose jamais ; un échec ne laisse rien derrière lui."""
    folder, other = tmp_path / "m", tmp_path / "notes"
    random_model(DENSE).save_pretrained(folder)
    other.mkdir()
    (other / "notes.txt").write_text("à garder", encoding="utf-8")
    before = content(tmp_path)
    model = random_model(LLAMA4)
    with pytest.raises(LlamaError, match="existe déjà"):
        model.save_pretrained(folder)
    with pytest.raises(LlamaError, match="ne sera pas remplacé"):
        model.save_pretrained(other, force=True)
    assert content(tmp_path) == before
    model.save_pretrained(folder, force=True)
    assert same_weights(LlamaModel.from_pretrained(folder), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "notes"]


def test_interrupted_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(DENSE)
    model.save_pretrained(tmp_path / "m")
    before = content(tmp_path)
    monkeypatch.setattr(pretrained, "write_json", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(LlamaError):
        random_model(DENSE).save_pretrained(tmp_path / "m", force=True)
    assert content(tmp_path) == before


def test_adapter_must_be_folded(tmp_path: Path) -> None:
    model = random_model(DENSE)
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    with pytest.raises(LlamaError, match="porte un adaptateur"):
        model.save_pretrained(tmp_path / "m")
    fold(model)
    remove_lora(model)
    model.save_pretrained(tmp_path / "m")
    assert same_weights(LlamaModel.from_pretrained(tmp_path / "m"), model)


def test_llama_cannot_hold_llama4_options(tmp_path: Path) -> None:
    model = LlamaModel(replace(LLAMA4, rope_style="halves"))
    with pytest.raises(LlamaError, match='num_local_experts.*rope_style="pairs"'):
        model.save_pretrained(tmp_path / "m")
    assert not any(tmp_path.iterdir())


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        settings = {key: value for key, value in settings.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return edit


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lie_about_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def lose_a_shard(folder: Path) -> None:
    pretrained.save(LlamaModel(DENSE), folder, force=True, max_shard_bytes=20_000)
    next(folder.glob("model-00002-*")).unlink()


NORM = "model.norm.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_config": (lambda f: (f / "config.json").unlink(), "il n’a pas de config.json"),
    "config_not_json": (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "n’est pas du JSON"),
    "config_list": (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), "n’est pas un objet JSON"),
    "architecture": (edit_config(model_type="gpt2"), "Architecture non prise en charge : gpt2"),
    "no_architecture": (edit_config(model_type=...), "Architecture non prise en charge"),
    "no_width": (edit_config(hidden_size=...), "ne dit pas hidden_size"),
    "bad_width": (edit_config(hidden_size=-1), "d_model doit être un entier"),
    "text_width": (edit_config(hidden_size="grand"), "d_model doit être un entier"),
    "heads": (edit_config(num_key_value_heads=3), "n_kv_heads"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act = gelu"),
    "bias": (edit_config(attention_bias=True), "attention_bias = True"),
    "quantized": (edit_config(quantization_config={"quant_method": "awq"}), "Modèle quantifié"),
    "yarn": (edit_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "Étirement de RoPE .* yarn"),
    "old_linear": (edit_config(rope_scaling={"type": "linear", "factor": 4.0}), "Étirement de RoPE .* linear"),
    "text_theta": (edit_config(rope_theta="grand"), "config.json a un réglage mal formé"),
    "text_eps": (edit_config(rms_norm_eps="1e-5"), "rms_norm_eps doit être positif"),
    "text_scaling": (edit_config(rope_scaling="llama3"), "config.json a un réglage mal formé"),
    "text_factor": (edit_config(rope_scaling=SCALING | {"factor": "huit"}), "config.json a un réglage mal formé"),
    "half_scaling": (edit_config(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "Étirement de RoPE"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "Pas de poids safetensors"),
    "pickle": (as_pickle, "n’a de poids qu’en pickle .pytorch_model.bin.*n’importe quel code"),
    "truncated": (truncate, "tronqué ou altéré"),
    "huge_header": (lie_about_header, "tronqué ou altéré"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "tronqué ou altéré"),
    "lost_shard": (lose_a_shard, "Il manque .*model-00002"),
    "missing": (edit_weights(lambda t: t.pop(NORM)), f"Il manque à .* le tenseur {NORM} :"),
    "many_missing": (edit_config(num_hidden_layers=4), r"model\.layers\.3\.\S+ et 8 autres"),
    "shape": (edit_weights(lambda t: t.update({NORM: torch.ones(5)})), rf"{NORM} est de forme \(5,\).*\(32,\)"),
    "vocabulary": (edit_config(vocab_size=65), r"embed_tokens.weight est de forme \(64, 32\).*\(65, 32\)"),
    "extra": (edit_weights(lambda t: t.update({"model.extra": torch.ones(5)})), "n’annonce pas, model.extra"),
    "too_deep": (edit_config(num_hidden_layers=2), r"n’annonce pas, model\.layers\.2"),
    "integers": (edit_weights(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})), "type I8"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_bad_folder(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    """Une ligne qui dit la cause ; rien n’a changé dans le dossier."""
    folder = tmp_path / "m"
    random_model(DENSE).save_pretrained(folder)
    damage(folder)
    before = content(folder)
    with pytest.raises(LlamaError, match=message) as caught:
        LlamaModel.from_pretrained(folder)
    assert "\n" not in str(caught.value) and content(folder) == before


def test_layer_types_other_than_llama4s_are_refused() -> None:
    settings = from_config(LLAMA4, torch.float32)
    with pytest.raises(LlamaError, match="layer_types"):
        to_config(settings | {"layer_types": ["full_attention", *settings["layer_types"][1:]]})


def test_harmless_extra_tensors_are_ignored(tmp_path: Path) -> None:
    """La tête d’un modèle lié, et les tables de RoPE qu’écrivaient d’anciennes versions."""
    model = random_model(DENSE)
    model.save_pretrained(tmp_path / "m")
    edit_weights(lambda t: t.update({
        "lm_head.weight": torch.ones(64, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }))(tmp_path / "m")
    assert same_weights(LlamaModel.from_pretrained(tmp_path / "m"), model)


def test_published_llama_configs() -> None:
    """Les config.json du Hub, d’avant et d’après transformers 5."""
    llama32 = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "rope_theta": 500000.0,
        "rope_scaling": {**SCALING, "factor": 32.0, "original_max_position_embeddings": 8192},
    }
    config = to_config(llama32)
    assert (config.d_k, config.rope_theta, config.rope_scaling["factor"]) == (64, 500000.0, 32.0)
    new = {k: v for k, v in llama32.items() if not k.startswith("rope")}
    assert to_config(new | {"rope_parameters": llama32["rope_scaling"] | {"rope_theta": 500000.0}}) == config
    old = {k: v for k, v in llama32.items() if k not in ("num_key_value_heads", "rope_scaling", "rope_theta")}
    assert (to_config(old).n_kv_heads, to_config(old).rope_theta) == (32, 10000.0)


def test_defaults_are_those_of_transformers() -> None:
    """Ce qu’un config.json ne dit pas vaut ce que transformers suppose."""
    given = {
        "vocab_size": 64, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 64,
    }
    for name, kind in (("llama", transformers.LlamaConfig), ("llama4_text", transformers.Llama4TextConfig)):
        whole = json.loads(kind(**given).to_json_string(use_diff=False))
        assert to_config(given | {"model_type": name}) == to_config(whole | {"model_type": name})


@pytest.mark.parametrize(("name", "message"), [
    ("modele-inconnu", "n’est ni un dossier, ni un fichier GGUF, ni une source"),
    ("./dossier/absent", "n’est ni un dossier"),
    ("a/b/c", "n’est ni un dossier"),
    ("", "n’est pas un dossier de modèle|n’est ni un dossier"),
])
def test_unknown_source(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LlamaError, match=message):
        LlamaModel.from_pretrained(name)


@pytest.mark.parametrize(("name", "message"), [
    ("model.bin", "peut exécuter n’importe quel code"), ("model.pth", "peut exécuter n’importe quel code"),
    ("model.safetensors", "donnez son dossier"), ("notes.txt", "donnez son dossier"),
])
def test_files_that_are_not_models(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"...")
    with pytest.raises(LlamaError, match=message):
        LlamaModel.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(("error", "message"), [
    (errors.GatedRepoError("403", response=Mock()), "est protégé : acceptez ses conditions sur https://hugg"),
    (errors.RepositoryNotFoundError("404", response=Mock()), "n’existe pas ou vous est fermé"),
    (errors.RevisionNotFoundError("404", response=Mock()), "n’existe pas ou vous est fermé"),
    (errors.LocalEntryNotFoundError("absent"), "le Hub est injoignable"),
    (errors.OfflineModeIsEnabled("hors ligne"), "le Hub est injoignable"),
    (ConnectionError("réseau\ncoupé"), "le Hub est injoignable"),
])
def test_hub_errors(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(LlamaError, match=message) as caught:
        LlamaModel.from_pretrained("meta-llama/Llama-2-7b-hf")
    assert "meta-llama/Llama-2-7b-hf" in str(caught.value) and "\n" not in str(caught.value)


def test_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Un nom du Hub : seuls les fichiers utiles sont demandés, à la révision voulue ; jamais de pickle."""
    model = random_model(DENSE)
    model.save_pretrained(tmp_path / "m")
    download = Mock(return_value=str(tmp_path / "m"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = LlamaModel.from_pretrained("auteur/modele@v1.0")
    assert same_weights(loaded, model) and loaded.name_or_path == "auteur/modele@v1.0"
    assert download.call_args.args == ("auteur/modele",) and download.call_args.kwargs["revision"] == "v1.0"
    assert not any("bin" in pattern for pattern in download.call_args.kwargs["allow_patterns"])


def write_gguf(path: Path, model: LlamaModel) -> None:
    """Un GGUF comme l’écrit llama.cpp, qui permute les lignes des requêtes et des clés."""
    config, weights = model.config, {n: w.numpy() for n, w in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|fin|>", *byte_alphabet().values(), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def permuted(matrix: np.ndarray, n_heads: int) -> np.ndarray:
        return matrix.reshape(n_heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)

    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "feed_forward.gate_proj": "ffn_gate", "feed_forward.up_proj": "ffn_up", "feed_forward.down_proj": "ffn_down",
    }
    writer.add_tensor("token_embd.weight", weights["embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["norm.weight"])
    for layer in range(config.n_layers):
        for ours, theirs in names.items():
            matrix = weights[f"layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                matrix = permuted(matrix, config.n_heads if theirs == "attn_q" else config.n_kv_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Un fichier GGUF, puis le même sous un nom de `sources` ; la deuxième fois, transformers ne sert plus."""
    model = random_model(replace(DENSE, vocab_size=258))
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "modele.gguf"
    write_gguf(path, model)
    ids = torch.randint(258, (2, 20))
    loaded = LlamaModel.from_pretrained(path)
    assert (logits(loaded, ids) - logits(model, ids)).abs().max() < 1e-5
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Mock(side_effect=AssertionError))
    monkeypatch.setattr(sources, "fetch", lambda name, **options: path.parent)
    assert same_weights(LlamaModel.from_pretrained("smollm2"), loaded)
    assert pretrained.load_tokenizer(path).decode(pretrained.load_tokenizer(path).encode("été")) == "été"


def test_bad_gguf(tmp_path: Path) -> None:
    for name, data in (("vide", b""), ("texte", b"bonjour" * 100), ("tronque", b"GGUF\x03\x00\x00\x00")):
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(LlamaError, match="n’est pas un GGUF que transformers sait convertir") as caught:
            LlamaModel.from_pretrained(tmp_path / f"{name}.gguf")
        assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name != "convertis"]


def test_source_that_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fetch", lambda name, **options: tmp_path)
    with pytest.raises(LlamaError, match="« contributions » n’est pas un modèle"):
        LlamaModel.from_pretrained("contributions")


@pytest.mark.reseau
def test_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Le vrai SmolLM2 : les logits de transformers, et moins de deux secondes une fois converti."""
    monkeypatch.delenv("LLAMA_CACHE")
    folder = pretrained.find("smollm2")
    started = time.perf_counter()
    model = LlamaModel.from_pretrained("smollm2")
    assert time.perf_counter() - started < 2
    tokenizer = pretrained.load_tokenizer("smollm2")
    ids = torch.tensor([tokenizer.encode_chat([{"role": "user", "content": "Qui es-tu ?"}])[0]])
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    assert (logits(model, ids) - expected).abs().max() < 1e-4
