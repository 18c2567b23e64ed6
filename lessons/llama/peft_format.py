"""Le dossier d’un adaptateur LoRA, au format de peft : `adapter_config.json` et `adapter_model.safetensors`.

Ce module ne connaît que le dossier : ni le modèle, ni ses couches. Il lit et écrit le LoRA de l’article, et
refuse les variantes (DoRA, rsLoRA, rangs par couche…) en les nommant plutôt que de les charger de travers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import LlamaError, system_cause
from .vocabulary import read_json

SETTINGS_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Ce qu’un adapter_config.json peut dire sans changer le calcul ; toute autre option doit y être vide.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules",
    "task_type",
}
# Les autres départs (pissa, olora…) changent aussi le modèle de base, que le dossier ne contient pas.
ORDINARY_STARTS = (True, False, "gaussian")


class StoredAdapter(NamedTuple):
    """Le contenu d’un dossier : les réglages, et par couche A `(r, d_entrée)` et B `(d_sortie, r)`."""

    rank: int
    alpha: float
    dropout: float
    base: str | None
    matrices: dict[str, tuple[Tensor, Tensor]]


def write(folder: Path, adapter: StoredAdapter, targets: list[str], force: bool) -> None:
    """Écrit `adapter` dans `folder`, dont les autres fichiers sont laissés.

    Args:
        folder: créé au besoin.
        adapter: le contenu.
        targets: les fins de noms des couches corrigées (`target_modules`), que lit peft.
        force: remplacer l’adaptateur qui est déjà là.

    Raises:
        LlamaError: un adaptateur est déjà là (sans `force`), disque plein ou interdit.
    """
    occupied = [folder / file for file in (SETTINGS_FILE, TENSORS_FILE) if (folder / file).exists()]
    if occupied and not force:
        raise LlamaError(f"« {occupied[0]} » existe déjà : écrivez ailleurs, ou remplacez-le (force=True).")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
        "target_modules": targets, "bias": "none", "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{layer}.lora_{part}.weight": matrix
        for layer, pair in adapter.matrices.items() for part, matrix in zip("AB", pair, strict=True)
    }
    # Les deux fichiers sont écrits en entier avant que l’un ou l’autre ne prenne son nom.
    partial = {file: folder / f".{file}.partial" for file in (TENSORS_FILE, SETTINGS_FILE)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial[TENSORS_FILE], metadata={"format": "pt"})
        text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
        partial[SETTINGS_FILE].write_text(text, encoding="utf-8")
        for file, path in partial.items():
            os.replace(path, folder / file)
    except (OSError, SafetensorError) as error:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink()
        raise LlamaError(
            f"« {folder} » ne peut pas être écrit ({system_cause(error)}) : vérifiez la place et les droits."
        ) from error


def read(folder: Path) -> StoredAdapter:
    """Relit et vérifie l’adaptateur de `folder`.

    Raises:
        LlamaError: dossier incomplet, fichier abîmé, variante non prise en charge, A et B dépareillées.
    """
    path = folder / SETTINGS_FILE
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise LlamaError(f"« {path} » ne décrit pas un LoRA (peft_type) : donnez un dossier de LoRA de peft.")
    refused = sorted(key for key, value in settings.items() if value and key not in HARMLESS)
    refused += ["bias"] * (settings.get("bias", "none") != "none")
    refused += ["init_lora_weights"] * (settings.get("init_lora_weights", True) not in ORDINARY_STARTS)
    if refused:
        options = ", ".join(refused)
        raise LlamaError(f"« {path} » : option non prise en charge : {options} ; chargez-le avec peft.")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    dropout, base = settings.get("lora_dropout") or 0.0, settings.get("base_model_name_or_path")
    try:
        check_settings(rank, alpha, dropout)
    except LlamaError as error:
        raise LlamaError(f"« {path} » : {error}") from None
    return StoredAdapter(rank, alpha, dropout, base, _read_matrices(folder, rank))


def check_settings(rank: Any, alpha: Any, dropout: Any) -> None:
    """Refuse un rang, un α ou un dropout hors de son domaine."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LlamaError(f"Le rang est un entier strictement positif (reçu : {rank!r}).")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise LlamaError(f"alpha est un nombre strictement positif (reçu : {alpha!r}).")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise LlamaError(f"dropout est une probabilité, dans [0, 1[ (reçu : {dropout!r}).")


def _read_matrices(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Couche → (A, B), toutes du rang annoncé."""
    path = folder / TENSORS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = " (adapter_model.bin est un pickle, qui n’est pas lu)" if pickled else ""
        raise LlamaError(f"« {path} » introuvable{why} : enregistrez l’adaptateur en safetensors.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LlamaError(f"« {path} » est tronqué ou altéré : retrouvez l’original.") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match, shape = KEY.fullmatch(key), tuple(tensor.shape)
        if match is None:
            raise LlamaError(f"« {path} » : {key} n’est pas une matrice de LoRA ; chargez-le avec peft.")
        if len(shape) != 2 or shape["AB".index(match[2])] != rank:
            raise LlamaError(f"« {path} » : {key} est de forme {shape}, sans le rang r = {rank} annoncé.")
        parts.setdefault(match[1], {})[match[2]] = tensor
    alone = [layer for layer, pair in parts.items() if len(pair) != 2]
    if alone or not parts:
        where = alone[0] if alone else "toutes les couches"
        raise LlamaError(f"« {path} » est incomplet : il manque A ou B à {where} ; retrouvez l’original.")
    return {layer: (pair["A"], pair["B"]) for layer, pair in parts.items()}
