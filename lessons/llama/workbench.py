"""L’établi des commandes : la machine sur laquelle elles calculent, le dossier dans lequel elles écrivent.

Un dossier d’apprentissage est soit en cours (`command.json` et des points de reprise), soit achevé
(`summary.json`, écrit en dernier). En cours, relancer la même commande le reprend ; achevé, `--force` le
recommence ; d’une autre main, on n’y touche pas.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import llama
from llama import checkpoint, distributed
from llama.config import LlamaError, TrainingConfig
from llama.data import Examples
from llama.history import History
from llama.vocabulary import read_json, write_json

COMMAND, SUMMARY, HISTORY = "command.json", "summary.json", "history.json"
CHECKPOINTS, MODEL = "checkpoints", "model.partial"
EVALUATED = 256
"""Exemples tirés pour les évaluations en cours de route, au plus : elles restent courtes."""


def find_device(name: str) -> torch.device:
    """`"auto"`, `"cpu"` ou `"cuda"` → un périphérique ; sous torchrun, chaque processus a son GPU.

    Raises:
        LlamaError: `"cuda"` demandé sans GPU visible, ou moins de GPU que de processus : ils ne se partagent pas.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise LlamaError("Aucun GPU n’est visible de PyTorch : prenez --device cpu (ou device=\"cpu\").")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    wanted, present = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if wanted > present:
        raise LlamaError(
            f"{wanted} processus pour {present} GPU : lancez-en {present} (--nproc-per-node), ou prenez --device cpu."
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def machine(device: str, threads: int | None = None, seed: int = 0) -> Iterator[torch.device]:
    """Règle les fils et le hasard, rejoint les autres processus si torchrun en a lancé, et rend le périphérique.

    Raises:
        LlamaError: voir `find_device` ; graine démesurée.
    """
    if abs(seed) >= 2**32:
        raise LlamaError(f"--seed est un entier de 32 bits au plus (reçu : {seed}).")
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
        inputs: ce que la commande lit, et que recommencer effacerait si c’était dans `folder`.

    Attributes:
        checkpoints: le dossier des points de reprise, effacé à la fin.
        resumed: le pas où l’apprentissage en cours s’était arrêté ; 0 s’il est neuf.

    Raises:
        LlamaError: le dossier est pris, ou tient le travail d’une autre commande.
    """

    def __init__(
        self, folder: Path, force: bool, command: str, arguments: dict[str, Any], inputs: Sequence[str | Path] = ()
    ) -> None:
        self.folder, self.force, self.started = folder, force, time.perf_counter()
        self.checkpoints = folder / CHECKPOINTS
        self.identity = {"command": command, "arguments": json.loads(json.dumps(arguments, default=str))}
        self.resumed, self.files = 0, [HISTORY, SUMMARY, COMMAND]
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise LlamaError(f"« {nearest} » est un fichier : donnez à --out le nom d’un dossier à créer.")
        if not folder.exists() or not any(folder.iterdir()):
            return
        started, finished = (_read(folder / name) for name in (COMMAND, SUMMARY))
        if "command" not in started and "files" not in finished:
            raise LlamaError(f"« {folder} » n’est pas vide et ne vient pas de llama : choisissez un autre dossier.")
        self.files += [Path(name).name for name in finished.get("files", ())]
        within = [path for path in inputs if Path(path).resolve().is_relative_to(folder.resolve())]
        if within:
            raise LlamaError(f"« {folder} » contient « {within[0]} », qui sera lu : choisissez un autre dossier.")
        if force:
            return
        if finished:
            raise LlamaError(f"« {folder} » existe déjà : choisissez un autre dossier, ou remplacez-le par --force.")
        differences = _differences(started, self.identity)
        if differences:
            raise LlamaError(
                f"« {folder} » tient un autre apprentissage en cours ({differences}) : reprenez-le par les mêmes "
                "options, choisissez un autre dossier, ou recommencez par --force."
            )
        self.resumed = max(checkpoint.steps(self.checkpoints), default=0)

    def __enter__(self) -> Output:
        distributed.on_first(self._open)  # nul ne lit les points de reprise avant qu’ils ne soient effacés
        return self

    def _open(self) -> None:
        if self.force:
            self._clear()
        write_json(self.folder / COMMAND, self.identity)

    def _clear(self) -> None:
        """Efface ce que la commande a écrit, et rien d’autre."""
        for name in self.files:
            (self.folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, MODEL):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        fresh = not checkpoint.steps(self.checkpoints)
        if error is not None and fresh and distributed.rank() == 0:
            self._clear()  # rien à reprendre
            with suppress(OSError):
                self.folder.rmdir()
        if isinstance(error, KeyboardInterrupt):
            kept = "rien n’est gardé." if fresh else (
                f"le point de reprise du pas {max(checkpoint.steps(self.checkpoints))} est dans "
                f"{self.checkpoints} ; relancez la même commande pour continuer."
            )
            raise KeyboardInterrupt(f"Interrompu : {kept}") from None

    def finish(self, results: dict[str, Any], history: History, save: Callable[[Path], None]) -> dict[str, Any]:
        """Écrit le modèle, l’historique et, en dernier, le résumé, qu’elle rend ; efface les points de reprise.

        Args:
            results: les mesures, ajoutées à la commande dans le résumé.
            history: l’historique de l’apprentissage.
            save: écrit le modèle et son tokenizer dans un dossier, qui n’existe pas.
        """
        summary = {**self.identity, **results, "folder": str(self.folder), "version": llama.__version__}
        distributed.on_first(lambda: self._write(summary, history, save))
        return summary

    def _write(self, summary: dict[str, Any], history: History, save: Callable[[Path], None]) -> None:
        model = self.folder / MODEL
        shutil.rmtree(model, ignore_errors=True)
        save(model)
        summary["files"] = sorted(file.name for file in model.iterdir())
        for name in summary["files"]:
            (model / name).replace(self.folder / name)
        model.rmdir()
        history.to_json(self.folder / HISTORY)
        summary["seconds"] = round(time.perf_counter() - self.started, 3)
        write_json(self.folder / SUMMARY, summary)
        (self.folder / COMMAND).unlink()
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    """Ce que dit `command.json` ou `summary.json` ; rien s’il manque, ou vient d’ailleurs."""
    try:
        content = read_json(path)
    except LlamaError:
        return {}
    return content if isinstance(content, dict) else {}


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Ce qui sépare deux commandes : `rank : 8 ≠ 16`."""
    if saved.get("command") != current["command"]:
        return f"commande {saved.get('command')}"
    old, new = saved.get("arguments") or {}, current["arguments"]
    changed = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} : {old.get(key)} ≠ {new[key]}" for key in changed)


def settings_of(config: TrainingConfig) -> dict[str, Any]:
    """Les réglages dont dépend le résultat : une reprise doit avoir les mêmes."""
    names = ("steps", "batch_size", "learning_rate", "precision", "eval_every", "patience", "seed")
    return {name: getattr(config, name) for name in names}


def sample(examples: Examples, seed: int) -> Examples:
    """Au plus `EVALUATED` exemples, tirés au hasard : les évaluations restent courtes."""
    order = torch.randperm(len(examples.ids), generator=torch.Generator().manual_seed(seed))
    return examples.select(order[:EVALUATED].sort().values)


def results_of(history: History) -> dict[str, Any]:
    """Ce que le résumé retient d’un apprentissage."""
    last = history.evaluations[-1]["val_loss"]
    return {
        "steps": len(history.steps), "tokens": sum(int(record["tokens"]) for record in history.steps),
        "tokens_per_second": round(history.tokens_per_second, 1), "train_loss": history.losses[-1],
        "val_loss": last, "perplexity": math.exp(last),
    }


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
