"""Les points de reprise : écrits d’un coup, vérifiés, sans pickle.

Un point de reprise est un dossier `000120/` (le numéro du pas) qui contient un fichier safetensors par groupe de
tenseurs (poids, état de l’optimiseur, état du hasard…) et `state.json` : le pas, l’état de la boucle, et le
SHA-256 de chaque fichier. On l’écrit sous un nom provisoire, on le force sur le disque, puis on le renomme : à
tout instant, un dossier numéroté est entier. Ce module ne sait rien de l’entraînement : il range des tenseurs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import distributed
from .config import LlamaError, system_cause

FORMAT = "llama-library/checkpoint/1"
STATE_FILE = "state.json"


class Checkpoint(NamedTuple):
    """Un point de reprise relu : le pas, les groupes de tenseurs et l’état (tout ce que JSON sait dire)."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int = 2) -> Path:
    """Écrit le point de reprise du pas `step` dans `folder`, puis efface les plus anciens.

    Args:
        folder: dossier des points de reprise ; créé au besoin.
        step: pas d’optimiseur, qui donne son nom au point.
        tensors: groupes nommés de tenseurs ; un fichier safetensors par groupe.
        state: le reste, en JSON.
        keep: nombre de points gardés, celui-ci compris.

    Returns:
        Le dossier du point de reprise.

    Raises:
        LlamaError: le disque est plein ou interdit ; les points précédents sont intacts.
    """
    final = folder / f"{step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = {}
        for group, content in tensors.items():
            path = partial / f"{group}.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}, path)
            files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {"format": FORMAT, "step": step, "state": state, "files": files}
        (partial / STATE_FILE).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise LlamaError(
            f"Point de reprise du pas {step} non écrit dans {folder} : {system_cause(error)} ; "
            "les points précédents sont intacts, libérez de la place puis relancez la même commande."
        ) from error
    for old in steps(folder)[:-keep]:
        _discard(folder / f"{old:06d}")
    return final


def steps(folder: Path) -> list[int]:
    """Les pas des points de reprise présents dans `folder`, dans l’ordre."""
    return sorted(int(path.name) for path in Path(folder).glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def load(folder: Path) -> Checkpoint | None:
    """Relit et vérifie le dernier point de reprise de `folder` ; `None` s’il n’y en a pas.

    Raises:
        LlamaError: le dernier point est tronqué, altéré, ou d’un autre format.
    """
    present = steps(folder)
    if not present:
        return None
    path = Path(folder) / f"{present[-1]:06d}"
    way_out = "effacez ce dossier pour reprendre au point précédent" if present[:-1] else "effacez ce dossier"
    try:
        manifest = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise LlamaError(f"{path} n’est pas un point de reprise de cette bibliothèque ; {way_out}.")
        step, state = manifest["step"], manifest["state"]
        files = [(path / name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except LlamaError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise LlamaError(f"Point de reprise illisible : {path / STATE_FILE} ; {way_out}.") from error
    tensors = {}
    for file, size, sha256 in files:
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != sha256:
            raise LlamaError(f"Point de reprise tronqué ou altéré : {file} ; {way_out}.")
        tensors[file.stem] = load_file(file)
    return Checkpoint(step, tensors, state)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """L’état de l’optimiseur, nommé d’après les paramètres : `exp_avg/blocks.0.norm.weight` → tenseur."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """L’inverse de `optimizer_tensors`, sur place."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        entry, name = key.split("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][entry] = value if entry == "step" else distributed.part_of(value, parameter)


def random_tensors() -> dict[str, Tensor]:
    """L’état des générateurs de PyTorch, processeur et GPU courant."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, Tensor]) -> None:
    """L’inverse de `random_tensors` ; un générateur qui n’y est pas reste comme il est."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _discard(path: Path) -> None:
    # Renommer d’abord : tué au milieu de l’effacement, il ne reste pas de dossier numéroté à demi vide.
    trash = path.with_name(f".{path.name}.partial")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
