"""safetensors en flux : lire un tenseur sans charger le fichier, écrire un modèle sans le tenir en mémoire.

Le format (https://github.com/huggingface/safetensors#format) tient en trois morceaux : huit octets, la
longueur de l’en-tête ; l’en-tête en JSON, qui donne à chaque tenseur son type, sa forme et sa place ; les
données. Un gros modèle est découpé en plusieurs fichiers et un index dit où est chaque tenseur, comme sur le
Hub. Ce module ne connaît que des dossiers de tenseurs : ni configuration, ni tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import LlamaError, system_cause

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# La taille au-delà de laquelle un fichier est découpé, comme sur le Hub.
MAX_SHARD_BYTES = 5_000_000_000
HEADER_LIMIT = 100_000_000
_AGAIN = "téléchargez-le à nouveau"


class Spec(NamedTuple):
    """Ce qu’il faut savoir d’un tenseur pour lui réserver sa place : son type et sa forme."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_elements * self.dtype.itemsize


class Shards:
    """Les tenseurs d’un dossier de modèle, en un fichier ou plusieurs, lus un par un au besoin.

    Attributes:
        specs: nom → `Spec`, dans l’ordre des fichiers.

    Raises:
        LlamaError: pas de safetensors dans le dossier, fichier absent, tronqué ou altéré, type non flottant.
    """

    def __init__(self, folder: Path) -> None:
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        index = folder / INDEX
        if index.is_file():
            declared = _read_index(index)
            for file in sorted(set(declared.values())):
                self._read_header(folder / file)
            absent = sorted(set(declared) - set(self.specs))
            if absent:
                raise LlamaError(f"{index} annonce « {absent[0]} », que ses fichiers n’ont pas : {_AGAIN}.")
        elif (folder / SINGLE).is_file():
            self._read_header(folder / SINGLE)
        else:
            raise LlamaError(
                f"Pas de poids safetensors dans {folder} : il faut {SINGLE} ou {INDEX} "
                "(les formats à pickle, comme pytorch_model.bin, ne sont pas lus)."
            )

    def __getitem__(self, name: str) -> Tensor:
        """Le tenseur `name` ; ses pages sont lues du fichier au besoin et rendues quand il disparaît."""
        spec, (path, offset) = self.specs[name], self._places[name]
        if spec.n_bytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        # Mode « c » : torch refuse un tableau en lecture seule ; rien n’y est écrit, donc rien n’est copié.
        data = np.memmap(path, np.uint8, "c", offset, (spec.n_bytes,))
        return torch.from_numpy(data).view(spec.dtype).view(spec.shape)

    def _read_header(self, path: Path) -> None:
        damaged = f"{path} est tronqué ou altéré : {_AGAIN}."
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length)) if length <= HEADER_LIMIT else None
            available = path.stat().st_size - 8 - length
            if available < 0:
                raise LlamaError(damaged)
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            unread = next((name for name, entry in entries.items() if entry["dtype"] not in DTYPES), None)
            if unread is not None:
                raise LlamaError(
                    f"{path} : « {unread} » est de type {entries[unread]['dtype']} ; seuls les poids "
                    "flottants se lisent ici, déquantifiez d’abord le modèle."
                )
            for name, entry in entries.items():
                start, end = entry["data_offsets"]
                spec = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                natural = all(isinstance(n, int) and n >= 0 for n in (start, end, *spec.shape))
                if not natural or end > available or end - start != spec.n_bytes:
                    raise LlamaError(damaged)
                self.specs[name], self._places[name] = spec, (path, 8 + length + start)
        except FileNotFoundError as error:
            raise LlamaError(f"Il manque {path}, annoncé par l’index : {_AGAIN}.") from error
        except LlamaError:
            raise
        except (OSError, struct.error, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise LlamaError(damaged) from error


def write_shards(
    folder: Path, specs: dict[str, Spec], tensors: Iterable[Tensor], max_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Écrit les tenseurs un à un dans `folder`, dans l’ordre de `specs`, en fichiers d’au plus `max_bytes`.

    Les en-têtes ne demandent que les formes : chaque tenseur est écrit dès qu’il arrive, puis oublié.

    Returns:
        Le nombre d’octets de données.
    """
    groups: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if groups[-1] and sum(s.n_bytes for s in groups[-1].values()) + spec.n_bytes > max_bytes:
            groups.append({})
        groups[-1][name] = spec
    n, stream = len(groups), iter(tensors)
    files = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for name, group in zip(files, groups, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(group))
            for spec in group.values():
                tensor = next(stream)
                if Spec(tensor.dtype, tuple(tensor.shape)) != spec:
                    raise RuntimeError(f"tenseur {tensor.dtype} {tuple(tensor.shape)} à la place de {spec}")
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
                del tensor  # sans quoi il survivrait au calcul du suivant
    total = sum(spec.n_bytes for spec in specs.values())
    if n > 1:
        weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total


@contextlib.contextmanager
def new_folder(out: Path, force: bool, inputs: Sequence[Path], n_bytes: int) -> Iterator[Path]:
    """Un dossier provisoire à côté de `out`, qui prend sa place si tout va bien et disparaît sinon.

    Args:
        out: le dossier de modèle à créer.
        force: remplacer celui qui s’y trouve.
        inputs: dossiers lus entre-temps, que `out` ne doit donc pas contenir.
        n_bytes: place nécessaire.

    Raises:
        LlamaError: sortie déjà là, qui n’est pas un modèle ou qui contient une entrée ; disque plein.
    """
    partial, old = (out.with_name(f".{out.name}.{state}") for state in ("partial", "old"))
    if old.exists() and not out.exists():
        old.rename(out)  # un remplacement tué entre ses deux renommages
    occupied = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if occupied and not force:
        raise LlamaError(f"{out} existe déjà : choisissez un autre dossier, ou remplacez-le par --force.")
    if occupied and not (out / "config.json").is_file():
        raise LlamaError(f"{out} n’est pas un dossier de modèle : il ne sera pas remplacé, changez-en.")
    inside = next((folder for folder in inputs if folder.resolve().is_relative_to(out)), None)
    if inside:
        raise LlamaError(f"{out} contient {inside}, à lire entre-temps : prenez un autre dossier.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if n_bytes > free:
            need = f"il faut {n_bytes / 1e9:.1f} Go, il en reste {free / 1e9:.1f}"
            raise LlamaError(f"Pas assez de place pour {out} : {need} ; libérez-en.")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        yield partial
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        cause = system_cause(error)
        raise LlamaError(f"Le modèle n’a pas été écrit dans {out} : {cause} ; rien n’a été remplacé.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _header(specs: dict[str, Spec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.n_bytes
        entries[name] = {"dtype": CODES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # les données commencent à un multiple de huit
    return struct.pack("<Q", len(text)) + text


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(file).name for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LlamaError(f"Index de poids illisible : {path} ; {_AGAIN}.") from error
