"""Ce dont un carnet a besoin, et rien d’autre : profil, graines, nombres et figures enregistrés, code montré.

Un carnet commence par `setup()`. Chaque nombre que le texte du cours cite passe par `record`, chaque figure
par `figure` : ils restent dans les sorties du carnet exécuté, et `docs/_ext/carnet.py` les y relit pour les
chapitres. Ce module ne lit aucun carnet et ne dessine rien.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import llama
from llama.config import LlamaError
from llama.vocabulary import read_json, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROFILES = ("rapide", "complet")
NARROW_NBSP = "\u202f"  # espace fine insécable
PIXELS_PER_INCH = 96  # à l’affichage ; l’image est deux fois plus fine, pour les écrans denses

_recorded: dict[str, str | None] = {}  # nom → cellule qui l’a enregistré, si le client la nomme


def in_colab() -> bool:
    """Le carnet tourne-t-il dans Google Colab ?"""
    return "google.colab" in sys.modules


def profile() -> str:
    """Rend le profil d’exécution : `"rapide"` ou `"complet"`.

    La variable LLAMA_PROFIL décide ; sans elle, `complet` là où il y a un GPU, `rapide` ailleurs.

    Raises:
        LlamaError: LLAMA_PROFIL a une autre valeur.
    """
    chosen = os.environ.get("LLAMA_PROFIL", "")
    if not chosen:
        import torch

        return "complet" if torch.cuda.is_available() else "rapide"
    if chosen not in PROFILES:
        raise LlamaError(f"LLAMA_PROFIL vaut « {chosen} » : choisissez « rapide » ou « complet ».")
    return chosen


def setup(seed: int = 0) -> str:
    """Prépare un carnet : graines, fils d’exécution (OMP_NUM_THREADS, 2 par défaut) et style des figures.

    Args:
        seed: graine de `random`, de NumPy et de PyTorch.

    Returns:
        Le profil, pour choisir les tailles : `steps = 300 if setup() == "rapide" else 3000`.
    """
    import torch

    from llama import plots

    _recorded.clear()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    plots.style()
    name = profile()
    print(f"Profil {name}, graine {seed}")
    return name


def french(value: Any, digits: int = 2) -> str:
    """Écrit une valeur à la française : virgule décimale, milliers séparés par une espace fine insécable.

    `french(11034624)` → « 11 034 624 » ; `french(2.3149)` → « 2,31 » ; `french(True)` → « oui ».

    Args:
        value: entier, flottant, booléen ou texte ; un scalaire NumPy ou PyTorch convient.
        digits: chiffres après la virgule d’un flottant ; les entiers n’en ont jamais.

    Raises:
        LlamaError: la valeur n’est ni l’un ni l’autre, ou n’est pas finie.
    """
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return "oui" if value else "non"
    if isinstance(value, str):
        return value
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LlamaError(f"{value!r} ne s’écrit pas : il faut un nombre fini, un booléen ou un texte.")
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("-")  # −0,00 se lit 0,00
    return text.replace("-", "−").replace(",", NARROW_NBSP).replace(".", ",")


def record(name: str, value: Any, unit: str = "", digits: int = 2) -> None:
    """Affiche « nom : valeur unité » et enregistre la valeur dans les sorties du carnet.

    Un chapitre la cite par le rôle `:valeur:` ; il ne peut donc montrer que des chiffres comparés par les
    essais.

    Args:
        name: nom de la valeur, unique dans le carnet ; les soulignés s’affichent comme des espaces.
        value: nombre, booléen ou texte (voir `french`).
        unit: unité, affichée après une espace insécable.
        digits: chiffres après la virgule, affichés et enregistrés.

    Raises:
        LlamaError: le nom est déjà pris, ou la valeur ne s’écrit pas.
    """
    text = french(value, digits)
    if hasattr(value, "item"):
        value = value.item()
    stored = round(value, digits) if isinstance(value, float) else value
    _register(name)
    entry = {"name": name, "value": stored, "text": text, "unit": unit}
    line = f"{name.replace('_', ' ')} : {text}" + (f" {unit}" if unit else "")
    _display({"text/plain": line}, {"scrapbook": entry})


def figure(name: str, fig: Figure, *, alt: str, data: Any, digits: int = 2) -> None:
    """Affiche une figure une seule fois et l’enregistre avec son texte de remplacement.

    Les images ne se comparent pas d’une machine à l’autre : c’est l’empreinte des données arrondies, écrite
    dans la sortie textuelle, que les essais comparent.

    Args:
        name: nom de la figure, unique dans le carnet.
        fig: la figure ; elle est fermée après affichage.
        alt: ce que montre la figure, pour qui ne la voit pas ; écrit ici et nulle part ailleurs.
        data: ce qui est tracé : un tableau, ou un dictionnaire {nom de la série: tableau}.
        digits: chiffres gardés par l’arrondi avant l’empreinte.

    Raises:
        LlamaError: le nom est déjà pris, ou le texte de remplacement manque.
    """
    import matplotlib.pyplot as plt

    if not alt.strip():
        raise LlamaError(f"La figure « {name} » n’a pas de texte de remplacement : décrivez-la dans `alt`.")
    _register(name)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=2 * PIXELS_PER_INCH, metadata={"Software": None})
    width, height = (round(inches * PIXELS_PER_INCH) for inches in fig.get_size_inches())
    plt.close(fig)
    metadata = {
        "image/png": {"width": width, "height": height},
        "scrapbook": {"name": name, "alt": re.sub(r"[ \n]+", " ", alt).strip()},
    }
    text = f"Figure « {name} » : {digest(data, digits)}"
    _display({"image/png": buffer.getvalue(), "text/plain": text}, metadata)


def digest(data: Any, digits: int = 2) -> str:
    """Résume des données arrondies : étendue de chaque série, puis une empreinte de l’ensemble.

    Args:
        data: un tableau, ou un dictionnaire {nom: tableau}, de nombres ou de textes.
        digits: chiffres gardés après la virgule.
    """
    series = data if isinstance(data, dict) else {"": data}
    summaries, content = [], hashlib.sha256()
    for label, values in series.items():
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            array = np.round(array.astype(np.float64), digits) + 0.0  # + 0.0 : −0 et 0 ne font qu’un
            shape = " × ".join(str(size) for size in array.shape) or "1"
            low, high = (french(bound, digits) for bound in (array.min(), array.max()))
            summaries.append(f"{label} ({shape}, de {low} à {high})".strip())
        else:
            summaries.append(f"{label} ({array.size} textes)".strip())
        content.update(repr((str(label), array.tolist())).encode())
    return f"{', '.join(summaries)} ; empreinte {content.hexdigest()[:12]}"


def show_source(thing: Any) -> None:
    """Affiche le code même de la bibliothèque : celui d’une classe, d’une fonction ou d’un module.

    Args:
        thing: l’objet dont montrer le code.
    """
    source = textwrap.dedent(inspect.getsource(thing)).rstrip()
    _display({"text/markdown": f"```python\n{source}\n```", "text/plain": source}, {})


def save_results(path: str | Path, results: dict[str, Any]) -> None:
    """Écrit les résultats d’un calcul trop long pour un carnet, et de quoi le refaire : commande, version, machine.

    Args:
        path: fichier JSON à écrire, d’ordinaire dans lessons/resultats/.
        results: nombres, textes et listes.
    """
    import torch

    command = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    origin = {
        "commande": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "version": git.stdout.strip() or llama.__version__,
        "machine": f"{_processor()}, {torch.get_num_threads()} fil(s) de calcul",
        "date": date.today().isoformat(),
    }
    write_json(Path(path), {"origine": origin, **results})


def load_results(path: str | Path) -> dict[str, Any]:
    """Relit ce que `save_results` a écrit, et affiche d’où cela vient.

    Raises:
        LlamaError: fichier absent ou illisible.
    """
    results = read_json(Path(path))
    origin = results.pop("origine")
    print(f"Résultats de « {origin['commande']} », version {origin['version']}, {origin['date']} ({origin['machine']})")
    return results


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return " ".join((names or [platform.processor() or platform.machine()])[0].split())


def _register(name: str) -> None:
    """Refuse un nom déjà enregistré, sauf par la même cellule que l’on relance."""
    cell = _current_cell()
    if name in _recorded and (cell is None or _recorded[name] != cell):
        raise LlamaError(f"Le nom « {name} » est déjà enregistré dans ce carnet : choisissez-en un autre.")
    _recorded[name] = cell


def _current_cell() -> str | None:
    """Identifie la cellule en cours, si le client la nomme (JupyterLab, VS Code, Colab) ; sinon None."""
    shell = _shell()
    if shell is None:
        return None
    metadata = getattr(shell, "parent_header", {}).get("metadata", {})
    return metadata.get("cellId") or metadata.get("colab", {}).get("cell_id")


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def _display(data: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Montre une sortie riche dans un carnet, son texte ailleurs."""
    if _shell() is None:
        print(data["text/plain"])
        return
    from IPython.display import display

    display(data, metadata=metadata, raw=True)
