"""Chaque écriture rapide, et son gradient, contre l’équation qu’elle remplace."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import kernels


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() < tolerance


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_rms_norm() -> None:
    """x / √(moyenne(x²) + ε) ⊙ w, et ses deux gradients."""
    x, weight = doubles(2, 5, 8), doubles(8)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    assert close(kernels.rms_norm(x, weight, 0.1), expected)
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm(x, w, 0.1), (x, weight))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_types(dtype: torch.dtype, autocast: bool) -> None:
    """La sortie a le type des produits qui suivent ; chaque gradient, celui de ce qu’il corrige."""
    x, weight = torch.randn(4, 8, dtype=dtype, requires_grad=True), torch.ones(8, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = kernels.rms_norm(x, weight, 1e-5)
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == dtype


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 5, 8, 13])
def test_attention(length: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Le chemin de l’entraînement et le noyau de PyTorch donnent l’équation ; le premier, ses gradients aussi."""
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 4)
    q, k, v = doubles(3, 6, length, 4), doubles(3, 2, length, 4), doubles(3, 2, length, 4)
    causal = torch.full((1, 1, length, length), -math.inf, dtype=torch.float64).triu(1)
    bias = None
    if masked:
        bias = causal.repeat(3, 1, 1, 1)
        bias[1, :, 2:, :2] = -math.inf  # deux documents
        bias.diagonal(dim1=2, dim2=3).zero_()
    expected = plain_attention(q, k, v, causal if bias is None else bias)
    assert close(kernels.attention(q, k, v, bias), expected)
    with torch.no_grad():
        assert close(kernels.attention(q, k, v, bias), expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    found = torch.autograd.grad(kernels.attention(q, k, v, bias), (q, k, v), grad)
    assert all(close(a, b) for a, b in zip(found, wanted, strict=True))


def test_attention_takes_the_explicit_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """À l’entraînement seulement, et tant que la séquence est courte."""
    calls = []
    explicit = kernels._explicit_attention
    monkeypatch.setattr(kernels, "_explicit_attention", lambda *a: calls.append(1) or explicit(*a))
    monkeypatch.setattr(kernels, "LONGEST_EXPLICIT", 16)
    for length, expected in ((16, 1), (17, 1)):
        q = doubles(1, 2, length, 4)
        kernels.attention(q, q, q, None)
        assert len(calls) == expected
    with torch.no_grad():
        kernels.attention(q[:, :, :8], q[:, :, :8], q[:, :, :8], None)
    assert len(calls) == 1


@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_linear_cross_entropy(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LOSS_BLOCK", 4)
    x, weight, labels = doubles(10, 6), doubles(9, 6), torch.randint(9, (10,))
    if kept != "all":
        labels[[0, 3, 7] if kept == "some" else slice(None)] = -100
    expected = F.cross_entropy(x @ weight.T, labels, reduction="sum", ignore_index=-100)
    loss = kernels.linear_cross_entropy(x, weight, labels)
    assert close(loss, expected, 1e-5)  # la somme se fait en float32
    wanted = torch.autograd.grad(3 * expected, (x, weight))
    found = torch.autograd.grad(3 * loss, (x, weight))
    assert all(close(a, b, 1e-5) for a, b in zip(found, wanted, strict=True))


def test_linear_cross_entropy_of_frozen_weights() -> None:
    """Une matrice gelée (LoRA) ne reçoit pas de gradient ; à l’évaluation, aucun n’est calculé."""
    x, weight, labels = doubles(5, 6), doubles(9, 6).detach(), torch.randint(9, (5,))
    kernels.linear_cross_entropy(x, weight, labels).backward()
    assert x.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not kernels.linear_cross_entropy(x, weight, labels).requires_grad


def test_linear_cross_entropy_under_autocast() -> None:
    x, weight = torch.randn(40, 16).bfloat16().requires_grad_(), nn.Parameter(torch.randn(30, 16))
    labels = torch.randint(30, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(x, weight, labels)
    loss.backward()
    expected = F.cross_entropy(x.float() @ weight.T, labels, reduction="sum")
    wanted = torch.autograd.grad(expected, (x, weight))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    for found, want in zip((x.grad, weight.grad), wanted, strict=True):
        assert (found - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33])
def test_by_tiles(n: int) -> None:
    """Compléter les lignes ne change ni le résultat ni le gradient, et ramène les tailles à des multiples."""
    sizes = []

    def function(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x @ weight

    weight = torch.randn(4, 3).bfloat16().requires_grad_()
    x = torch.randn(n, 4).bfloat16().requires_grad_()
    y = kernels.by_tiles(function, x)
    y.sum().backward()
    found, weight.grad = weight.grad, None
    function(x).sum().backward()
    assert torch.equal(y, x @ weight) and torch.equal(found, weight.grad)
    assert sizes[0] % kernels.ROW_TILE == 0 and sizes[0] - n < kernels.ROW_TILE
