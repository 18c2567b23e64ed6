"""Le modèle : un Llama dense, ou le Llama 4 à mélange d’experts, du jeton aux logits.

Chaque classe est une équation d’article ; les formes sont en fin de ligne : B séquences, T jetons, S clés, H têtes de
requêtes, G têtes de clés, E experts, V mots. Les noms des couches et des poids sont ceux de transformers. Ce module
laisse à `kernels` l’écriture rapide des équations, à `pretrained` les fichiers, à `training` l’apprentissage.

    ids ─ plongement ─┬─ RMSNorm ─ Attention ─(+)─┬─ RMSNorm ─ SwiGLU ou MoE ─(+)─ … ─ RMSNorm ─ tête ─ logits
                      └──────────────────────────┘└────────────────────────────┘
                                     n_layers fois (TransformerBlock)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels
from .config import Config
from .context import Context, KVCache


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
    """RoPE : à la position m, la i-ième paire de coordonnées tourne de l’angle m θ^(−2i/d_k) (Su et al. 2021, §3.2.2).

    Une paire est un nombre complexe et la rotation un produit : le produit scalaire d’une requête et d’une clé ne
    dépend plus que de la distance qui les sépare.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.d_k, self.theta = config.d_k, config.rope_theta
        self.style, self.scaling = config.rope_style, config.rope_scaling

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Les d_k/2 fréquences, en radians par position. Ce n’est pas un tampon : `.to(bfloat16)` l’arrondirait."""
        frequencies = self.theta ** -(torch.arange(0, self.d_k, 2, device=device) / self.d_k)
        if self.scaling is None:
            return frequencies
        # Llama 3.1 (Grattafiori et al. 2024, §3.4.2) : divise les basses fréquences par `factor`, garde les hautes.
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        turns = self.scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.scaling["factor"])

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(B, T)` → leurs rotations, que toutes les couches partagent : ce que lit `rotate`."""
        angles = positions[..., None, None].float() * self.frequencies(positions.device)  # (B, T, 1, d_k/2)
        if self.style == "pairs":
            return torch.polar(torch.ones_like(angles), angles)  # e^{i m θ}
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])  # (2, B, T, 1, d_k)

    def rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Tourne les paires de `x` `(B, T, H, d_k)`."""
        if self.style == "pairs":  # (x₀, x₁), (x₂, x₃)…
            z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotation
            return torch.view_as_real(z).flatten(-2).type_as(x)
        # (x₀, x_{d/2}), (x₁, x_{d/2+1})… : décaler d’une moitié met en face l’autre membre de chaque paire.
        cos, sin = rotation
        z = x.float()
        return torch.addcmul(z.roll(self.d_k // 2, -1) * sin, z, cos).type_as(x)


class Attention(nn.Module):
    """softmax(q kᵀ/√d_k) v, causale, à têtes groupées (Vaswani et al. 2017, §3.2 ; Ainslie et al. 2023, §2.2).

    De Llama 4, au choix : couches sans RoPE, dont la température croît avec la position ; sur les autres,
    attention par tranches, et requêtes et clés normalisées après RoPE.
    """

    def __init__(self, config: Config, layer: int, rope: RotaryPositionalEmbedding) -> None:
        super().__init__()
        self.layer, self.n_heads, self.d_k, self.eps = layer, config.n_heads, config.d_k, config.rms_norm_eps
        self.rotate = rope.rotate if layer not in config.nope_layers else None
        self.qk_norm = config.qk_norm
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.d_k, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_k, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * config.d_k, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.d_k, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`(B, T, d_model)` → `(B, T, d_model)`."""
        qk, v = self.project(x)
        bias = context.bias
        if self.rotate:
            qk, bias = self.rotate(qk, context.rotation), context.chunk_bias
            if self.qk_norm:
                qk = F.rms_norm(qk, (self.d_k,), eps=self.eps)
        q, k = qk.split([self.n_heads, v.shape[2]], 2)  # (B, T, H, d_k), (B, T, G, d_k)
        if self.rotate is None and context.temperature is not None:
            q = (q * context.temperature).type_as(q)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        y = kernels.attention(q, k, v, bias)  # (B, H, T, d_k)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Requêtes et clés côte à côte, `(B, T, H + G, d_k)`, et valeurs, `(B, T, G, d_k)`."""
        qk = torch.cat([self.q_proj(x), self.k_proj(x)], -1)
        return qk.unflatten(-1, (-1, self.d_k)), self.v_proj(x).unflatten(-1, (-1, self.d_k))


class ExpertMLP(nn.Module):
    """SwiGLU : W_bas (silu(W_porte x) ⊙ W_haut x) (Shazeer 2020, éq. 6) ; couche dense, expert, ou expert partagé."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d_model)` → `(…, d_model)`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Mélange d’experts de Llama 4 : partagé(x) + Σ_{e ∈ top-k} expert_e(σ(r_e) x), où r = W_routeur x.

    Chaque expert ne calcule que pour les jetons qu’il reçoit : leur nombre ne change pas le coût d’un jeton
    (Shazeer et al. 2017, §2 ; Fedus et al. 2021, §2).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_experts, self.k = config.num_local_experts, config.num_experts_per_tok
        self.router = nn.Linear(config.d_model, self.n_experts, bias=False)
        self.experts = nn.ModuleList(ExpertMLP(config.d_model, config.d_ff) for _ in range(self.n_experts))
        self.shared_expert = ExpertMLP(config.d_model, config.d_ff)
        self.scores = self.chosen = None  # r et les experts choisis au dernier passage : (N, E), (N, k)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, d_model)` → `(B, T, d_model)`."""
        tokens = x.flatten(0, -2)  # (N, d_model)
        self.scores = self.router(tokens)  # (N, E)
        top, self.chosen = self.scores.topk(self.k)  # (N, k)
        # Les N·k affectations, rangées par expert : celles d’un même expert se suivent.
        order = self.chosen.flatten().argsort(stable=True)
        source = order // self.k  # le jeton de chacune
        gates = top.sigmoid().flatten()[order, None]  # (N·k, 1)
        load = self.chosen.flatten().bincount(minlength=self.n_experts).tolist()
        received = (tokens.index_select(0, source) * gates).split(load)
        outputs = [kernels.by_tiles(expert, part) for expert, part in zip(self.experts, received, strict=True)]
        return self.shared_expert(tokens).index_add(0, source, torch.cat(outputs)).view_as(x)

    def load(self, real: Tensor | None = None) -> Tensor:
        """Jetons reçus par chaque expert au dernier passage, `(E,)` ; `real` `(N,)` écarte le remplissage."""
        chosen = self.chosen if real is None else self.chosen[real]
        return chosen.flatten().bincount(minlength=self.n_experts)

    def balance_loss(self, real: Tensor) -> Tensor:
        """E Σ_e f_e P_e, la perte d’équilibrage de Switch (Fedus et al. 2021, éq. 4), qui vaut 1 à charges égales.

        f_e est la part des affectations que reçoit l’expert e. P_e, sa probabilité moyenne, porte le gradient : comme
        la porte de Llama 4 est une sigmoïde, c’est σ(r_e) divisé par Σ σ(r), et non un softmax. Une par séquence,
        `(B,)` : elle ne dépend pas du découpage du lot (DeepSeek-V3 2024, §2.1.2). `real` `(B, T)` écarte
        le remplissage.
        """
        gates = self.scores.float().sigmoid()  # (N, E)
        shape = (*real.shape, self.n_experts)
        chosen = F.one_hot(self.chosen, self.n_experts).sum(1).view(shape)  # (B, T, E)
        weights = (real / real.sum(1, keepdim=True).clamp(min=1))[..., None]  # (B, T, 1)
        load = (chosen * weights).sum(1) / self.k  # (B, E)
        probability = ((gates / gates.sum(1, keepdim=True)).view(shape) * weights).sum(1)  # (B, E)
        return self.n_experts * (load * probability).sum(1)

    def __getstate__(self) -> dict[str, Any]:
        # Un tenseur du graphe ne se copie pas : sans cela, copier un modèle en cours d’entraînement échouerait.
        return {**self.__dict__, "scores": None, "chosen": None}


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), puis x + SwiGLU ou MoE de la norme (Xiong et al. 2020, §3, « pre-LN »)."""

    def __init__(self, config: Config, layer: int, rope: RotaryPositionalEmbedding) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, rope)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.feed_forward = MoE(config) if layer in config.moe_layers else ExpertMLP(config.d_model, config.d_ff_dense)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`(B, T, d_model)` → `(B, T, d_model)`."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Le modèle entier : plongement, `n_layers` blocs, norme, et la tête, qui partage ou non le plongement.

    Args:
        config: l’architecture.

    Attributes:
        gradient_checkpointing: à l’entraînement, recalculer chaque bloc au lieu d’en garder les activations
            (Chen et al. 2016, §3) : moins de mémoire, un tiers de calcul en plus.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.rope = RotaryPositionalEmbedding(config)
        self.layers = nn.ModuleList(TransformerBlock(config, i, self.rope) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialize()
        self._real: Tensor | None = None

    @torch.no_grad()
    def _initialize(self) -> None:
        """Écart type 1/√(entrées) : chaque produit garde l’échelle de ce qu’il lit, quelle que soit la largeur.

        Les logits naissent donc de variance 1, et la perte vaut ln V + ½. Le 0,02 des grands modèles est cette règle
        vers d_model = 2 500 ; à d_model = 128, il fait apprendre plus lentement. Ce qui s’ajoute au flux résiduel est
        réduit de √(2 n_layers) (Radford et al. 2019, §2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                n_added = 2 * self.config.n_layers if residual else 1
                parameter.normal_(std=1 / math.sqrt(n_added * parameter.shape[1]))

    def forward(self, ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Les logits du jeton suivant, à chaque position.

        Args:
            ids: `(B, T)` int64.
            mask: `(B, T)` int64 : 0 pour le remplissage, k > 0 pour le k-ième document du bloc. Un jeton ne voit que
                ceux qui le précèdent dans son document, où les positions se comptent. None : un seul document.
            cache: les jetons passés ; `ids` les suit, et s’y ajoute.

        Returns:
            `(B, T, V)`.

        Raises:
            LlamaError: le cache est trop court.
        """
        return self.logits(self.hidden_states(ids, mask, cache))  # (B, T, V)

    def logits(self, x: Tensor) -> Tensor:
        """La tête : `(…, d_model)` → `(…, V)`."""
        return F.linear(x, self.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(x)

    @property
    def head(self) -> Tensor:
        """La matrice de sortie, `(V, d_model)`."""
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def hidden_states(self, ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Ce que lit la tête : `(B, T)` → `(B, T, d_model)` ; voir `forward`."""
        self._real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask > 0
        x = self.embed_tokens(ids)  # (B, T, d_model)
        context = Context.build(self.config, self.rope, ids, mask, cache, kernels.compute_dtype(x))
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    def auxiliary_loss(self) -> Tensor | float:
        """`router_aux_loss_coef` fois la somme des pertes d’équilibrage du dernier passage ; 0 si le modèle est dense.

        Une par séquence, `(B,)`, à ajouter à sa perte moyenne par jeton. L’inférence n’en dépend pas : les poids
        restent ceux d’un Llama 4.
        """
        return self.config.router_aux_loss_coef * sum(moe.balance_loss(self._real) for moe in self._moes())

    def expert_load(self) -> Tensor:
        """Jetons reçus par chaque expert au dernier passage, `(couches MoE, E)` int64, hors remplissage."""
        loads = [moe.load(self._real.flatten()) for moe in self._moes()]
        return torch.stack(loads) if loads else torch.empty(0, 0, dtype=torch.int64)

    def _moes(self) -> list[MoE]:
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoE)]

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> LlamaModel:
        """Charge un modèle publié : dossier, fichier GGUF, nom de `sources` ou du Hub ; voir `pretrained.load`."""
        from . import pretrained

        return pretrained.load(source, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Écrit un dossier que transformers sait charger ; voir `pretrained.save`."""
        from . import pretrained

        pretrained.save(self, folder, **options)
