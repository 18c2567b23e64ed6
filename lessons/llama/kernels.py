"""Des équations de `model` réécrites pour aller plus vite, à résultat égal : rien ici n’est une idée de plus.

Sur un processeur, un entraînement passe les trois quarts de son temps dans les produits de matrices, qui y sont à
leur vitesse maximale ; ce module réduit le reste. Les essais comparent chaque fonction, et son gradient, à
l’équation qu’elle remplace.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Au-delà, garder les poids d’attention pour le gradient coûte plus de mémoire que le temps gagné n’en vaut.
LONGEST_EXPLICIT = 512
QUERY_BLOCK = 64
LOSS_BLOCK = 1024
ROW_TILE = 32


def keep_freed_memory() -> None:
    """Demande à glibc de garder la mémoire rendue : la redemander à chaque pas au système coûte un dixième du temps."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # une autre bibliothèque C, musl par exemple
        return
    trim_threshold, mmap_threshold = -1, -3  # noms et valeurs de <malloc.h>
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Le type dans lequel une couche linéaire calculera : celui d’autocast s’il est actif, sinon celui de `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _RMSNorm(torch.autograd.Function):
    """y = w ⊙ n, où n = r x et r = (moyenne(x²) + ε)^(−½) ; donc dx = r (w ⊙ dy − n moyenne(n ⊙ w ⊙ dy))."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        d = x.shape[-1]
        rate = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        rate = rate.square_().mul_(1 / d).add_(eps).rsqrt_()  # (…, 1)
        normalized = (x * rate).to(x.dtype)
        ctx.save_for_backward(normalized, rate, weight)
        return (normalized * weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normalized, rate, weight = ctx.saved_tensors
        grad = grad.to(normalized.dtype)
        product = (grad * normalized).view(-1, len(weight))
        projection = (product @ weight).mul_(1 / len(weight)).view(rate.shape)
        dx = (grad * weight).addcmul_(normalized, projection, value=-1).mul_(rate)
        return dx, product.sum(0), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm de `x` `(…, d)`, rendue dans le type où les couches linéaires qui la lisent calculeront."""
    if not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps).to(compute_dtype(x))
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ/√d_k + bias) v (Vaswani et al. 2017, éq. 1), causale si `bias` manque.

    Args:
        q: `(B, H, T, d_k)`.
        k: `(B, G, S, d_k)` ; chaque tête de clés sert H/G têtes de requêtes.
        v: comme `k`.
        bias: `(B ou 1, 1, T, S)`, 0 où une requête voit une clé et −∞ ailleurs.

    Returns:
        `(B, H, T, d_k)`.
    """
    T, S = q.shape[2], k.shape[2]
    training = torch.is_grad_enabled() and q.requires_grad
    if training and q.device.type == "cpu" and 1 < T == S <= LONGEST_EXPLICIT:
        return _explicit_attention(q, k, v, _causal_bias(q) if bias is None else bias)
    if T == 1:  # les têtes qui partagent leurs clés, mises bout à bout, ne les lisent qu’une fois
        rows = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, G, H/G, d_k)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=bias).view(q.shape)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=q.shape[1] != k.shape[1]
    )


def _causal_bias(q: Tensor) -> Tensor:
    T = q.shape[2]
    return torch.full((1, 1, T, T), -math.inf, dtype=q.dtype, device=q.device).triu_(1)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """L’équation, écrite : sur CPU, le gradient du noyau de PyTorch est jusqu’à deux fois et demie plus lent.

    Les requêtes vont par blocs, qui ignorent les clés qui les suivent ; les têtes qui partagent leurs clés sont mises
    bout à bout.
    """
    B, H, T, d_k = q.shape
    G = k.shape[1]
    q = q.unflatten(1, (G, -1))  # (B, G, H/G, T, d_k)
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B·G, T, d_k)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, T, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, T)
            rows = q[:, :, :, start:end].reshape(B * G, -1, d_k)  # (B·G, H/G·bloc, d_k)
            seen = bias[..., start:end, :end].repeat(1, 1 if len(bias) == 1 else G, H // G, 1).flatten(0, 1)
            scores = torch.baddbmm(seen, rows, k[:, :end].mT, alpha=d_k**-0.5)  # (B·G, H/G·bloc, end)
            output = torch.bmm(scores.softmax(-1), v[:, :end])
            outputs.append(output.view(B, H, -1, d_k))
    return torch.cat(outputs, dim=2)


def by_tiles(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, où `function` traite chaque ligne de `x` `(N, d)` à part.

    En bf16, oneDNN compile un noyau par forme de matrice : des N toujours différents, comme les charges des experts,
    coûtent plus que le calcul. Des lignes nulles les ramènent à quelques tailles.
    """
    if x.device.type != "cpu" or compute_dtype(x) == torch.float32:
        return function(x)
    return function(F.pad(x, (0, 0, 0, -len(x) % ROW_TILE)))[:len(x)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Perte et gradients, un bloc de jetons à la fois : les logits de tous n’existent jamais ensemble."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        matrix = weight.to(x.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=x.device)
        for start in range(0, len(x), LOSS_BLOCK):
            rows, targets = x[start:start + LOSS_BLOCK], labels[start:start + LOSS_BLOCK, None]
            log_p = (rows @ matrix.T).float().log_softmax(-1)  # (N, V)
            total -= log_p.gather(1, targets).sum()
            if dx is None and dw is None:
                continue
            # d(−log p_c)/d logits = p − 1_c
            d_logits = log_p.exp_().scatter_add_(1, targets, log_p.new_full(targets.shape, -1.0)).to(x.dtype)
            if dx is not None:
                torch.mm(d_logits, matrix, out=dx[start:start + LOSS_BLOCK])
            if dw is not None:
                dw += d_logits.T @ rows
        ctx.gradients = dx, dw
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.gradients), None


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Somme, en nats, des entropies croisées de softmax(x weightᵀ), comme `F.cross_entropy(…, reduction="sum")`.

    Les jetons d’étiquette -100 sont écartés avant le produit : ils ne coûtent rien.

    Args:
        x: `(N, d_model)`.
        weight: `(V, d_model)`.
        labels: `(N,)` int64.
    """
    kept = labels != -100
    if not bool(kept.all()):
        x, labels = x[kept], labels[kept]
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, labels)
