"""L’exécution d’une recette de fusion, tenseur par tenseur, de safetensors à safetensors.

La mémoire suit le plus gros tenseur, pas le modèle : un tenseur est lu à travers son fichier, fondu par
blocs, écrit, oublié. Tout ce qui peut être refusé l’est avant d’écrire, et le dossier de sortie ne prend son
nom qu’une fois entier. La recette est lue par `mergekit_yaml`, les formules sont dans `merging`, les modèles
dans `parents`, les fichiers dans `shards`. `run_mergekit` confie la même recette au vrai mergekit.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from . import merging
from .config import LlamaError
from .merge_parameters import METHODS, PER_MODEL, REQUIRED, WITHOUT_BASE, value_at
from .mergekit_yaml import Recipe, Slice, load_yaml, read_recipe
from .parents import VOCABULARY_TENSORS, Parent, aligned, check_same_tensors
from .progress import progress_bar
from .shards import Spec, new_folder, write_shards

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)
# Ce que config.json dit couche par couche : à réordonner quand on empile autrement.
PER_LAYER = ("layer_types", "no_rope_layers")


class Task(NamedTuple):
    """Un tenseur de la sortie : son nom, sa place, son type de calcul, ses entrées et ses paramètres."""

    name: str
    spec: Spec
    dtype: torch.dtype
    inputs: list[tuple[Parent, str]]
    parameters: dict[str, Any]


def merge(
    recipe: str | Path | Mapping[str, Any], out: str | Path, *, force: bool = False, progress: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Fusionne des modèles selon une recette au format de mergekit, en un dossier que transformers charge.

    Args:
        recipe: un fichier YAML, ou le dictionnaire qu’il contient.
        out: le dossier à créer.
        force: remplacer un modèle qui s’y trouverait déjà.
        progress: montrer une barre.
        seed: graine du hasard de DARE.

    Returns:
        Ce qui a été fait : `method`, `models`, `folder`, `n_layers`, `n_tensors`, `n_parameters`, `bytes`,
        `seconds`.

    Raises:
        LlamaError: recette ou modèles refusés, sortie déjà là, disque plein ; rien n’est alors écrit.
    """
    started, out = time.perf_counter(), Path(out).resolve()
    plan = read_recipe(recipe)
    tasks = _tasks(plan)
    config = _config(plan, tasks)
    specs = {task.name: task.spec for task in tasks}
    n_parameters = sum(spec.n_elements for spec in specs.values())
    n_bytes = sum(spec.n_bytes for spec in specs.values())
    with new_folder(out, force, [parent.folder for parent in plan.parents], n_bytes) as folder:
        with progress_bar(total=n_parameters, shown=progress, unit="poids", unit_scale=True) as bar:
            write_shards(folder, specs, _results(plan, tasks, seed, bar))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with (folder / "mergekit_config.yml").open("w", encoding="utf-8") as file:
            yaml.safe_dump(plan.text, file, allow_unicode=True, sort_keys=False)
        _copy(plan.parents[0].folder, ("generation_config.json",), folder)
        _copy((plan.tokenizer or plan.parents[0]).folder, TOKENIZER_FILES, folder)
    return {
        "method": plan.method, "models": [parent.name for parent in plan.parents], "folder": str(out),
        "n_layers": config["num_hidden_layers"], "n_tensors": len(tasks), "n_parameters": n_parameters,
        "bytes": n_bytes, "seconds": time.perf_counter() - started,
    }


def _tasks(plan: Recipe) -> list[Task]:
    """Les tenseurs de la sortie, les types les plus larges d’abord pour que les données restent alignées."""
    tasks: list[Task] = []
    for name in plan.parents[0].others:
        part = plan.slices[0 if "embed" in name else -1]
        tasks.append(_task(plan, part, [name] * len(part.sources), name, position=0.0))
    layer = 0
    for part in plan.slices:
        head = part.sources[0]
        depth = head.stop - head.start
        for k in range(depth):
            suffixes = head.parent.layers[head.start + k]
            for source in part.sources[1:]:
                other = source.parent.layers[source.start + k]
                check_same_tensors(head.parent, suffixes, source.parent, other)
            for suffix in suffixes:
                names = [source.parent.layers[source.start + k][suffix] for source in part.sources]
                position = k / (depth - 1) if depth > 1 else 1.0
                tasks.append(_task(plan, part, names, f"{head.parent.prefix}{layer}{suffix}", position))
            layer += 1
    return sorted(tasks, key=lambda task: -task.spec.dtype.itemsize)


def _task(plan: Recipe, part: Slice, names: Sequence[str], name: str, position: float) -> Task:
    inputs = [(source.parent, n) for source, n in zip(part.sources, names, strict=True)]
    specs = [parent.weights.specs[n] for parent, n in inputs]
    shapes = [spec.shape for spec in specs]
    if plan.tokens and name.endswith(VOCABULARY_TENSORS):
        shapes = [(len(plan.tokens), *shape[1:]) for shape in shapes]
    for (parent, _), shape in zip(inputs, shapes, strict=True):
        if shape != shapes[0]:
            raise LlamaError(
                f"Formes différentes : {name} est {shapes[0]} dans {inputs[0][0].name} et {shape} dans "
                f"{parent.name} ; on ne fusionne que des modèles de même forme."
            )
    dtype = plan.dtype or functools.reduce(torch.promote_types, (spec.dtype for spec in specs))
    settings = _settings(plan, part, names, name, position)
    return Task(name, Spec(plan.out_dtype or dtype, shapes[0]), dtype, inputs, settings)


def _settings(plan: Recipe, part: Slice, names: Sequence[str], name: str, position: float) -> dict[str, Any]:
    """Les paramètres d’un tenseur ; ceux d’un modèle suivent le nom qu’il y porte, les autres sa sortie."""
    shared = [part.parameters, plan.parameters]
    own = list(zip(part.sources, names, strict=True))[plan.method not in WITHOUT_BASE:]
    settings = {}
    for key, default in METHODS[plan.method].items():
        if key in PER_MODEL:
            values = [value_at(key, [source.parameters, *shared], n, position) for source, n in own]
        else:
            values = [value_at(key, shared, name, position)]
        values = [default if value is None else value for value in values]
        if REQUIRED in values:
            owner = f" à {own[values.index(REQUIRED)][0].parent.name}" if key in PER_MODEL else ""
            raise LlamaError(f"Il manque « {key} »{owner} pour {name} : {plan.method} le demande.")
        settings[key] = values if key in PER_MODEL else values[0]
    return settings


def _results(plan: Recipe, tasks: Sequence[Task], seed: int, bar: tqdm) -> Iterator[Tensor]:
    generator, threads = torch.Generator().manual_seed(seed), torch.get_num_threads()
    torch.set_num_threads(1)  # les blocs sont courts : se les partager coûterait plus que les calculer
    try:
        for task in tasks:
            yield _execute(plan, task, generator)
            bar.update(task.spec.n_elements)
    finally:
        torch.set_num_threads(threads)


def _execute(plan: Recipe, task: Task, generator: torch.Generator) -> Tensor:
    aligning = plan.tokens and task.name.endswith(VOCABULARY_TENSORS)
    tensors = [
        aligned(parent, name, plan.tokens, plan.parents, plan.base) if aligning else parent.weights[name]
        for parent, name in task.inputs
    ]
    # Un type plus étroit arrondit les entrées, comme mergekit ; un type plus large n’a rien à copier.
    wide = [torch.promote_types(x.dtype, task.dtype) == task.dtype for x in tensors]
    tensors = [x if ok else x.to(task.dtype) for x, ok in zip(tensors, wide, strict=True)]
    p, dtype = task.parameters, task.dtype
    if plan.method == "passthrough":
        result = merging.passthrough(tensors[0], p["scale"][0], dtype=dtype)
    elif plan.method == "linear":
        result = merging.linear(tensors, p["weight"], normalize=p["normalize"], dtype=dtype)
    elif plan.method == "slerp":
        result = merging.slerp(*tensors, p["t"], dtype=dtype)
    elif plan.method == "model_stock":
        result = merging.model_stock(tensors[0], tensors[1:], filter_wise=p["filter_wise"], dtype=dtype)
    else:
        arguments = [tensors[0], tensors[1:], p["weight"], *([p["density"]] if "density" in p else [])]
        options: dict[str, Any] = {"scaling": p["lambda"], "normalize": p["normalize"], "dtype": dtype}
        if plan.method == "ties":
            options["rescale"] = p["rescale"]
        elif plan.method != "task_arithmetic":
            options |= {"rescale": "realised" if p["rescale"] else None, "generator": generator}
        result = getattr(merging, plan.method)(*arguments, **options)
    return result.to(task.spec.dtype)


def _config(plan: Recipe, tasks: Sequence[Task]) -> dict[str, Any]:
    """Le config.json de la fusion : celui du premier parent, aux couches, au vocabulaire et au type près."""
    config = {key: value for key, value in plan.parents[0].config.items() if key != "_name_or_path"}
    heads = [part.sources[0] for part in plan.slices]
    origins = [(head.parent.config, i) for head in heads for i in range(head.start, head.stop)]
    config["num_hidden_layers"] = len(origins)
    for key in PER_LAYER:
        if config.get(key):
            config[key] = [origin[key][i] for origin, i in origins]
    if config.get("moe_layers"):
        config["moe_layers"] = [k for k, (origin, i) in enumerate(origins) if i in origin["moe_layers"]]
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(tasks[0].spec.dtype).removeprefix("torch.")
    if plan.tokens:
        config["vocab_size"] = len(plan.tokens)
    return config


def _copy(source: Path, names: Sequence[str], folder: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def run_mergekit(
    recipe: str | Path | Mapping[str, Any], out: str | Path, *, force: bool = False, progress: bool = True,
    seed: int = 0,
) -> Path:
    """Exécute la recette par le vrai mergekit, dans un autre processus, et rend le dossier écrit.

    Accepte tout ce que mergekit accepte, y compris ce que `merge` refuse. Les chemins sont rendus absolus et
    la fiche du modèle n’est pas écrite : hors ligne, mergekit irait la demander au Hub et échouerait.

    Raises:
        LlamaError: recette illisible, mergekit absent ou en échec (avec sa dernière ligne), sortie déjà là.
    """
    if importlib.util.find_spec("mergekit") is None:
        raise LlamaError("mergekit n’est pas installé : pip install mergekit.")
    folders: list[Path] = []
    text, out = _absolute(load_yaml(recipe), folders), Path(out).resolve()
    pickled = next((folder for folder in folders if not any(folder.glob("*.safetensors"))), None)
    if pickled:
        raise LlamaError(f"Pas de poids safetensors dans {pickled} : les formats à pickle ne sont pas lus.")
    with new_folder(out, force, folders, 0) as folder, tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "recipe.yml"
        path.write_text(yaml.safe_dump(text, allow_unicode=True, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(path), str(folder)]
        command += ["--no-write-model-card", "--random-seed", str(seed)]
        tail = b""
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                while chunk := os.read(process.stdout.fileno(), 4096):
                    tail = (tail + chunk)[-4000:]
                    if progress:
                        sys.stderr.write(chunk.decode("utf-8", "replace"))
            except BaseException:
                process.kill()
                raise
        if process.returncode or not (folder / "config.json").is_file():
            lines = tail.decode("utf-8", "replace").splitlines()
            last = next((line.strip() for line in reversed(lines) if line.strip()), "sans message")
            raise LlamaError(f"mergekit a échoué : {last}")
    return out


def _absolute(value: Any, folders: list[Path]) -> Any:
    """La recette, où tout dossier nommé par `model`, `base_model`… est écrit en chemin absolu, et noté."""
    if isinstance(value, list):
        return [_absolute(item, folders) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: _absolute(item, folders) for key, item in value.items()}
    for key in {"model", "base_model", "tokenizer_source", "source", "path"} & result.keys():
        if isinstance(result[key], str) and Path(result[key]).is_dir():
            folders.append(Path(result[key]).resolve())
            result[key] = str(folders[-1])
    return result
