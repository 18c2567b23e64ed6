"""Le format de transformers : son `config.json` et ses noms de tenseurs, et leur passage aux nôtres.

Deux architectures : `llama` (dense) et `llama4_text`. Aucun poids n’est permuté : nos couches portent les mêmes noms et
lisent les mêmes matrices. Seuls diffèrent « mlp », que Llama 4 et nous appelons « feed_forward », et les experts, que
Llama 4 empile en deux tenseurs transposés. Ce module ne lit ni n’écrit aucun fichier.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import ROPE_SCALING, Config, LlamaError

# Notre réglage → le leur.
COMMON = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "d_k": "head_dim",
    "d_ff": "intermediate_size", "block_size": "max_position_embeddings", "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
LLAMA4 = {
    "d_ff_dense": "intermediate_size_mlp", "num_local_experts": "num_local_experts",
    "num_experts_per_tok": "num_experts_per_tok", "router_aux_loss_coef": "router_aux_loss_coef",
    "qk_norm": "use_qk_norm", "attn_temperature_tuning": "attn_temperature_tuning", "floor_scale": "floor_scale",
    "attn_scale": "attn_scale",
}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Ce que transformers suppose quand un config.json ne le dit pas.
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
LLAMA4_DEFAULTS = {
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size_mlp": 16_384, "num_local_experts": 16, "num_experts_per_tok": 1, "use_qk_norm": True,
    "router_aux_loss_coef": 0.001, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "attention_chunk_size": 8192, "no_rope_layer_interval": 4, "interleave_moe_layer_step": 1,
}
CHUNKED, FULL = "chunked_attention", "full_attention"
# Des tables recalculées, que d’anciens modèles enregistraient.
IGNORED = re.compile(r".*rotary_emb\.inv_freq$")
EXPERT = re.compile(r"(.*experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def is_llama4(config: Config) -> bool:
    """Ce modèle s’enregistre-t-il comme un Llama 4 ? Sinon, comme un Llama."""
    return config.rope_style == "pairs"


def to_config(settings: Mapping[str, Any]) -> Config:
    """Le contenu d’un `config.json` → notre `Config`.

    Raises:
        LlamaError: architecture ou réglage que nous ne savons pas rendre à l’identique ; le message le nomme.
    """
    kind = settings.get("model_type")
    if kind not in ("llama", "llama4_text"):
        raise LlamaError(f"Architecture non prise en charge : {kind} ; nous lisons llama et llama4_text.")
    llama4 = kind == "llama4_text"
    settings = (LLAMA4_DEFAULTS if llama4 else {}) | {k: v for k, v in settings.items() if v is not None}
    settings = DEFAULTS | settings
    missing = [key for key in REQUIRED if key not in settings]
    if missing:
        raise LlamaError(f"config.json ne dit pas {', '.join(missing)} : téléchargez-le à nouveau.")
    for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if settings.get(key, value) != value:
            raise LlamaError(f"Réglage non pris en charge : {key} = {settings[key]} (nous calculons avec {value}).")
    if "quantization_config" in settings:
        raise LlamaError("Modèle quantifié : déquantifiez-le, ou prenez sa version en bf16 ou en float32.")
    values = {ours: settings[theirs] for ours, theirs in COMMON.items() if theirs in settings}
    try:
        values |= _rope(settings, theta=500_000.0 if llama4 else 10_000.0)
        return Config(**values | (_llama4(settings) if llama4 else {"rope_style": "halves"}))
    except LlamaError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # un texte ou une liste à la place d’un nombre
        raise LlamaError(f"config.json a un réglage mal formé ({error}) : téléchargez-le à nouveau.") from error


def _rope(settings: Mapping[str, Any], theta: float) -> dict[str, Any]:
    # transformers 5 range tout dans rope_parameters ; avant, la base était à part.
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or settings.get("rope_theta", theta)
    kind = rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind != "llama3" or not ROPE_SCALING <= rope.keys():
        raise LlamaError(f"Étirement de RoPE non pris en charge : {kind} ; nous calculons celui de Llama 3 (llama3).")
    return {"rope_theta": float(theta), "rope_scaling": {key: rope[key] for key in sorted(ROPE_SCALING)}}


def _llama4(settings: Mapping[str, Any]) -> dict[str, Any]:
    values = {ours: settings[theirs] for ours, theirs in LLAMA4.items()}
    n_layers, step = settings["num_hidden_layers"], settings["interleave_moe_layer_step"]
    moe_layers = settings.get("moe_layers", range(step - 1, n_layers, step))
    interval = settings["no_rope_layer_interval"]
    rope_layers = settings.get("no_rope_layers") or [(layer + 1) % interval for layer in range(n_layers)]
    types = settings.get("layer_types") or [CHUNKED if rope else FULL for rope in rope_layers]
    chunked = CHUNKED in types
    if chunked and any((kind == CHUNKED) != bool(rope) for kind, rope in zip(types, rope_layers, strict=True)):
        raise LlamaError("layer_types : nous ne faisons l’attention par tranches que sur toutes les couches à RoPE.")
    return values | {
        "rope_style": "pairs",
        "moe_layers": tuple(moe_layers) or None,
        "num_local_experts": values["num_local_experts"] if moe_layers else 0,
        "nope_layers": tuple(layer for layer, rope in enumerate(rope_layers) if not rope),
        "attention_chunk_size": settings["attention_chunk_size"] if chunked else None,
        "attn_temperature_tuning": bool(values["attn_temperature_tuning"]),
    }


def from_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Notre `Config` → le contenu d’un `config.json`.

    Raises:
        LlamaError: un Llama de transformers (rope_style « halves ») n’a ni experts ni aucune option de Llama 4.
    """
    llama4 = is_llama4(config)
    options = {"num_local_experts", "qk_norm", "nope_layers", "attention_chunk_size", "attn_temperature_tuning"}
    chosen = sorted(name for name in options if getattr(config, name))
    if chosen and not llama4:
        raise LlamaError(
            f"transformers n’a {', '.join(chosen)} que dans Llama 4, dont RoPE tourne des paires voisines : "
            "construisez le modèle avec rope_style=\"pairs\" pour pouvoir l’enregistrer."
        )
    names = COMMON | (LLAMA4 if llama4 else {})
    settings = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    settings |= {
        "architectures": ["Llama4ForCausalLM" if llama4 else "LlamaForCausalLM"],
        "model_type": "llama4_text" if llama4 else "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "attention_bias": False,
        # Écrits à l’ancienne, que toutes les versions lisent.
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }
    if not llama4:
        return settings | {"mlp_bias": False}
    layers, chunk = range(config.n_layers), config.attention_chunk_size
    rope_layers = [int(layer not in config.nope_layers) for layer in layers]
    return settings | {
        "num_local_experts": config.num_local_experts or 1,
        "moe_layers": list(config.moe_layers),
        "no_rope_layers": rope_layers,
        "layer_types": [CHUNKED if rope and chunk else FULL for rope in rope_layers],
        "attention_chunk_size": chunk or config.block_size,
    }


def published_name(name: str, config: Config) -> str:
    """Le nom d’une couche ou d’un poids dans transformers ; celui d’un poids d’expert est un nom de tenseur empilé."""
    expert = EXPERT.match(name)
    if expert:
        name = f"{expert[1]}.{'down_proj' if expert[3] == 'down' else 'gate_up_proj'}"
    if not is_llama4(config):
        name = name.replace(".feed_forward.", ".mlp.")
    return name if name.startswith("lm_head") else f"model.{name}"


class Published(NamedTuple):
    """Un tenseur de transformers : sa forme, et nos poids, un seul ou ceux de chaque expert empilés."""

    shape: tuple[int, ...]
    parts: list[list[str]]

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Le tenseur publié → nos poids."""
        if len(self.shape) < 3:
            yield self.parts[0][0], tensor
            return
        for names, matrix in zip(self.parts, tensor, strict=True):  # (d_entrée, d_sortie)
            yield from zip(names, matrix.T.chunk(len(names)), strict=True)

    def join(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Nos poids → le tenseur publié."""
        if len(self.shape) < 3:
            return weights[self.parts[0][0]]
        return torch.stack([torch.cat([weights[name] for name in names]).T for names in self.parts])


def published_tensors(weights: Mapping[str, Tensor], config: Config) -> dict[str, Published]:
    """Les tenseurs que publie un modèle de poids `weights` (nom → tenseur, dont seule la forme compte)."""
    experts: dict[str, dict[str, list[str]]] = {}
    for name in weights:  # gate_proj vient avant up_proj, comme dans gate_up_proj
        match = EXPERT.match(name)
        experts.setdefault(published_name(name, config), {}).setdefault(match[2] if match else "", []).append(name)
    tensors = {}
    for published, by_expert in experts.items():
        parts = list(by_expert.values())
        shape = tuple(weights[parts[0][0]].shape)
        if "" not in by_expert:
            shape = (len(parts), shape[1], shape[0] * len(parts[0]))
        tensors[published] = Published(shape, parts)
    return tensors
