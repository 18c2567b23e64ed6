"""Les paramètres d’une recette de fusion : ce que chaque méthode accepte, et ce que chacun vaut où.

Dans le YAML de mergekit, un paramètre est un nombre, une liste de nombres interpolée le long des couches (un
« gradient »), ou une suite de filtres sur les noms de tenseurs. `parse_parameters` vérifie ces écritures,
`value_at` dit ce qu’elles valent pour un tenseur donné.
"""

from __future__ import annotations

import math
from typing import Any

from .config import LlamaError

REQUIRED = object()
_TASK_VECTORS = {"weight": REQUIRED, "lambda": 1.0, "normalize": False, "int8_mask": False}
# Les paramètres de chaque méthode et leurs valeurs par défaut, celles de mergekit.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": REQUIRED, "normalize": True},
    "slerp": {"t": REQUIRED},
    "task_arithmetic": _TASK_VECTORS,
    "ties": _TASK_VECTORS | {"density": 1.0, "normalize": True, "rescale": False},
    "dare_linear": _TASK_VECTORS | {"density": 1.0, "rescale": True},
    "dare_ties": _TASK_VECTORS | {"density": 1.0, "rescale": True},
    "passthrough": {"scale": None},
    "model_stock": {"filter_wise": False},
}
WITHOUT_BASE = ("linear", "passthrough")
# Nombre de modèles, hors le modèle de base : au moins, au plus.
COUNTS = {"slerp": (1, 1), "passthrough": (1, 1), "model_stock": (2, math.inf)}
# Un réel par modèle, un réel pour tous, un oui ou non pour tous (int8_mask : la mémoire de mergekit).
PER_MODEL = {"weight": (-math.inf, math.inf), "density": (0, 1), "scale": (-math.inf, math.inf)}
SHARED = {"t": (0, 1), "lambda": (-math.inf, math.inf)}
SWITCHES = ("normalize", "rescale", "int8_mask", "filter_wise")
ELSEWHERE = "run_mergekit confie la recette au vrai mergekit"


def value_at(key: str, levels: list[dict[str, Any]], tensor: str, position: float) -> Any:
    """Ce que vaut un paramètre pour un tenseur ; `None` si aucun niveau ne le dit.

    Le premier niveau qui répond l’emporte ; dans une liste de filtres, le premier contenu dans le nom du
    tenseur. Une liste de nombres est interpolée : `[0, 1, 0]` en `position` 0,25 vaut 0,5.

    Args:
        key: le paramètre.
        levels: ses écritures possibles, de la plus particulière à la plus générale.
        tensor: le nom du tenseur.
        position: où l’on est dans la tranche, de 0 (première couche) à 1 (dernière).
    """
    for level in levels:
        for condition in level.get(key, ()):
            if condition["filter"] in ("*", None) or condition["filter"] in tensor:
                return _interpolate(condition["value"], position)
    return None


def _interpolate(value: Any, position: float) -> Any:
    if not isinstance(value, list):
        return value
    place = position * (len(value) - 1)
    left = min(int(place), len(value) - 2) if len(value) > 1 else 0
    right = min(left + 1, len(value) - 1)
    return value[left] + (place - left) * (value[right] - value[left])


def parse_parameters(owner: dict[str, Any], level: str, method: str) -> dict[str, list[dict[str, Any]]]:
    """Les paramètres d’un niveau, chacun ramené à une liste de conditions `{"filter": …, "value": …}`."""
    given = owner.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise LlamaError(f"parameters ({level}) doit être un dictionnaire (reçu : {given!r}).")
    result = {}
    for key, value in given.items():
        if key not in METHODS[method]:
            accepted = ", ".join(METHODS[method])
            raise LlamaError(
                f"Le paramètre « {key} » n’existe pas pour {method} (acceptés : {accepted}) ; {ELSEWHERE}."
            )
        if level in ("models", "sources") and key not in PER_MODEL:
            raise LlamaError(f"« {key} » vaut pour toute la fusion : placez-le hors de « {level} ».")
        filtered = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        result[key] = [_condition(key, condition) for condition in (value if filtered else [value])]
    return result


def _condition(key: str, condition: Any) -> dict[str, Any]:
    pattern = None
    if isinstance(condition, dict):
        if "value" not in condition or not set(condition) <= {"filter", "value"}:
            raise LlamaError(f"{key} : un filtre s’écrit {{filter: …, value: …}} (reçu : {condition!r}).")
        pattern, condition = condition.get("filter"), condition["value"]
        if not isinstance(pattern, str | None):
            raise LlamaError(f"{key} : filter doit être un morceau de nom de tenseur (reçu : {pattern!r}).")
    if key in SWITCHES:
        if not isinstance(condition, bool):
            raise LlamaError(f"{key} doit être true ou false (reçu : {condition!r}).")
        return {"filter": pattern, "value": condition}
    if condition == []:
        raise LlamaError(f"{key} : la liste est vide.")
    if isinstance(condition, list):
        return {"filter": pattern, "value": [_number(key, item) for item in condition]}
    return {"filter": pattern, "value": _number(key, condition)}


def _number(key: str, value: Any) -> float:
    low, high = (PER_MODEL | SHARED)[key]
    try:  # PyYAML lit « 1e-3 » comme un texte
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise LlamaError(f"{key} doit être un nombre (reçu : {value!r}).")
    if not low <= number <= high:
        raise LlamaError(f"{key} doit être entre {low} et {high} (reçu : {value}).")
    return number
