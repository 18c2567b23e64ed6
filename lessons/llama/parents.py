"""Les parents d’une fusion : leurs poids, leur configuration, leur vocabulaire, et ce qui les sépare.

Un parent est tout ce que `pretrained.find` trouve : un dossier au format de transformers, un nom du Hub ou
de `sources`, un GGUF ; rien n’y est chargé d’avance. Deux parents se fusionnent s’ils ont la même
architecture, les mêmes tenseurs et le même vocabulaire ; sinon l’erreur dit ce qui diffère. Sans ce contrôle,
des modèles aux vocabulaires différents se fondent sans un mot en un modèle qui bafouille.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import LlamaError
from .pretrained import find
from .shards import Shards
from .vocabulary import read_json

LAYER = re.compile(r"^(.*?layers\.)(\d+)(\..+)$")
# Les tables qui ont une ligne par jeton du vocabulaire.
VOCABULARY_TENSORS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
# Ce qui doit être égal, et que les formes seules ne disent pas toujours.
ARCHITECTURE = (
    "model_type", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_local_experts", "tie_word_embeddings",
)


class Parent:
    """Un modèle à fusionner.

    Attributes:
        name: son nom dans la recette.
        folder: son dossier.
        config: son `config.json`.
        weights: ses tenseurs.
        prefix: le début du nom des tenseurs de couche (`model.layers.`).
        layers: par couche, suffixe → nom (`.mlp.up_proj.weight` → `model.layers.3.mlp.up_proj.weight`).
        others: les noms hors des couches (plongements, norme finale, tête).

    Raises:
        LlamaError: dossier introuvable, illisible, quantifié, ou d’une architecture sans couches reconnues.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, _folder(name)
        if not (self.folder / "config.json").is_file():
            raise LlamaError(f"{self.folder} n’est pas un dossier de modèle : pas de config.json.")
        self.config = _read_object(self.folder / "config.json")
        n_layers = self.config.get("num_hidden_layers")
        if self.config.get("quantization_config"):
            raise LlamaError(f"{name} est quantifié : déquantifiez-le avant de le fusionner.")
        if not isinstance(n_layers, int):
            raise LlamaError(f"{name} : config.json ne dit pas num_hidden_layers ; passez par run_mergekit.")
        self.weights = Shards(self.folder)
        self.others: list[str] = []
        layers: dict[int, dict[str, str]] = {}
        prefixes = set()
        for tensor in self.weights.specs:
            match = LAYER.match(tensor)
            if tensor.endswith("rotary_emb.inv_freq"):
                continue  # une table recalculée, que d’anciens modèles enregistraient
            if match is None:
                self.others.append(tensor)
            else:
                prefixes.add(match[1])
                layers.setdefault(int(match[2]), {})[match[3]] = tensor
        if len(prefixes) != 1:
            raise LlamaError(
                f"{name} : architecture non reconnue ({len(prefixes)} piles de couches au lieu d’une) ; "
                "passez par run_mergekit."
            )
        if sorted(layers) != list(range(n_layers)):
            raise LlamaError(
                f"{name} : config.json annonce {n_layers} couches, les poids en ont {len(layers)} "
                f"(la dernière porte le numéro {max(layers)})."
            )
        self.prefix, self.layers = prefixes.pop(), [layers[i] for i in range(n_layers)]

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Jeton → identifiant, lu dans tokenizer.json ; `None` si le dossier n’en a pas."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return None
        content = _read_object(path)
        try:
            vocabulary = content["model"]["vocab"]
            if isinstance(vocabulary, list):  # Unigram : une liste de [jeton, score]
                vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
            return vocabulary | {added["content"]: added["id"] for added in content.get("added_tokens") or []}
        except (KeyError, TypeError, ValueError) as error:
            raise LlamaError(f"{path} n’est pas un tokenizer lisible : téléchargez-le à nouveau.") from error


def check_compatible(parents: Sequence[Parent], *, same_vocabulary: bool = True) -> None:
    """Refuse des parents qui ne se fusionnent pas.

    Args:
        parents: tous les modèles de la recette.
        same_vocabulary: exiger le même vocabulaire ; inutile si la recette dit quel tokenizer garder.

    Raises:
        LlamaError: architectures, tenseurs ou vocabulaires différents ; le message dit lesquels.
    """
    first = parents[0]
    for other in parents[1:]:
        for key in ARCHITECTURE:
            a, b = first.config.get(key), other.config.get(key)
            if a is not None and b is not None and a != b:
                raise LlamaError(
                    f"Architectures différentes : {key} vaut {a} dans {first.name} et {b} dans "
                    f"{other.name} ; on ne fusionne que des modèles de même forme."
                )
        check_same_tensors(first, first.others, other, other.others)
        if same_vocabulary:
            _check_same_vocabulary(first, other)


def check_same_tensors(a: Parent, names: Collection[str], b: Parent, other_names: Collection[str]) -> None:
    """Refuse deux parents dont l’un n’a pas un tenseur (ou un suffixe de couche) que l’autre a."""
    pairs = ((a, b, set(names) - set(other_names)), (b, a, set(other_names) - set(names)))
    for owner, lacking, missing in pairs:
        if missing:
            others = f" (et {len(missing) - 1} autres)" if len(missing) > 1 else ""
            raise LlamaError(
                f"Tenseurs manquants : {lacking.name} n’a pas « {min(missing)} »{others}, que {owner.name} a."
            )


def _check_same_vocabulary(first: Parent, other: Parent) -> None:
    a, b = first.vocabulary, other.vocabulary
    if a == b:
        return
    if a is None or b is None:
        lacking, owner = (first, other) if a is None else (other, first)
        raise LlamaError(
            f"{lacking.name} n’a pas de tokenizer.json et {owner.name} en a un : impossible de vérifier "
            "qu’ils ont le même vocabulaire ; si oui, copiez-y ce fichier."
        )
    token = next(token for token in sorted(a.keys() | b.keys()) if a.get(token) != b.get(token))
    raise LlamaError(
        f"Vocabulaires différents : {first.name} a {len(a)} jetons et {other.name} {len(b)} ; {token!r} y "
        f"porte le numéro {a.get(token, '(absent)')} et {b.get(token, '(absent)')}. Leur fusion "
        "bafouillerait : prenez des modèles de même tokenizer, ou choisissez-en un par tokenizer_source."
    )


def token_order(parent: Parent) -> list[str]:
    """Les jetons d’un parent, dans l’ordre de leurs identifiants.

    Raises:
        LlamaError: pas de tokenizer.json, ou des identifiants qui ne se suivent pas.
    """
    vocabulary = parent.vocabulary
    if vocabulary is None:
        raise LlamaError(f"tokenizer_source : {parent.name} n’a pas de tokenizer.json.")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise LlamaError(
            f"tokenizer_source : les numéros de {parent.name} ne se suivent pas ; passez par run_mergekit."
        )
    return tokens


def aligned(
    parent: Parent, name: str, tokens: Sequence[str], parents: Sequence[Parent], base: Parent | None,
) -> Tensor:
    """La table `name` d’un parent, une ligne par jeton de `tokens`.

    Un jeton qu’il n’a pas y reçoit la ligne du modèle de base s’il l’a, sinon la moyenne de celles des
    parents qui l’ont.

    Args:
        parent: le modèle dont on lit la table.
        name: le nom du tenseur, `(V, …)`.
        tokens: le vocabulaire voulu, dans l’ordre des identifiants.
        parents: les modèles de la recette.
        base: le modèle de base, s’il y en a un.
    """
    table, vocabulary = parent.weights[name], parent.vocabulary or {}
    rows = torch.tensor([vocabulary.get(token, -1) for token in tokens])
    if int(rows.max()) >= len(table):
        raise LlamaError(f"{parent.name} : son tokenizer a plus de jetons que {name} n’a de lignes.")
    if torch.equal(rows, torch.arange(len(tokens))):
        return table[:len(tokens)]
    result = table[rows.clamp(min=0)]
    for i in (rows < 0).nonzero().flatten().tolist():
        holders = [p for p in parents if tokens[i] in (p.vocabulary or {})]
        donors = [base] if base in holders else holders
        known = [p.weights[name][p.vocabulary[tokens[i]]].float() for p in donors]
        result[i] = sum(known) / len(known)
    return result


def _folder(name: str) -> Path:
    if "+" in name and not Path(name).expanduser().is_dir():
        raise LlamaError(
            f"{name} : un LoRA se replie d’abord dans son modèle (module lora), ou passez par run_mergekit."
        )
    return find(name)


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise LlamaError(f"{path} est illisible : un objet JSON est attendu.")
    return content
