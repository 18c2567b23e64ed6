"""LoRA : adapter un grand modèle en n’entraînant que deux petites matrices par couche (Hu et al. 2021, §4.1).

                 y = W x + (α/r) B A x
                          ▲
             ┌────────────┴────────────┐
             │                         │ × α/r
      ┌──────┴──────┐              ┌───┴───┐
      │             │              │   B   │  (d_sortie, r), nulle au départ
      │  W, gelée   │              └───┬───┘
      │             │                  │  r nombres
      │ (d_sortie,  │              ┌───┴───┐
      │   d_entrée) │              │   A   │  (r, d_entrée), au hasard
      └──────┬──────┘              └───┬───┘
             └────────────┬────────────┘
                          x

Un modèle porte plusieurs adaptateurs, chacun sous son nom ; un seul, ou aucun, est actif. Replié,
l’adaptateur est ajouté à W et ne coûte plus rien. Les dossiers sont ceux de peft (`peft_format`). Ce module
laisse de côté les variantes (rsLoRA, DoRA…) et les couches quantifiées.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import peft_format
from .config import LlamaError
from .model import LlamaModel
from .transformers_format import published_name

DEFAULT = "default"  # le nom que peft donne à un adaptateur unique


class Adapter(nn.Module):
    """Les deux matrices d’un adaptateur, pour une couche.

    Args:
        linear: la couche adaptée, de poids `(d_sortie, d_entrée)`.
        rank: r, le rang de la correction.
        alpha: α ; la correction est multipliée par α/r.
        dropout: probabilité d’annuler une entrée de A, à l’entraînement.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.rank, self.alpha, self.scale, self.dropout = rank, alpha, alpha / rank, dropout
        self.A = nn.Linear(d_in, rank, bias=False).weight
        self.B = nn.Linear(rank, d_out, bias=False).weight
        # A est tirée deux fois, comme dans peft : à graine égale, les poids sont les mêmes au bit près.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        # Sur une base en bf16, A et B restent en float32 : elles sont petites, et leurs pas aussi.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.to(linear.weight.device, dtype).train(linear.training)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Ajoute `(α/r) B A x` à `y`, sur place : `x` est `(N, d_entrée)`, `y` est `(N, d_sortie)`."""
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        low = F.linear(x, self.A.to(y.dtype))  # (N, r)
        return y.addmm_(low, self.B.to(y.dtype).T, alpha=self.scale)


class LoRALinear(nn.Module):
    """Une couche linéaire et ses adaptateurs ; son poids n’est pas copié, et garde son nom dans le modèle.

    Attributes:
        adapters: nom → `Adapter`.
        active: le nom de celui qui agit, ou None.
        kept: le poids d’origine `(d_sortie, d_entrée)` tant qu’un adaptateur est replié, sinon None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.register_buffer("kept", None, persistent=False)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d_entrée)` → `(…, d_sortie)`."""
        if self.kept is not None or self.active not in self.adapters:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, x.shape[-1])
        y = self.adapters[self.active](flat, F.linear(flat, self.weight, self.bias))
        return y.view(*x.shape[:-1], y.shape[-1])

    def fold(self) -> None:
        """W ← W + (α/r) B A, arrondi une seule fois ; W est gardé."""
        adapter = self.adapters[self.active]
        self.kept = self.weight.data
        folded = torch.addmm(self.kept.to(adapter.A.dtype), adapter.B, adapter.A, alpha=adapter.scale)
        self.weight.data = folded.to(self.kept.dtype)

    def unfold(self) -> None:
        """Rend le poids gardé : soustraire B A laisserait une erreur d’arrondi."""
        self.weight.data, self.kept = self.kept, None


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[str], dropout: float = 0.0, seed: int = 0,
    name: str = DEFAULT,
) -> None:
    """Pose un adaptateur sur `model`, sur place, et gèle tout le reste.

    Args:
        model: un `LlamaModel` ou un modèle de transformers.
        rank: r.
        alpha: α ; doubler α double la correction, quel que soit r.
        targets: fins de noms de couches linéaires : `["q_proj", "v_proj"]`.
        dropout: probabilité d’annuler une entrée de A, à l’entraînement.
        seed: graine de A ; le hasard du reste du programme n’en est pas changé.
        name: nom de l’adaptateur, qui devient l’actif.

    Raises:
        LlamaError: réglage hors de son domaine, cible introuvable, nom déjà pris, adaptateur replié.
    """
    peft_format.check_settings(rank, alpha, dropout)
    if isinstance(targets, str) or not targets:
        raise LlamaError('targets est une liste non vide de noms de couches, comme ["q_proj", "v_proj"].')
    linears = _published(model)
    chosen = {target: [path for path in linears if f".{path}".endswith(f".{target}")] for target in targets}
    for target, paths in chosen.items():
        if not paths:
            available = ", ".join(dict.fromkeys(map(_leaf, linears)))
            raise LlamaError(f"Cible introuvable : {target} ; couches linéaires de ce modèle : {available}.")
    wanted = set().union(*chosen.values())
    _attach(model, name, [path for path in linears if path in wanted], rank, alpha, dropout, seed)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Rend actif l’adaptateur `name`, seul à demander un gradient ; None rend le modèle de base.

    Raises:
        LlamaError: nom inconnu, ou adaptateur replié.
    """
    _check_unfolded(model)
    if name is not None:
        _check_known(model, name)
    for layer in _layers(model).values():
        layer.active = name
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)


def adapter_names(model: nn.Module) -> list[str]:
    """Les noms des adaptateurs de `model`, dans l’ordre où ils ont été posés."""
    return list(dict.fromkeys(name for layer in _layers(model).values() for name in layer.adapters))


def fold(model: nn.Module) -> None:
    """Replie l’adaptateur actif dans les poids : mêmes sorties à l’arrondi près, sans surcoût.

    Les poids d’origine des couches adaptées restent en mémoire, pour `unfold`. Replié, rien ne s’entraîne.

    Raises:
        LlamaError: aucun adaptateur actif, déjà replié, ou poids partagé avec une autre couche.
    """
    _check_unfolded(model)
    active = {path: layer for path, layer in _layers(model).items() if layer.active in layer.adapters}
    if not active:
        raise LlamaError("Aucun adaptateur actif à replier : choisissez-en un par use_adapter.")
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for path, layer in active.items():
        if owners.count(id(layer.weight)) > 1:
            raise LlamaError(f"{path} partage son poids avec une autre couche, que le repli changerait.")
    with torch.no_grad():
        for layer in active.values():
            layer.fold()
            layer.adapters.requires_grad_(False)


def unfold(model: nn.Module) -> None:
    """Défait `fold` : les poids d’origine reviennent au bit près.

    Raises:
        LlamaError: rien n’est replié.
    """
    folded = [layer for layer in _layers(model).values() if layer.kept is not None]
    if not folded:
        raise LlamaError("Rien à déplier : aucun adaptateur n’est replié dans ce modèle.")
    for layer in folded:
        layer.unfold()
    use_adapter(model, folded[0].active)


def remove_lora(model: nn.Module) -> None:
    """Ôte tous les adaptateurs et dégèle le modèle ; celui qui est replié reste dans les poids."""
    for path, layer in _layers(model).items():
        d_out, d_in = layer.weight.shape
        linear = nn.Linear(d_in, d_out, device="meta").train(layer.training)
        linear.weight, linear.bias = layer.weight, layer.bias
        model.set_submodule(path, linear)
    model.requires_grad_(True)


def save_adapter(model: nn.Module, folder: Path | str, name: str = DEFAULT, force: bool = False) -> None:
    """Écrit l’adaptateur `name` dans un dossier au format de peft, sous les noms de couches de transformers.

    Raises:
        LlamaError: nom inconnu, adaptateur déjà là (sans `force`), disque plein ou interdit.
    """
    _check_known(model, name)
    published = _published(model)
    layers = {published[path]: layer.adapters for path, layer in _layers(model).items()}
    adapters = {layer: named[name] for layer, named in layers.items() if name in named}
    first = next(iter(adapters.values()))
    matrices = {layer: (a.A.detach().cpu(), a.B.detach().cpu()) for layer, a in adapters.items()}
    base = getattr(model, "name_or_path", None)
    stored = peft_format.StoredAdapter(first.rank, first.alpha, first.dropout, base, matrices)
    # Les fins de noms, si elles ne désignent que ces couches ; sinon les noms entiers.
    leaves = set(map(_leaf, adapters))
    exact = {layer for layer in published.values() if _leaf(layer) in leaves} == set(adapters)
    peft_format.write(Path(folder), stored, sorted(leaves if exact else adapters), force)


def load_adapter(model: nn.Module, folder: Path | str, name: str = DEFAULT) -> None:
    """Pose sur `model` l’adaptateur d’un dossier de peft, sous le nom `name` ; il devient l’actif.

    Raises:
        LlamaError: dossier abîmé, variante de LoRA, adaptateur d’un autre modèle, nom déjà pris.
    """
    stored = peft_format.read(Path(folder))
    paths = {layer: path for path, layer in _published(model).items()}
    for layer, (A, B) in stored.matrices.items():
        expected = (B.shape[0], A.shape[1])
        found = tuple(model.get_submodule(paths[layer]).weight.shape) if layer in paths else "absente"
        if found != expected:
            raise LlamaError(
                f"« {folder} » adapte un autre modèle (« {stored.base or 'sans nom'} ») : la couche {layer}, "
                f"{expected}, est ici {found} ; chargez le modèle de base qu’il annonce."
            )
    pairs = {path: stored.matrices.get(layer) for layer, path in paths.items()}
    matrices = {path: pair for path, pair in pairs.items() if pair is not None}
    _attach(model, name, matrices, stored.rank, stored.alpha, stored.dropout, seed=0)
    with torch.no_grad():
        for path, pair in matrices.items():
            adapter = model.get_submodule(path).adapters[name]
            for parameter, matrix in zip((adapter.A, adapter.B), pair, strict=True):
                parameter.copy_(matrix)


def _attach(
    model: nn.Module, name: str, paths: Iterable[str], rank: int, alpha: float, dropout: float, seed: int
) -> None:
    """Pose sur chaque couche de `paths` un adaptateur neuf, et le rend actif."""
    _check_unfolded(model)
    if name in adapter_names(model):
        raise LlamaError(f"L’adaptateur « {name} » existe déjà : donnez un autre nom.")
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise LlamaError(f"Nom d’adaptateur impossible : {name!r} ; prenez lettres, chiffres, - et _.")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for path in paths:
            layer = model.get_submodule(path)
            if not isinstance(layer, LoRALinear):
                layer = LoRALinear(layer)
                model.set_submodule(path, layer)
            layer.adapters[name] = Adapter(layer, rank, alpha, dropout)
    use_adapter(model, name)


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def _published(model: nn.Module) -> dict[str, str]:
    """Couche linéaire → son nom dans transformers, dans l’ordre du modèle."""
    # Une sous-classe de nn.Linear, quantifiée par exemple, calcule autrement que F.linear.
    paths = [path for path, module in model.named_modules() if type(module) in (nn.Linear, LoRALinear)]
    if not isinstance(model, LlamaModel):
        return {path: path for path in paths}
    return {path: published_name(path, model.config) for path in paths}


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _check_known(model: nn.Module, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        raise LlamaError(f"Pas d’adaptateur « {name} » ; ce modèle a : {', '.join(names) or 'aucun'}.")


def _check_unfolded(model: nn.Module) -> None:
    if any(layer.kept is not None for layer in _layers(model).values()):
        raise LlamaError("Un adaptateur est replié dans les poids : dépliez-le d’abord (unfold).")
