"""Les réglages : l’architecture d’un modèle (`Config`), ceux d’un entraînement (`TrainingConfig`), et leur validation.

Ce module ne construit rien : il dit ce qui est permis, et refuse le reste dès l’entrée par une `LlamaError`
d’une ligne. Les noms des champs sont ceux de Llama et de Llama 4 dans transformers, sauf `d_model`, `n_layers`,
`d_k`… qui sont ceux des articles.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from dataclasses import dataclass
from typing import Any

ROPE_SCALING = {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_SYSTEM = {
    errno.ENOSPC: "disque plein", errno.EDQUOT: "quota de disque atteint", errno.EROFS: "disque en lecture seule",
    errno.EACCES: "accès refusé", errno.EPERM: "accès refusé", errno.ENOENT: "introuvable",
    errno.ENOTDIR: "n’est pas un dossier", errno.EISDIR: "est un dossier", errno.EEXIST: "existe déjà",
    errno.ENAMETOOLONG: "nom trop long", errno.EIO: "erreur de lecture ou d’écriture", errno.EBUSY: "occupé",
}


class LlamaError(ValueError):
    """Erreur de l’utilisateur : une ligne en français qui nomme la cause et la façon d’en sortir."""


def system_cause(error: Exception) -> str:
    """Ce que le système reproche, en français quand c’est courant : `"disque plein"`, `"accès refusé"`…"""
    number = re.search(r"\(os error (\d+)\)", str(error))  # ce qu’en dit safetensors
    code = getattr(error, "errno", None) or int(number[1] if number else 0)
    return _SYSTEM.get(code) or getattr(error, "strerror", None) or str(error).partition("\n")[0]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LlamaError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
        _require(valid, f"{name} doit être un entier strictement positif (reçu : {value!r}).")


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Construit `cls` depuis un dictionnaire lu dans un fichier, en refusant les champs inconnus ou absents."""
    _require(isinstance(values, dict), f"{cls.__name__} : un dictionnaire de réglages est attendu.")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    _require(not unknown, f"{cls.__name__} : réglage inconnu : {', '.join(unknown)} ; vérifiez l’orthographe.")
    missing = sorted(
        field.name for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.name not in values
    )
    _require(not missing, f"{cls.__name__} : réglage manquant : {', '.join(missing)}.")
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return cls(**lists)


@dataclass(frozen=True)
class Config:
    """Architecture d’un modèle de la famille Llama, dense ou à mélange d’experts (MoE).

    Args:
        vocab_size: nombre de jetons du vocabulaire (V).
        d_model: largeur du flux résiduel.
        n_layers: nombre de blocs.
        n_heads: têtes de requêtes.
        n_kv_heads: têtes de clés et de valeurs (GQA, Ainslie et al. 2023, §2.2) ; par défaut `n_heads`.
        d_k: largeur d’une tête ; par défaut `d_model // n_heads`.
        d_ff: largeur interne du SwiGLU (Shazeer 2020, §2) ; par défaut 8/3 de `d_model`, arrondi à 64.
        block_size: longueur maximale d’une séquence, en jetons (T).
        rms_norm_eps: ε de RMSNorm (Zhang et Sennrich 2019, §3).
        rope_theta: base des fréquences de RoPE (Su et al. 2021, §3.2.2).
        rope_style: paires tournées ensemble : `"halves"` (i, i + d_k/2) comme Llama,
            `"pairs"` (2i, 2i + 1) comme Llama 4 ; par défaut `"pairs"` avec une option de Llama 4 (experts,
            `qk_norm`, `nope_layers`, tranches, température), `"halves"` sinon.
        rope_scaling: étirement des fréquences de Llama 3.1, au format de transformers : `rope_type` (« llama3 »),
            `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`.
        tie_word_embeddings: la sortie partage-t-elle la matrice des plongements ?
        num_local_experts: experts par couche MoE ; 0 donne un modèle dense.
        num_experts_per_tok: experts choisis par jeton (k).
        moe_layers: indices des couches MoE ; par défaut toutes, dès que `num_local_experts` > 0.
        d_ff_dense: largeur interne des couches denses d’un modèle MoE ; par défaut `d_ff`.
        router_aux_loss_coef: poids de la perte d’équilibrage (Fedus et al. 2021, §2.2).
        qk_norm: normalise requêtes et clés après RoPE, comme Llama 4.
        nope_layers: indices des couches sans RoPE (Kazemnejad et al. 2023).
        attention_chunk_size: taille des tranches d’attention des couches à RoPE, comme Llama 4.
        attn_temperature_tuning: température de l’attention croissante avec la position, couches sans RoPE.
        floor_scale: position à partir de laquelle cette température croît.
        attn_scale: sa pente.

    Raises:
        LlamaError: un réglage est hors de son domaine ou incompatible avec un autre.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    d_k: int | None = None
    d_ff: int | None = None
    block_size: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_style: str | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    num_local_experts: int = 0
    num_experts_per_tok: int = 1
    moe_layers: tuple[int, ...] | None = None
    d_ff_dense: int | None = None
    router_aux_loss_coef: float = 0.01
    qk_norm: bool = False
    nope_layers: tuple[int, ...] = ()
    attention_chunk_size: int | None = None
    attn_temperature_tuning: bool = False
    floor_scale: int = 8192
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "d_model", "n_layers", "n_heads", "block_size", "floor_scale")
        self._default("n_kv_heads", self.n_heads)
        if self.d_k is None:
            _require(
                self.d_model % self.n_heads == 0,
                f"n_heads ({self.n_heads}) ne divise pas d_model ({self.d_model}) : "
                "changez l’un des deux, ou donnez d_k.",
            )
        self._default("d_k", self.d_model // self.n_heads)
        self._default("d_ff", -(-8 * self.d_model // (3 * 64)) * 64)
        self._default("d_ff_dense", self.d_ff)
        moe = self.num_local_experts != 0
        self._default("moe_layers", tuple(range(self.n_layers)) if moe else ())
        _require_positive(self, "n_kv_heads", "d_k", "d_ff", "d_ff_dense")
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_kv_heads ({self.n_kv_heads}) doit diviser n_heads ({self.n_heads}).",
        )
        _require(self.d_k % 2 == 0, f"d_k ({self.d_k}) doit être pair : RoPE tourne des paires de coordonnées.")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            _require(isinstance(value, int | float) and value > 0, f"{name} doit être positif (reçu : {value!r}).")
        llama4 = any((moe, self.qk_norm, self.nope_layers, self.attention_chunk_size, self.attn_temperature_tuning))
        self._default("rope_style", "pairs" if llama4 else "halves")
        _require(
            self.rope_style in ("halves", "pairs"),
            f"rope_style vaut « halves » ou « pairs » (reçu : {self.rope_style!r}).",
        )
        if self.rope_scaling is not None:
            _require(
                isinstance(self.rope_scaling, dict) and set(self.rope_scaling) == ROPE_SCALING
                and self.rope_scaling["rope_type"] == "llama3"
                and all(self.rope_scaling[key] > 0 for key in ROPE_SCALING - {"rope_type"})
                and self.rope_scaling["low_freq_factor"] < self.rope_scaling["high_freq_factor"],
                f"rope_scaling veut rope_type « llama3 », {', '.join(sorted(ROPE_SCALING - {'rope_type'}))} positifs, "
                f"et low_freq_factor < high_freq_factor (reçu : {self.rope_scaling!r}).",
            )
        if moe:
            _require_positive(self, "num_local_experts", "num_experts_per_tok")
            _require(
                self.num_experts_per_tok <= self.num_local_experts,
                f"num_experts_per_tok ({self.num_experts_per_tok}) dépasse "
                f"num_local_experts ({self.num_local_experts}).",
            )
        else:
            _require(not self.moe_layers, "moe_layers demande num_local_experts > 0.")
        if self.attention_chunk_size is not None:
            _require_positive(self, "attention_chunk_size")
        for name in ("moe_layers", "nope_layers"):
            outside = [i for i in getattr(self, name) if not 0 <= i < self.n_layers]
            _require(not outside, f"{name} : couche {outside} hors de 0…{self.n_layers - 1}.")

    def _default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Les réglages, prêts pour JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """L’inverse de `to_dict` ; refuse un réglage inconnu ou manquant."""
        return _from_dict(cls, values)

    def replace(self, **changes: Any) -> Config:
        """Une copie où `changes` remplace des réglages."""
        return dataclasses.replace(self, **changes)

    def n_parameters(self, active: bool = False) -> int:
        """Nombre de paramètres, compté sur le papier (un essai le compare au modèle construit).

        Args:
            active: ne compter que ce qu’un jeton traverse (k experts et l’expert partagé par couche MoE).
        """
        attention = self.d_model * self.d_k * (2 * self.n_heads + 2 * self.n_kv_heads)
        norms = 2 * self.d_model
        dense = 3 * self.d_model * self.d_ff_dense
        experts = self.num_experts_per_tok if active else self.num_local_experts
        sparse = (experts + 1) * 3 * self.d_model * self.d_ff + self.num_local_experts * self.d_model
        n_sparse = len(self.moe_layers)
        blocks = self.n_layers * (attention + norms) + n_sparse * sparse + (self.n_layers - n_sparse) * dense
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_word_embeddings else 2)
        return embeddings + blocks + self.d_model


PRESETS: dict[str, dict[str, int]] = {
    # Quelques minutes, puis quelques heures, de deux cœurs ; `petit` est le modèle que le cours publie.
    "mini": {"d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 384, "block_size": 128},
    "petit": {"d_model": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2, "d_ff": 1024, "block_size": 256},
}
"""Architectures nommées, sans le vocabulaire : `Config(vocab_size=…, **PRESETS["petit"])`."""


@dataclass(frozen=True)
class TrainingConfig:
    """Réglages de la boucle d’entraînement.

    Args:
        steps: pas d’optimiseur.
        batch_size: séquences par pas, sur tous les processus ensemble.
        micro_batch_size: séquences passées à la fois (accumulation) ; par défaut toutes.
        learning_rate: taux d’apprentissage au sommet.
        min_lr_ratio: taux final, en fraction du sommet (décroissance en cosinus).
        warmup_steps: pas de montée linéaire ; par défaut un dixième des pas, au plus 100.
        weight_decay: décroissance des poids des matrices (AdamW, Loshchilov et Hutter 2019, §2).
        beta1: mémoire de la moyenne du gradient.
        beta2: mémoire de la moyenne de son carré.
        grad_clip: norme maximale du gradient ; 0 ne coupe pas.
        precision: `"float32"`, ou `"bf16"` (autocast).
        eval_every: pas entre deux évaluations ; 0 n’évalue qu’à la fin.
        patience: évaluations sans progrès avant l’arrêt anticipé ; 0 ne s’arrête pas.
        checkpoint_every: pas entre deux points de reprise ; 0 n’en écrit qu’un, à la fin.
        keep: points de reprise gardés.
        seed: graine de l’ordre des données et du hasard.
        sharded: répartir poids, gradients et état de l’optimiseur entre les processus de torchrun (FSDP), au lieu
            d’en tenir une copie par processus ; sans effet sur un processus seul.

    Raises:
        LlamaError: un réglage est hors de son domaine.
    """

    steps: int
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: str = "float32"
    eval_every: int = 0
    patience: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    seed: int = 0
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch_size is None:
            object.__setattr__(self, "micro_batch_size", self.batch_size)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(100, self.steps // 10))
        _require_positive(self, "steps", "batch_size", "micro_batch_size", "keep")
        for name in ("warmup_steps", "eval_every", "patience", "checkpoint_every", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} ne peut pas être négatif (reçu : {value}).")
        _require(self.learning_rate > 0, f"learning_rate doit être positif (reçu : {self.learning_rate}).")
        _require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio est entre 0 et 1 (reçu : {self.min_lr_ratio}).")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} est dans [0, 1[ (reçu : {getattr(self, name)}).")
        _require(
            self.precision in ("float32", "bf16"),
            f"precision vaut « float32 » ou « bf16 » (reçu : {self.precision!r}).",
        )
        _require(
            not self.patience or self.eval_every > 0,
            "patience demande eval_every > 0 : sans évaluation, rien ne dit quand s’arrêter.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Les réglages, prêts pour JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """L’inverse de `to_dict` ; refuse un réglage inconnu ou manquant."""
        return _from_dict(cls, values)
