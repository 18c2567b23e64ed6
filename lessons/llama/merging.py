"""La fusion de modèles : des poids de même forme entrent, un seul tenseur sort, sans aucun entraînement.

Une fonction par méthode. Toutes calculent en float32 (en float64 si les poids le sont) et arrondissent une
seule fois, à la fin. Elles avancent par blocs : la mémoire de travail ne dépend pas de la taille du tenseur,
hors le résultat et, pour TIES et DARE, un octet par poids et par modèle (le masque). Les noms de tenseurs,
les couches et les fichiers sont l’affaire de `recipe`.

Le « vecteur de tâche » d’un modèle affiné est sa différence avec le modèle de base, τ = θ − θ₀
(Ilharco et al. 2023, §2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .config import LlamaError

BLOCK = 1 << 17
# Au-delà de ce cosinus, l’angle est trop petit pour être divisé : SLERP devient une interpolation linéaire.
NEARLY_COLINEAR = 0.9995
NEGLIGIBLE = 1e-8


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Moyenne pondérée, la « soupe » de modèles (Wortsman et al. 2022, §2) : Σ wᵢ θᵢ / Σ wᵢ.

    Args:
        tensors: les poids θᵢ, tous de même forme.
        weights: les coefficients wᵢ, un par tenseur.
        normalize: diviser par leur somme.
        dtype: type du résultat ; par défaut le type commun des entrées.

    Raises:
        LlamaError: les formes diffèrent, ou les coefficients à normaliser s’annulent.
    """
    total = math.fsum(weights) if normalize else 1.0
    if abs(total) < NEGLIGIBLE:
        raise LlamaError("La somme des poids (weight) est nulle : changez-les, ou donnez normalize: false.")
    return _combine(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)) / total, tensors, dtype)


def slerp(first: Tensor, second: Tensor, t: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """Interpolation sphérique (Shoemake 1985, §3.3) : sin((1−t)Ω)/sin Ω · θ₁ + sin(tΩ)/sin Ω · θ₂.

    Ω est l’angle des deux tenseurs vus comme deux vecteurs ; `t = 0` rend le premier, `t = 1` le second.
    Presque colinéaires, ils sont interpolés en ligne droite.
    """
    gram = _gram([first, second])
    norms = gram.diagonal().sqrt()
    cosine = float(gram[0, 1] / norms.prod()) if norms.min() > NEGLIGIBLE else 0.0
    if abs(cosine) > NEARLY_COLINEAR:
        a, b = 1 - t, t
    else:
        angle = math.acos(cosine)
        a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return _combine(lambda x, y: a * x + b * y, [first, second], dtype)


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, scaling: float = 1.0,
    normalize: bool = False, dtype: torch.dtype | None = None,
) -> Tensor:
    """Arithmétique de tâches (Ilharco et al. 2023, §2) : θ₀ + λ Σ wᵢ (θᵢ − θ₀).

    Args:
        base: le modèle de base θ₀.
        tensors: les modèles affinés θᵢ.
        weights: les coefficients wᵢ ; négatif, il retire une tâche.
        scaling: λ.
        normalize: diviser la somme par Σ wᵢ.
        dtype: type du résultat ; par défaut le type commun des entrées.
    """
    return _add_task_vectors(base, tensors, weights, scaling=scaling, normalize=normalize, dtype=dtype)


def ties(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], *,
    normalize: bool = True, rescale: bool = False, **options: Any,
) -> Tensor:
    """TIES (Yadav et al. 2023, §3) : garder les plus grands écarts, élire un signe, sommer ceux qui l’ont.

    Args:
        base, tensors, weights: comme `task_arithmetic` ; `options` : ses `scaling` et `dtype`.
        densities: part des écarts gardés, par modèle, les plus grands en valeur absolue ; à égalité au seuil,
            les premiers rencontrés.
        normalize: diviser, en chaque position, par la somme des wᵢ des modèles retenus (la moyenne de
            l’article).
        rescale: rendre à chaque vecteur de tâche élagué sa norme L1 d’avant (hors de l’article).
    """
    masks = [keep_largest(base, x, density) for x, density in zip(tensors, densities, strict=True)]
    gains = [_realised_gain(base, x, m) if rescale else 1.0 for x, m in zip(tensors, masks, strict=True)]
    return _add_task_vectors(
        base, tensors, weights, masks=masks, gains=gains, normalize=normalize, consensus=True, **options
    )


def dare_linear(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], *,
    rescale: Literal["realised", "expected"] | None = "realised", generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """DARE (Yu et al. 2024, §3.2) : annuler des écarts au hasard, agrandir ceux qui restent, puis sommer.

    Args:
        base, tensors, weights: comme `task_arithmetic` ; `options` : ses `scaling`, `normalize` et `dtype`.
        densities: probabilité de garder un écart, par modèle (1 − p dans l’article).
        rescale: `"expected"` divise par la densité, comme l’article ; `"realised"` rend au vecteur élagué la
            norme L1 qu’il avait, comme mergekit : le même facteur en espérance ; `None` ne fait rien.
        generator: source du hasard.
    """
    masks = [keep_random(x, density, generator) for x, density in zip(tensors, densities, strict=True)]
    gains = [1.0] * len(masks)
    if rescale == "realised":
        gains = [_realised_gain(base, x, mask) for x, mask in zip(tensors, masks, strict=True)]
    elif rescale == "expected":
        gains = [1 / density if density else 1.0 for density in densities]
    return _add_task_vectors(base, tensors, weights, masks=masks, gains=gains, **options)


def dare_ties(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    **options: Any,
) -> Tensor:
    """DARE, puis l’élection de signe de TIES (Yu et al. 2024, §3.3) ; mêmes arguments que `dare_linear`."""
    return dare_linear(base, tensors, weights, densities, consensus=True, **options)


def passthrough(tensor: Tensor, scale: float | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Le tenseur tel quel, au bit près, pour empiler des couches ; multiplié par `scale` s’il est donné."""
    if scale is None:
        return tensor if dtype is None else tensor.to(dtype)
    return _combine(lambda x: scale * x, [tensor], dtype)


def model_stock(
    base: Tensor, tensors: Sequence[Tensor], *, filter_wise: bool = False, dtype: torch.dtype | None = None,
) -> Tensor:
    """Model Stock (Jang et al. 2024, §4.2) : t · moyenne(θᵢ) + (1 − t) · θ₀.

    t = k cos θ / (1 + (k − 1) cos θ), où θ est l’angle moyen entre les k vecteurs de tâche, deux à
    deux ; s’ils s’opposent, reste la base.

    Args:
        base: le modèle de base θ₀.
        tensors: au moins deux modèles affinés.
        filter_wise: un t par vecteur de la dernière dimension au lieu d’un par tenseur.
        dtype: type du résultat ; par défaut le type commun des entrées.
    """
    if not filter_wise:
        ratio = float(_stock_ratio(_gram(tensors, origin=base)))
        return _combine(lambda x, *xs: x + ratio * (sum(xs) / len(xs) - x), [base, *tensors], dtype)
    width = base.shape[-1]

    def formula(origin: Tensor, *points: Tensor) -> Tensor:
        vectors = torch.stack(points) - origin
        vectors = vectors.unflatten(1, (-1, width)).transpose(0, 1)  # (lignes, k, largeur)
        ratios = _stock_ratio((vectors @ vectors.mT).double()).to(origin.dtype)  # (lignes,)
        return origin + (ratios[:, None] * vectors.mean(1)).flatten()

    return _combine(formula, [base, *tensors], dtype, block=width * max(1, BLOCK // width))


def keep_largest(base: Tensor, tensor: Tensor, density: float) -> Tensor:
    """Masque des `density` plus grands écarts |θ − θ₀|, au moins un (Yadav et al. 2023, §3, « trim »)."""
    n = tensor.numel()
    k = max(1, int(density * n)) if density > 0 else 0
    if k == 0 or k >= n:
        return torch.full(tensor.shape, k > 0)
    threshold, missing = _threshold(base, tensor, k)
    mask = torch.empty(tensor.shape, dtype=torch.bool)
    for part, (x, y) in zip(mask.view(-1).split(BLOCK), _blocks([base, tensor]), strict=True):
        magnitudes = (y - x).abs().float()
        tied = magnitudes == threshold
        part.copy_((magnitudes > threshold) | (tied & (tied.cumsum(0) <= missing)))
        missing -= min(missing, int(tied.sum()))
    return mask


def keep_random(tensor: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Masque où chaque position est gardée avec la probabilité `density` (Yu et al. 2024, §3.2, « drop »)."""
    mask = torch.empty(tensor.shape, dtype=torch.bool)
    for block in mask.view(-1).split(BLOCK):
        block.copy_(torch.rand(block.shape, generator=generator) < density)
    return mask


def _add_task_vectors(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, masks: Sequence[Tensor] = (),
    gains: Sequence[float] = (), scaling: float = 1.0, normalize: bool = False, consensus: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """θ₀ + λ Σ wᵢ gᵢ mᵢ (θᵢ − θ₀), où mᵢ et gᵢ sont les masques et les gains ; `consensus` : voir `ties`."""
    n = len(tensors)

    def formula(origin: Tensor, *blocks: Tensor) -> Tensor:
        w = torch.tensor(weights, dtype=origin.dtype).view(n, 1)
        votes = w * (torch.stack(blocks[:n]) - origin)  # (n, bloc)
        divisor = w.sum()
        if masks:
            votes *= torch.stack(blocks[n:]) * torch.tensor(gains, dtype=origin.dtype).view(n, 1)
        if consensus:
            elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
            agree = votes.sign() == elected
            votes *= agree
            divisor = (w * agree).sum(0)
        total = scaling * votes.sum(0)
        if normalize:
            total /= torch.where(divisor.abs() < NEGLIGIBLE, 1.0, divisor)
        return origin + total

    return _combine(formula, [base, *tensors, *masks], dtype)


def _threshold(base: Tensor, tensor: Tensor, k: int) -> tuple[float, int]:
    """Le k-ième plus grand |θ − θ₀|, et combien de ceux qui l’égalent font partie des k premiers.

    Des float32 positifs se rangent comme leurs bits : les compter par leurs 16 bits de poids fort, puis par
    les 16 autres, donne le rang exact en deux lectures, sans tri ni copie.
    """
    prefix = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for x, y in _blocks([base, tensor], 1 << 20):
            bits = (y - x).abs().float().view(torch.int32)
            bits = bits >> 16 if shift else bits[bits >> 16 == prefix] & 0xFFFF
            counts += torch.bincount(bits, minlength=1 << 16)
        at_least = counts.flip(0).cumsum(0).flip(0)  # (65536,)
        bucket = int((at_least >= k).nonzero()[-1])
        k -= int(at_least[bucket] - counts[bucket])
        prefix = prefix << 16 | bucket
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32)), k


def _realised_gain(base: Tensor, tensor: Tensor, mask: Tensor) -> float:
    """Rapport de la norme L1 du vecteur de tâche à celle de sa partie gardée ; 1 si rien n’est gardé."""
    whole = kept = 0.0
    for x, y, m in _blocks([base, tensor, mask]):
        magnitudes = (y - x).abs()
        whole, kept = whole + float(magnitudes.sum()), kept + float((magnitudes * m).sum())
    return whole / kept if kept > 0 else 1.0


def _stock_ratio(gram: Tensor) -> Tensor:
    """Le t de Model Stock, des produits scalaires des vecteurs de tâche `(…, k, k)` au rapport `(…)`."""
    k = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    cosines = torch.where(products > 0, gram / products, 0.0) * (1 - torch.eye(k, dtype=gram.dtype))
    cosine = cosines.sum((-2, -1)) / (k * (k - 1))
    denominator = 1 + (k - 1) * cosine
    return torch.where(denominator.abs() > 1e-6, k * cosine / denominator, 0.0)


def _gram(tensors: Sequence[Tensor], origin: Tensor | None = None) -> Tensor:
    """Produits scalaires deux à deux `(n, n)`, en float64, des tenseurs (moins `origin`) mis à plat."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for blocks in _blocks(tensors if origin is None else [origin, *tensors]):
        vectors = torch.stack(blocks) if origin is None else torch.stack(blocks[1:]) - blocks[0]
        total += vectors.double() @ vectors.double().T
    return total


def _combine(
    formula: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype | None, block: int = BLOCK,
) -> Tensor:
    """Applique `formula` aux tenseurs, bloc par bloc ; le résultat a leur forme et le type `dtype`."""
    result = torch.empty(tensors[0].shape, dtype=dtype or _common_dtype(tensors))
    for part, blocks in zip(result.view(-1).split(block), _blocks(tensors, block), strict=True):
        part.copy_(formula(*blocks))
    return result


def _blocks(tensors: Sequence[Tensor], block: int = BLOCK) -> Iterator[list[Tensor]]:
    """Les morceaux plats de même rang de tous les tenseurs, dans le type de calcul."""
    if len({tuple(x.shape) for x in tensors}) != 1:
        shapes = " et ".join(str(tuple(x.shape)) for x in tensors)
        raise LlamaError(f"On ne fusionne que des tenseurs de même forme, ici {shapes}.")
    work = torch.promote_types(_common_dtype(tensors), torch.float32)
    for parts in zip(*(x.reshape(-1).split(block) for x in tensors), strict=True):
        yield [part.to(work) for part in parts]


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))
