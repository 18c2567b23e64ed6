"""Ce que les essais de fusion partagent : de petits Llama tirés au hasard, mergekit dans le même processus."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama.config import LlamaError
from llama.recipe import merge

HIDDEN, FF, HEADS, KV_HEADS = 16, 24, 4, 2


def shapes(n_layers: int, vocab: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Les tenseurs d’un Llama, dans l’ordre de transformers."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for i in range(n_layers):
        prefix, kv = f"model.layers.{i}", HIDDEN * KV_HEADS // HEADS
        result |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        result |= {f"{prefix}.self_attn.{name}_proj.weight": (kv, HIDDEN) for name in "kv"}
        result |= {f"{prefix}.mlp.{name}_proj.weight": (FF, HIDDEN) for name in ("gate", "up")}
        result |= {f"{prefix}.mlp.down_proj.weight": (HIDDEN, FF)}
        result |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    result["model.norm.weight"] = (HIDDEN,)
    return result if tied else result | {"lm_head.weight": (vocab, HIDDEN)}


def make_model(
    folder: Path, seed: int, *, n_layers: int = 4, vocab: int = 40, tied: bool = False,
    dtype: torch.dtype = torch.float32, tokens: list[str] | None = None, **config: Any,
) -> str:
    """Écrit un petit Llama au format de transformers (écart type 0,2) et rend son dossier."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    sizes = shapes(n_layers, vocab, tied)
    weights = {name: (torch.randn(size, generator=generator) * 0.2).to(dtype) for name, size in sizes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": FF, "num_hidden_layers": n_layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 64, "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(content | config))
    if tokens is not None:
        make_tokenizer(folder, tokens)
    return str(folder)


def make_tokenizer(folder: Path, tokens: list[str]) -> None:
    """Un tokenizer de mots, lisible par transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0]).save_pretrained(folder)


def edit_config(folder: str, **changes: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_model(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Les tenseurs et la configuration d’un dossier, lus par safetensors et json."""
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights |= load_file(file)
    return weights, json.loads((Path(folder) / "config.json").read_text())


@functools.cache
def _mergekit() -> Any:
    logging.disable(logging.WARNING)  # transformers raconte chaque écriture
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    return MergeConfiguration, run_merge, MergeOptions


def by_mergekit(recipe: dict[str, Any], folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Le résultat de mergekit pour la même recette."""
    configuration, run_merge, merge_options = _mergekit()
    defaults = {"copy_tokenizer": False, "write_model_card": False, "quiet": True}
    shutil.rmtree(folder, ignore_errors=True)
    run_merge(
        configuration.model_validate(recipe), str(folder), options=merge_options(**defaults | options)
    )
    return read_model(folder)


def by_llama(recipe: dict[str, Any], folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Le résultat de notre `merge`."""
    merge(recipe, folder, force=True, progress=False, **options)
    return read_model(folder)


def snapshot(folder: Path) -> dict[str, str]:
    """Ce que contient un dossier : chemin → empreinte."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_refused(recipe: Any, root: Path, message: str, **options: Any) -> None:
    """`merge` refuse la recette, en une ligne, et rien ne change sous `root`."""
    before = snapshot(root)
    with pytest.raises(LlamaError, match=message) as refusal:
        merge(recipe, root / "sortie", progress=False, **options)
    assert "\n" not in str(refusal.value)
    assert snapshot(root) == before
    assert not list(root.glob(".sortie*")), "un dossier provisoire est resté"
