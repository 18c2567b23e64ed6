"""Le modèle : un Llama dense, ou le Llama 4 à mélange d’experts, du jeton aux logits.

Chaque classe est une équation d’article ; les formes sont en fin de ligne : B séquences, T jetons, S clés, H têtes de
requêtes, G têtes de clés, E experts, V mots. Les noms des couches et des poids sont ceux de transformers. Ce module
laisse à `kernels` l’écriture rapide des équations, à `pretrained` les fichiers, à `training` l’apprentissage.

    ids ─ plongement ─┬─ RMSNorm ─ Attention ─(+)─┬─ RMSNorm ─ SwiGLU ou MoE ─(+)─ … ─ RMSNorm ─ tête ─ logits
                      └──────────────────────────┘└────────────────────────────┘
                                     n_layers fois (TransformerBlock)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import Config, LlamaError

INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / √(moyenne(x²) + ε) ⊙ w (Zhang et Sennrich 2019, éq. 4)."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d_model)` → `(…, d_model)`."""
        return kernels.rms_norm(x, self.weight, self.eps)


class RotaryPositionalEmbedding(nn.Module):
    """RoPE : à la position m, la i-ième paire de coordonnées tourne de l’angle m θ^(−2i/d_k) (Su et al. 2021, §3.2.2).

    Une paire est un nombre complexe et la rotation un produit : le produit scalaire d’une requête et d’une clé ne
    dépend plus que de la distance qui les sépare.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.style, self.half = config.rope_style, config.d_k // 2
        exponents = torch.arange(0, config.d_k, 2) / config.d_k
        frequencies = config.rope_theta**-exponents
        if config.rope_scaling:
            frequencies = self._stretch(frequencies, config.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)  # (d_k/2,)

    @staticmethod
    def _stretch(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
        """Llama 3.1 : divise les basses fréquences par `factor`, garde les hautes (Grattafiori et al. 2024, §3.4.2)."""
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling["factor"])

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(B, T)` → rotations e^{i m θ}, complexes `(B, T, 1, d_k/2)`, que toutes les couches partagent."""
        angles = positions[..., None, None].float() * self.frequencies  # (B, T, 1, d_k/2)
        return torch.polar(torch.ones_like(angles), angles)

    def rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Tourne les paires de `x` `(B, T, H, d_k)`."""
        if self.style == "pairs":  # (x₀, x₁), (x₂, x₃)…
            z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotation
            return torch.view_as_real(z).flatten(-2).type_as(x)
        # (x₀, x_{d/2}), (x₁, x_{d/2+1})… : décaler d’une moitié met en face l’autre membre de chaque paire.
        cos, sin = rotation.real, rotation.imag
        z = x.float()
        turned = z.roll(self.half, -1) * torch.cat([-sin, sin], -1)
        return torch.addcmul(turned, z, torch.cat([cos, cos], -1)).type_as(x)


class KVCache:
    """Clés et valeurs des jetons déjà lus, pour n’en recalculer aucune en générant.

    Args:
        config: celle du modèle.
        batch_size: séquences du lot.
        max_length: jetons que chacune pourra contenir.
        device: où placer les tenseurs.
        dtype: leur type.

    Attributes:
        length: jetons déjà lus.
    """

    def __init__(
        self, config: Config, batch_size: int, max_length: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_length, config.d_k)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.documents: Tensor | None = None  # (B, max_length), s’il y a plusieurs documents ou du remplissage
        self.length = 0

    def extend(self, mask: Tensor | None, n_tokens: int) -> Tensor | None:
        """Numéros de document `(B, length + n_tokens)` des jetons lus et de ceux qui arrivent ; None s’il n’y en a qu’un."""
        end, capacity = self.length + n_tokens, self.keys.shape[3]
        if end > capacity:
            raise LlamaError(f"Cache plein : {end} jetons pour {capacity} places ; augmentez max_length.")
        if self.documents is None:
            if mask is None:
                return None
            self.documents = mask.new_ones(len(mask), capacity)
        # Sans masque, les jetons continuent le dernier document.
        self.documents[:, self.length:end] = mask if mask is not None else self.documents[:, self.length - 1, None]
        return self.documents[:, :end]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Range les clés et valeurs `(B, G, T, d_k)` d’une couche ; rend toutes les siennes, `(B, G, S, d_k)`."""
        end = self.length + k.shape[2]
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored[:, :, self.length:end] = new
        return self.keys[layer, :, :, :end].type_as(k), self.values[layer, :, :, :end].type_as(v)


@dataclass
class Context:
    """Ce que toutes les couches d’un passage partagent.

    Attributes:
        rotation: rotations de RoPE, `(B ou 1, T, 1, d_k/2)`.
        temperature: facteur des requêtes des couches sans RoPE, `(B ou 1, T, 1, 1)`, ou None.
        bias: 0 où une requête voit une clé, −∞ ailleurs, `(B ou 1, 1, T, S)` ; None pour un seul document, causal.
        chunk_bias: le même, coupé en tranches, pour les couches à RoPE.
        cache: clés et valeurs passées, ou None.
    """

    rotation: Tensor
    temperature: Tensor | None
    bias: Tensor | None
    chunk_bias: Tensor | None
    cache: KVCache | None


class Attention(nn.Module):
    """Attention causale à têtes groupées : softmax(q kᵀ/√d_k) v (Vaswani et al. 2017, §3.2 ; Ainslie et al. 2023, §2.2).

    De Llama 4, au choix : couches sans RoPE, dont la température croît avec la position ; sur les autres, attention par
    tranches, et requêtes et clés normalisées après RoPE.
    """

    def __init__(self, config: Config, layer: int, rope: RotaryPositionalEmbedding) -> None:
        super().__init__()
        self.layer, self.d_k, self.eps = layer, config.d_k, config.rms_norm_eps
        self.rotate = rope.rotate if layer not in config.nope_layers else None
        self.qk_norm = config.qk_norm
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.d_k, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_k, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_k, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.d_k, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`(B, T, d_model)` → `(B, T, d_model)`."""
        q = self.q_proj(x).unflatten(-1, (-1, self.d_k))  # (B, T, H, d_k)
        k = self.k_proj(x).unflatten(-1, (-1, self.d_k))  # (B, T, G, d_k)
        v = self.v_proj(x).unflatten(-1, (-1, self.d_k))  # (B, T, G, d_k)
        bias = context.bias
        if self.rotate:
            q, k, bias = self.rotate(q, context.rotation), self.rotate(k, context.rotation), context.chunk_bias
            if self.qk_norm:
                q, k = F.rms_norm(q, (self.d_k,), eps=self.eps), F.rms_norm(k, (self.d_k,), eps=self.eps)
        elif context.temperature is not None:
            q = (q * context.temperature).type_as(q)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        y = kernels.attention(q, k, v, bias)  # (B, H, T, d_k)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class ExpertMLP(nn.Module):
    """SwiGLU : W_bas (silu(W_porte x) ⊙ W_haut x) (Shazeer 2020, éq. 6) ; couche dense, expert, ou expert partagé."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d_model)` → `(…, d_model)`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Mélange d’experts de Llama 4 : partagé(x) + Σ_{e ∈ top-k} expert_e(σ(r_e) x), où r = W_routeur x."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_experts, self.k = config.num_local_experts, config.num_experts_per_tok
        self.router = nn.Linear(config.d_model, self.n_experts, bias=False)
        self.experts = nn.ModuleList(ExpertMLP(config.d_model, config.d_ff) for _ in range(self.n_experts))
        self.shared_expert = ExpertMLP(config.d_model, config.d_ff)
        self.scores = self.chosen = None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, d_model)` → `(B, T, d_model)`. Chaque expert ne calcule que pour les jetons qu’il reçoit."""
        tokens = x.flatten(0, -2)  # (N, d_model)
        self.scores = self.router(tokens)  # (N, E)
        top, self.chosen = self.scores.topk(self.k)  # (N, k)
        # Les N·k affectations, rangées par expert : celles d’un même expert se suivent.
        order = self.chosen.flatten().argsort(stable=True)
        source = order // self.k  # le jeton de chacune
        gate = top.sigmoid().flatten()[order, None]
        load = self.chosen.flatten().bincount(minlength=self.n_experts).tolist()
        routed = (tokens.index_select(0, source) * gate).split(load)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, routed, strict=True)])  # (N·k, d_model)
        return self.shared_expert(tokens).index_add(0, source, outputs).view_as(x)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), puis x + SwiGLU ou MoE de la norme (Xiong et al. 2020, §3, « pre-LN »)."""

    def __init__(self, config: Config, layer: int, rope: RotaryPositionalEmbedding) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, rope)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        sparse = layer in config.moe_layers
        self.feed_forward = MoE(config) if sparse else ExpertMLP(config.d_model, config.d_ff_dense)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`(B, T, d_model)` → `(B, T, d_model)`."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.rope = RotaryPositionalEmbedding(config)
        self.layers = nn.ModuleList(TransformerBlock(config, i, self.rope) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)
        for p in self.parameters():
            if p.dim() > 1: nn.init.normal_(p, std=INIT_STD)
    def hidden(self, ids, mask=None, cache=None):
        x = self.embed_tokens(ids)
        rot = self.rope(torch.arange(ids.shape[1])[None])
        ctx = Context(rot, None, None, None, None)
        for l in self.layers: x = l(x, ctx)
        return self.norm(x)
    def forward(self, ids, mask=None, cache=None):
        return F.linear(self.hidden(ids, mask, cache), self.embed_tokens.weight)
