"""Préparer un modèle à décoder : les mêmes équations, sur des poids rangés pour des produits d’une seule ligne.

Décoder un jeton lit tous les poids pour une seule ligne d’activations : le temps est celui de cette lecture, non du
calcul. `prepare` range donc les poids dans l’ordre où ils seront lus (`native`), réunit les couches qui lisent la même
entrée, et peut réduire chaque poids à deux octets ou à un seul. Sans compilateur, les mêmes poids passent par le
produit par lots de PyTorch : on y gagne de la mémoire, mais guère de temps. Le modèle d’origine reste intact : c’est
lui que l’on entraîne et que l’on enregistre.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .config import LlamaError
from .lora import LoRALinear
from .model import Attention, ExpertMLP, LlamaModel, MoE

FEW_ROWS = 16
"""Au-delà, le calcul l’emporte sur la lecture des poids, et les produits de PyTorch vont plus vite."""
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class Bands(nn.Module):
    """Une matrice `(d_out, d_in)`, rangée en bandes de 64 lignes : `(bandes, d_in, 64)`, complétée par des zéros.

    En int8, W ≈ diag(s) Q, où Q est entière entre -127 et 127 et s = max|W|/127, ligne par ligne : l’arrondi écarte
    chaque poids d’au plus s/2 (Dettmers et al. 2022, §2, « absmax »). Les activations restent en float32.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.d_out, self.d_in = weight.shape
        weight = F.pad(weight.float(), (0, 0, 0, -self.d_out % native.BAND))
        self.scale = torch.ones(len(weight))
        if dtype == torch.int8:
            largest = torch.linalg.vector_norm(weight, torch.inf, 1)
            self.scale = largest / 127
            weight = (weight * (127 / largest.clamp_(min=1e-30)[:, None])).round_()
        bands = weight.to(dtype).unflatten(0, (-1, native.BAND)).mT
        self.bands = bands.clone(memory_format=torch.contiguous_format)
        self.n_bytes = self.bands.nbytes + (self.scale.nbytes if dtype == torch.int8 else 0)
        self.product, self.addresses = native.products().get(dtype), (self.bands.data_ptr(), self.scale.data_ptr())

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d_in)` → `(…, d_out)`."""
        *shape, n = x.shape
        n_rows, n_bands = x.numel() // n, len(self.bands)
        if n_rows <= FEW_ROWS and self.product is not None:
            x, y = x.contiguous(), x.new_empty(*shape, len(self.scale))
            self.product(*self.addresses, x.data_ptr(), y.data_ptr(), n_bands, n, n_rows)
        else:
            dtype = torch.float32 if self.bands.dtype == torch.float32 else torch.bfloat16
            rows = x.reshape(1, n_rows, n).to(dtype).expand(n_bands, -1, -1)
            y = torch.bmm(rows, self.bands.to(dtype))  # (bandes, N, 64)
            y = y.transpose(0, 1).reshape(*shape, len(self.scale)) * self.scale
        return y if y.shape[-1] == self.d_out else y[..., :self.d_out]

    def rows(self, ids: Tensor) -> Tensor:
        """Les lignes `ids` de la matrice : `(…)` → `(…, d_in)`."""
        rows = self.bands[ids // native.BAND, :, ids % native.BAND]
        return rows * self.scale[ids][..., None]


Pack = Callable[..., nn.Module]


class Rows(nn.Module):
    """La table des plongements, lue dans la matrice rangée de la tête qui la partage."""

    def __init__(self, matrix: Bands) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        """`(B, T)` → `(B, T, d_model)`."""
        return self.matrix.rows(ids)


class FusedAttention(Attention):
    """`Attention`, dont un seul produit donne requêtes, clés et valeurs."""

    def __init__(self, source: Attention, pack: Pack) -> None:
        nn.Module.__init__(self)
        self.layer, self.d_k, self.eps = source.layer, source.d_k, source.eps
        self.rotate, self.qk_norm = source.rotate, source.qk_norm
        self.n_heads, self.n_kv_heads = source.n_heads, len(source.k_proj.weight) // source.d_k
        self.qkv_proj, self.o_proj = pack(source.q_proj, source.k_proj, source.v_proj), pack(source.o_proj)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Voir `Attention.project`."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.d_k))  # (B, T, H + 2 G, d_k)
        return qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 2)


class FusedMLP(ExpertMLP):
    """`ExpertMLP`, dont un seul produit donne la porte et le haut."""

    def __init__(self, source: ExpertMLP, pack: Pack) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = pack(source.gate_proj, source.up_proj), pack(source.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d_model)` → `(…, d_model)`."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class PreparedModel(LlamaModel):
    """Ce que rend `prepare` : un `LlamaModel` qui génère et s’évalue, mais ne s’entraîne ni ne s’enregistre."""

    def logits(self, x: Tensor) -> Tensor:
        """Voir `LlamaModel.logits`."""
        return self.lm_head(x)


@torch.no_grad()
def prepare(model: LlamaModel, precision: str = "float32") -> PreparedModel:
    """Une copie de `model` rangée pour décoder ; à refaire si ses poids changent.

    Args:
        model: sur le processeur, adaptateurs repliés ; il n’est pas modifié.
        precision: celle des poids : `"float32"` (mêmes logits, à l’ordre des additions près), `"bf16"`, ou `"int8"`.
            Les activations restent en float32.

    Raises:
        LlamaError: précision inconnue, modèle déjà préparé, sur un GPU, ou adaptateur actif.
    """
    if precision not in PRECISIONS:
        raise LlamaError(f"precision vaut {', '.join(PRECISIONS)} (reçu : {precision!r}).")
    if isinstance(model, PreparedModel):
        raise LlamaError("Ce modèle est déjà préparé : préparez plutôt l’original.")
    if model.embed_tokens.weight.device.type != "cpu":
        raise LlamaError("Un modèle se prépare sur le processeur : un GPU décode vite sans cela (model.to(\"cpu\")).")
    if any(isinstance(m, LoRALinear) and m.kept is None and m.active in m.adapters for m in model.modules()):
        raise LlamaError("Un adaptateur est actif : repliez-le d’abord (lora.fold).")

    def pack(*layers: nn.Module) -> nn.Module:
        weights = [layer.weight for layer in layers]
        return Bands(weights[0] if len(weights) == 1 else torch.cat(weights), PRECISIONS[precision])

    with torch.device("meta"):
        prepared = PreparedModel(model.config)
    for block, source in zip(prepared.layers, model.layers, strict=True):
        block.self_attn = FusedAttention(source.self_attn, pack)
        if isinstance(source.feed_forward, MoE):
            experts = [FusedMLP(expert, pack) for expert in source.feed_forward.experts]
            block.feed_forward.experts = nn.ModuleList(experts)
            block.feed_forward.shared_expert = FusedMLP(source.feed_forward.shared_expert, pack)
        else:
            block.feed_forward = FusedMLP(source.feed_forward, pack)
    tied = model.config.tie_word_embeddings
    prepared.lm_head = pack(model.embed_tokens if tied else model.lm_head)
    if tied:
        prepared.embed_tokens = Rows(prepared.lm_head)
    weights = model.state_dict()  # restent les normes, les routeurs, et une table de plongements à part
    rest = {name: weights[name].to(torch.float32, copy=True) for name in prepared.state_dict()}
    prepared.load_state_dict(rest, assign=True)
    return prepared.requires_grad_(False).eval()


def size(model: nn.Module) -> int:
    """Octets des poids de `model`, préparé ou non."""
    packed = sum(module.n_bytes for module in model.modules() if isinstance(module, Bands))
    return packed + sum(parameter.nbytes for parameter in model.parameters())
