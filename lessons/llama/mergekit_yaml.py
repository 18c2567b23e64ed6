"""Le dialecte YAML de mergekit : une recette de fusion, lue et vérifiée avant tout calcul.

Une recette nomme une méthode, des modèles (entiers, ou par tranches de couches) et des paramètres.
`SUPPORTED_KEYS` dit les clés que l’on comprend, `merge_parameters.METHODS` les paramètres de chaque méthode ;
tout le reste est refusé. L’exécution est dans `recipe`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from .config import LlamaError
from .merge_parameters import COUNTS, ELSEWHERE, METHODS, WITHOUT_BASE, parse_parameters
from .parents import Parent, check_compatible, token_order
from .shards import CODES

# Les clés de mergekit que l’on comprend, par niveau ; toute autre est refusée et renvoie à run_mergekit.
SUPPORTED_KEYS = {
    "recette": (
        "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
        "tokenizer_source",
    ),
    "models": ("model", "parameters"),
    "slices": ("sources", "base_model", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}

Opener = Callable[[str], Parent]


class Source(NamedTuple):
    """Un modèle dans une tranche : ses couches `start` à `stop − 1`, et les paramètres qu’il a en propre."""

    parent: Parent
    start: int
    stop: int
    parameters: dict[str, Any]


class Slice(NamedTuple):
    """Une tranche de la sortie ; `sources` commence par le modèle de base pour les méthodes qui en ont un."""

    sources: list[Source]
    parameters: dict[str, Any]


class Recipe(NamedTuple):
    """Une recette vérifiée.

    Attributes:
        text: le dictionnaire lu.
        parents: tous les modèles ; le premier, celui de base s’il y en a un, donne la configuration.
        tokenizer: le modèle dont la sortie prend le tokenizer, si `tokenizer_source` le dit.
        tokens: les jetons de ce tokenizer, dans l’ordre ; vide sans `tokenizer_source`.
    """

    text: dict[str, Any]
    method: str
    slices: list[Slice]
    parents: list[Parent]
    base: Parent | None
    tokenizer: Parent | None
    tokens: list[str]
    parameters: dict[str, Any]
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Lit une recette (fichier YAML, ou dictionnaire déjà lu) et la vérifie, ainsi que ses modèles.

    Raises:
        LlamaError: YAML illisible, clé ou valeur non prise en charge, modèle introuvable ou incompatible.
    """
    text = load_yaml(source)
    _known(text, "recette")
    method = text.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise LlamaError(f"merge_method : {method!r} n’est pas pris en charge ({known}) ; {ELSEWHERE}.")
    if ("models" in text) == ("slices" in text):
        raise LlamaError("La recette doit donner « models » ou « slices », l’un des deux.")
    opened = functools.cache(Parent)
    base = opened(_name(text["base_model"], "base_model")) if text.get("base_model") is not None else None
    parameters = parse_parameters(text, "recette", method)
    if "models" in text:
        slices = [_whole_models(text, method, base, opened)]
    else:
        slices = [_slice(entry, method, base, opened) for entry in _entries(text, "slices")]
    cited = [source.parent for part in slices for source in part.sources]
    parents = list(dict.fromkeys([base, *cited] if base else cited))
    tokenizer = _tokenizer(text.get("tokenizer_source"), parents)
    check_compatible(parents, same_vocabulary=tokenizer is None)
    dtypes = [_dtype(text, key) for key in ("dtype", "out_dtype")]
    tokens = token_order(tokenizer) if tokenizer else []
    return Recipe(text, method, slices, parents, base, tokenizer, tokens, parameters, *dtypes)


def load_yaml(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Le dictionnaire d’une recette, sans autre contrôle."""
    try:
        read = not isinstance(source, Mapping)
        text = yaml.safe_load(Path(source).read_text(encoding="utf-8")) if read else source
    except FileNotFoundError as error:
        raise LlamaError(f"Recette introuvable : {source}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LlamaError(f"Recette illisible : {source} n’est pas un fichier de texte en UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError : une date impossible
        mark = getattr(error, "problem_mark", None)
        line = f", ligne {mark.line + 1}" if mark else ""
        raise LlamaError(f"Recette mal formée : {source}{line} n’est pas du YAML ; corrigez-la.") from error
    if not isinstance(text, Mapping):
        raise LlamaError("Recette mal formée : elle doit être un dictionnaire qui commence par merge_method.")
    return dict(text)


def _whole_models(text: dict[str, Any], method: str, base: Parent | None, opened: Opener) -> Slice:
    """La forme « models » : une seule tranche, de toutes les couches de tous les modèles."""
    sources = []
    for entry in _entries(text, "models"):
        parent = opened(_name(entry.get("model"), "models"))
        sources.append(Source(parent, 0, len(parent.layers), parse_parameters(entry, "models", method)))
    if base and base not in [source.parent for source in sources]:
        sources.append(Source(base, 0, len(base.layers), {}))
    return Slice(_checked_sources(sources, method, base), {})


def _slice(entry: dict[str, Any], method: str, base: Parent | None, opened: Opener) -> Slice:
    if entry.get("base_model") is not None:
        base = opened(_name(entry["base_model"], "slices"))
    sources = []
    for item in _entries(entry, "sources"):
        parent, bounds = opened(_name(item.get("model"), "sources")), item.get("layer_range")
        if not (isinstance(bounds, list) and [type(bound) for bound in bounds] == [int, int]):
            raise LlamaError(f"layer_range doit être [début, fin], fin exclue (reçu : {bounds!r}).")
        n = len(parent.layers)
        if not 0 <= bounds[0] < bounds[1] <= n:
            raise LlamaError(f"layer_range {bounds} sort de {parent.name}, qui a {n} couches : [0, {n}].")
        sources.append(Source(parent, *bounds, parse_parameters(item, "sources", method)))
    if base and method not in WITHOUT_BASE and base not in [source.parent for source in sources]:
        raise LlamaError(f"slices : chaque tranche doit citer le modèle de base, {base.name}.")
    return Slice(_checked_sources(sources, method, base), parse_parameters(entry, "slices", method))


def _checked_sources(sources: list[Source], method: str, base: Parent | None) -> list[Source]:
    names = [source.parent.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise LlamaError(f"{twice} est cité deux fois : un modèle ne se fusionne pas avec lui-même.")
    if base is None and method not in WITHOUT_BASE:
        raise LlamaError(f"{method} demande un modèle de base : ajoutez base_model.")
    depths = {source.stop - source.start for source in sources}
    if len(depths) > 1:
        counts = ", ".join(f"{s.stop - s.start} pour {s.parent.name}" for s in sources)
        raise LlamaError(f"Les modèles d’une tranche doivent y avoir autant de couches : {counts}.")
    n = len(sources) - (method not in WITHOUT_BASE)
    least, most = COUNTS.get(method, (1, math.inf))
    if not least <= n <= most:
        expected = f"{least} modèle{'s' if least > 1 else ''}"
        expected = expected if least == most else f"au moins {expected}"
        extra = "" if method in WITHOUT_BASE else ", en plus du modèle de base"
        raise LlamaError(f"{method} demande {expected}{extra} ; la recette en donne {n}.")
    return sorted(sources, key=lambda source: method not in WITHOUT_BASE and source.parent is not base)


def _known(entry: dict[str, Any], level: str) -> None:
    unknown = next((key for key in entry if key not in SUPPORTED_KEYS[level]), None)
    if unknown is not None:
        accepted = ", ".join(SUPPORTED_KEYS[level])
        raise LlamaError(
            f"La clé « {unknown} » ({level}) n’est pas comprise (acceptées : {accepted}) ; {ELSEWHERE}."
        )


def _entries(owner: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = owner.get(key)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise LlamaError(f"« {key} » doit être une liste non vide dont chaque élément commence par « - ».")
    for entry in entries:
        _known(entry, key)
    return entries


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise LlamaError(f"{where} : un modèle est un dossier ou un nom du Hub (reçu : {value!r}).")
    return value


def _tokenizer(source: Any, parents: list[Parent]) -> Parent | None:
    if source is None:
        return None
    if source == "union":
        raise LlamaError(f"tokenizer_source : union n’est pas pris en charge ; {ELSEWHERE}.")
    names = {parent.name: parent for parent in reversed(parents)} | {"base": parents[0]}
    if not isinstance(source, str) or source not in names:
        raise LlamaError(f"tokenizer_source : {source!r} n’est ni « base » ni un modèle de la recette.")
    return names[source]


def _dtype(text: dict[str, Any], key: str) -> torch.dtype | None:
    name = text.get(key)
    if name is None:
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise LlamaError(f"{key} : {name!r} n’est pas un type de poids ({', '.join(DTYPES)}).")
    return DTYPES[name]
