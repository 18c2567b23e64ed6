"""L’établi des commandes : la machine sur laquelle elles calculent, le dossier dans lequel elles écrivent.

Un dossier d’apprentissage est soit en cours (`command.json` et des points de reprise), soit achevé
(`summary.json`, écrit en dernier). En cours, relancer la même commande le reprend ; achevé, `--force` le
recommence ; d’une autre main, on n’y touche pas.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import llama
from llama import checkpoint, distributed
from llama.config import LlamaError
from llama.console import first_process
from llama.vocabulary import read_json, write_json

COMMAND, SUMMARY, HISTORY = "command.json", "summary.json", "history.json"
CHECKPOINTS, MODEL = "checkpoints", "model.partial"


def find_device(name: str) -> torch.device:
    """`"auto"`, `"cpu"` ou `"cuda"` → un périphérique ; sous torchrun, chaque processus a son GPU.

    Raises:
        LlamaError: `"cuda"` demandé sans GPU visible.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise LlamaError("Aucun GPU n’est visible de PyTorch : prenez --device cpu (ou device=\"cpu\").")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def machine(device: str, threads: int | None = None, seed: int = 0) -> Iterator[torch.device]:
    """Règle les fils et le hasard, rejoint les autres processus si torchrun en a lancé, et rend le périphérique.

    Raises:
        LlamaError: GPU demandé sans GPU visible.
    """
    chosen = find_device(device)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if together:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if together:
            dist.destroy_process_group()


class Output:
    """Le dossier d’une commande d’apprentissage ; `with output:` y travaille, et sait ce qu’un Ctrl-C y laisse.

    Args:
        folder: le dossier, qui peut ne pas exister.
        force: recommencer s’il tient déjà un apprentissage.
        command: le nom de la commande.
        arguments: ce qui doit être égal pour que reprendre ait un sens.

    Attributes:
        checkpoints: le dossier des points de reprise, effacé à la fin.
        resumed: le pas où l’apprentissage en cours s’était arrêté ; 0 s’il est neuf.

    Raises:
        LlamaError: le dossier est pris, ou tient le travail d’une autre commande.
    """

    def __init__(self, folder: Path, force: bool, command: str, arguments: dict[str, Any]) -> None:
        self.folder, self.force, self.started = folder, force, time.perf_counter()
        self.checkpoints = folder / CHECKPOINTS
        self.identity = {"command": command, "arguments": json.loads(json.dumps(arguments, default=str))}
        self.resumed = 0
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise LlamaError(f"« {nearest} » est un fichier : donnez à --out le nom d’un dossier à créer.")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not any((folder / name).exists() for name in (COMMAND, SUMMARY)):
            raise LlamaError(f"« {folder} » n’est pas vide et ne vient pas de llama : choisissez un autre dossier.")
        if force:
            return
        if (folder / SUMMARY).exists():
            raise LlamaError(f"« {folder} » existe déjà : choisissez un autre dossier, ou remplacez-le par --force.")
        differences = _differences(read_json(folder / COMMAND), self.identity)
        if differences:
            raise LlamaError(
                f"« {folder} » tient un autre apprentissage en cours ({differences}) : reprenez-le par les mêmes "
                "options, choisissez un autre dossier, ou recommencez par --force."
            )
        self.resumed = max(checkpoint.steps(self.checkpoints), default=0)

    def __enter__(self) -> Output:
        if first_process():
            if self.force and self.folder.exists():
                shutil.rmtree(self.folder)
            write_json(self.folder / COMMAND, self.identity)
        if distributed.world_size() > 1:
            dist.barrier()  # nul ne lit les points de reprise avant qu’ils ne soient effacés
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        fresh = not checkpoint.steps(self.checkpoints)
        if error is not None and fresh and first_process():
            shutil.rmtree(self.folder)  # rien à reprendre
        if isinstance(error, KeyboardInterrupt):
            kept = "rien n’est gardé." if fresh else (
                f"le point de reprise du pas {max(checkpoint.steps(self.checkpoints))} est dans "
                f"{self.checkpoints} ; relancez la même commande pour continuer."
            )
            raise KeyboardInterrupt(f"Interrompu : {kept}") from None

    def finish(self, results: dict[str, Any], history: Any, save: Callable[[Path], None]) -> dict[str, Any]:
        """Écrit le modèle, l’historique et, en dernier, le résumé, qu’elle rend ; efface les points de reprise.

        Args:
            results: les mesures, ajoutées à la commande dans le résumé.
            history: l’historique de l’apprentissage.
            save: écrit le modèle et son tokenizer dans un dossier, qui n’existe pas.
        """
        summary = {
            **self.identity, **results, "folder": str(self.folder), "version": llama.__version__,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        if first_process():
            model = self.folder / MODEL
            shutil.rmtree(model, ignore_errors=True)
            save(model)
            for file in model.iterdir():
                file.replace(self.folder / file.name)
            model.rmdir()
            history.to_json(self.folder / HISTORY)
            write_json(self.folder / SUMMARY, summary)
            (self.folder / COMMAND).unlink()
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return summary


def _differences(saved: Any, current: dict[str, Any]) -> str:
    """Ce qui sépare deux commandes : `rank : 8 ≠ 16`."""
    saved = saved if isinstance(saved, dict) else {}
    if saved.get("command") != current["command"]:
        return f"commande {saved.get('command')}"
    old, new = saved.get("arguments") or {}, current["arguments"]
    changed = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} : {old.get(key)} ≠ {new[key]}" for key in changed)


def write_summary(path: Path | None, summary: dict[str, Any], force: bool) -> None:
    """Écrit le résumé d’une commande qui ne crée pas de dossier, si un fichier est donné."""
    if path is not None:
        check_summary_file(path, force)
        write_json(path, summary)


def check_summary_file(path: Path | None, force: bool) -> None:
    """Refuse, avant tout calcul, un fichier de résumé qui existe déjà."""
    if path is not None and path.is_dir():
        raise LlamaError(f"« {path} » est un dossier : donnez à --out le nom d’un fichier JSON.")
    if path is not None and path.exists() and not force:
        raise LlamaError(f"« {path} » existe déjà : écrivez ailleurs, ou remplacez-le par --force.")
