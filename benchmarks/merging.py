"""La fusion (SLERP) de deux SmolLM2, contre mergekit : deux commandes, leur temps et leur mémoire."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import yaml
from measure import Measure, Report, french, main

from llama import pretrained
from llama.model import LlamaModel
from llama.shards import Shards


def measure(source: str = "smollm2", repeats: int = 2, processes: bool = True) -> Report:
    """Fusionne le modèle et le même, dont chaque poids a été bruité ; `processes` est sans effet."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _parents(source, folder)
        recipe = folder / "recipe.yml"
        recipe.write_text(yaml.safe_dump(_recipe(folder)), encoding="utf-8")
        commands = {
            "llama": ["-m", "llama", "merge", str(recipe), str(folder / "llama"), "--force"],
            "mergekit": ["-m", "mergekit.scripts.run_yaml", str(recipe), str(folder / "mergekit"),
                         "--no-write-model-card"],
        }
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                results[name].append(_run(command))
        difference = _difference(folder / "llama", folder / "mergekit")
        size = sum(path.stat().st_size for path in folder.glob("a/*.safetensors"))
        disk, startup = _copy_seconds(folder, size), _run(["-c", "import torch, llama.recipe"])[0]
    columns = {name: [list(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}
    (seconds, anonymous, resident), (theirs, their_anonymous, their_resident) = columns.values()
    cost = {"smaller_is_better": True}
    return Report("SLERP de deux SmolLM2", [
        Measure("temps", "s", seconds, theirs, 5.0, disk + startup, **cost),
        Measure("mémoire anonyme, au plus", "Mo", anonymous, their_anonymous, **cost),
        Measure("mémoire résidente, au plus", "Mo", resident, their_resident, 3.0, **cost),
    ], [
        f"Plus grand écart entre les deux fusions, rapporté au plus grand poids du tenseur : {french(difference)}.",
        "La mémoire résidente compte aussi les pages des fichiers lus, que le système reprend quand il veut.",
        f"Profil : {french(startup)} s à démarrer Python et torch, {french(disk)} s à lire deux fois et écrire une "
        f"fois {french(size / 1e6)} Mo ; le reste, {french(min(seconds) - startup - disk)} s, à calculer et vérifier.",
        "Limite du temps : démarrer, lire et écrire, et rien d’autre.",
    ])


def _parents(source: str, folder: Path) -> None:
    model, tokenizer = LlamaModel.from_pretrained(source), pretrained.load_tokenizer(source)
    model.save_pretrained(folder / "a", tokenizer=tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * parameter.std().item())
    model.save_pretrained(folder / "b", tokenizer=tokenizer)


def _recipe(folder: Path) -> dict:
    layers = [0, LlamaModel.from_pretrained(folder / "a").config.n_layers]
    parents = [str(folder / name) for name in "ab"]
    return {
        "slices": [{"sources": [{"model": parent, "layer_range": layers} for parent in parents]}],
        "merge_method": "slerp", "base_model": parents[0], "dtype": "float32",
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                             {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]},
    }


def _run(command: list[str]) -> tuple[float, float, float]:
    """Secondes, mémoire anonyme et mémoire résidente les plus grandes, en Mo, d’un processus Python."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = {"RssAnon": 0, "VmHWM": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            except OSError:
                return  # achevé, ou un système sans /proc
            for key, _, value in (line.partition(":") for line in lines):
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    errors = process.communicate()[1].decode("utf-8", "replace")
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} a échoué : {errors[-500:]}")
    return time.perf_counter() - start, *(max(1, kib) * 1024 / 1e6 for kib in peaks.values())


def _difference(a: Path, b: Path) -> float:
    left, right = Shards(a), Shards(b)
    names = [name for name in left.specs if name in right.specs]
    pairs = ((left[name].float(), right[name].float()) for name in names)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _copy_seconds(folder: Path, size: int) -> float:
    """Le temps de lire deux fois, et d’écrire une fois, le fichier des poids."""
    start = time.perf_counter()
    for name in "ab":
        content = b"".join(path.read_bytes() for path in sorted(folder.glob(f"{name}/*.safetensors")))
    (folder / "copie").write_bytes(content)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(measure)
