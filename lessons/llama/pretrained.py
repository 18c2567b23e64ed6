"""Charger et enregistrer des poids : dossiers de transformers, fichiers GGUF, noms de `sources`, noms du Hub.

Tout se ramène à un dossier de transformers (`find`), que `load` lit et que `save` écrit. Un GGUF, dont les poids sont
quantifiés, y est converti une fois, dans le cache. Les poids ne viennent que de safetensors : un fichier pickle
(`.bin`, `.pth`) peut exécuter n’importe quel code en s’ouvrant.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from . import sources
from .chat import CHAT_TEMPLATE, TransformersTokenizer
from .config import LlamaError
from .model import LlamaModel
from .progress import progress_bar
from .shards import MAX_SHARD_BYTES, Shards, Spec, new_folder, write_shards
from .tokenization import Tokenizer
from .transformers_format import IGNORED, Published, from_config, published_tensors, to_config
from .vocabulary import read_json, write_json

COURSE_MODELS = Path(__file__).parent / "models"  # livrés avec la bibliothèque
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
HUB_IGNORED = ["original/*", "consolidated*"]  # les mêmes poids, sous d’autres noms
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
PICKLE_REFUSED = (
    "un fichier pickle peut exécuter n’importe quel code en s’ouvrant, il n’est jamais lu ; convertissez-le en "
    "safetensors, ou prenez une version du modèle qui en a."
)


def find(source: str | Path) -> Path:
    """Le dossier de transformers que désigne `source`.

    Args:
        source: un dossier ; un fichier GGUF, converti une fois dans le cache ; un nom de `sources` (`"smollm2"`) ;
            un nom du Hub (`"meta-llama/Llama-2-7b-hf"`, `"nom@révision"`).

    Raises:
        LlamaError: rien de tel, réseau absent, modèle protégé ; le message dit comment en sortir.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in PICKLES:
            raise LlamaError(f"« {path} » est refusé : {PICKLE_REFUSED}")
        if path.suffix != ".gguf":
            raise LlamaError(f"« {path} » n’est pas un modèle : donnez son dossier, ou un fichier .gguf.")
        return _converted(path)
    if re.fullmatch(r"\w+", name) and (COURSE_MODELS / name).is_dir():
        return COURSE_MODELS / name
    if name in sources.CATALOGUE:
        files = sorted(sources.fetch(name).rglob("*.gguf"))
        if not files:
            raise LlamaError(f"La source « {name} » n’est pas un modèle : {sources.CATALOGUE[name].description}.")
        return _converted(files[0])
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return _downloaded(name)
    raise LlamaError(
        f"Modèle introuvable : « {name} » n’est ni un dossier, ni un fichier GGUF, ni une source "
        "(« llama fetch --list » les donne), ni le modèle du cours (petit), ni un nom du Hub (« auteur/modèle »)."
    )


def load(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LlamaModel:
    """Charge un modèle.

    Args:
        source: voir `find`.
        dtype: type des poids en mémoire.
        device: où les placer.

    Raises:
        LlamaError: modèle introuvable, d’une autre architecture, incomplet, tronqué, ou en pickle.
    """
    folder = find(source)
    config = to_config(_settings(folder))
    stored = Shards(folder)
    with torch.device("meta"):  # les formes, sans les poids
        model = LlamaModel(config)
    tensors = published_tensors(model.state_dict(), config)
    _check(folder, tensors, stored.specs, "lm_head.weight" if config.tie_word_embeddings else None)
    weights = {
        name: weight.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        for published, tensor in tensors.items() for name, weight in tensor.split(stored[published])
    }
    model.load_state_dict(weights, assign=True)
    model.name_or_path = str(source)
    return model


def load_tokenizer(source: str | Path) -> Any:
    """Le tokenizer qui voyage avec un modèle : le nôtre, ou celui de transformers sous la même interface.

    Args:
        source: voir `find`.

    Raises:
        LlamaError: modèle introuvable, ou dossier sans tokenizer.
    """
    folder = find(source)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise LlamaError(f"« {folder} » n’a pas de tokenizer : copiez-y le tokenizer.json du modèle.")
    try:
        tokenizer = Tokenizer.load(folder)
    except LlamaError:  # une sorte que nous ne savons pas rendre à l’identique
        tokenizer = None
    if tokenizer is not None and tokenizer.vocabulary.chat_template in (None, CHAT_TEMPLATE):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return TransformersTokenizer(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # chaque sorte de fichier abîmé a la sienne
        raise LlamaError(f"Le tokenizer de « {folder} » est illisible ({_first_line(error)}).") from error


def save(
    model: LlamaModel, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None,
    force: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Écrit un dossier que `AutoModelForCausalLM` charge, avec les mêmes logits ; tout, ou rien.

    Args:
        model: le modèle, sans adaptateur.
        folder: le dossier à créer.
        tokenizer: à enregistrer avec lui, s’il est donné.
        dtype: type des poids écrits ; par défaut celui du modèle.
        force: remplacer le modèle qui s’y trouve.
        max_shard_bytes: au-delà, les poids sont répartis en plusieurs fichiers.

    Raises:
        LlamaError: dossier occupé, disque plein, ou modèle que transformers ne sait pas représenter.
    """
    weights, config = model.state_dict(), model.config
    with torch.device("meta"):
        bare = LlamaModel(config).state_dict()
    if weights.keys() != bare.keys():
        raise LlamaError(
            "Ce modèle porte un adaptateur, ou a été préparé à décoder : repliez l’un (lora.fold) et ôtez-le "
            "(lora.remove_lora), ou enregistrez l’original de l’autre."
        )
    dtype = dtype or next(iter(weights.values())).dtype
    settings = from_config(config, dtype)
    if tokenizer is not None:
        settings |= {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
    tensors = published_tensors(weights, config)
    specs = {name: Spec(dtype, tensor.shape) for name, tensor in tensors.items()}
    joined = (tensor.join(weights).detach().to("cpu", dtype) for tensor in tensors.values())
    with new_folder(Path(folder).expanduser().absolute(), force, [], sum(s.n_bytes for s in specs.values())) as partial:
        write_shards(partial, specs, joined, max_shard_bytes)
        write_json(partial / "config.json", settings)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Écrit un tokenizer, le nôtre ou celui de transformers, dans le dossier de son modèle."""
    if hasattr(tokenizer, "vocabulary"):
        tokenizer.save(folder, force=True)
    else:
        tokenizer.to_transformers().save_pretrained(folder)


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise LlamaError(f"« {folder} » n’est pas un dossier de modèle : il n’a pas de config.json.")
    if not any(folder.glob("*.safetensors*")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise LlamaError(f"« {folder} » n’a de poids qu’en pickle ({pickles[0]}) : {PICKLE_REFUSED}")
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise LlamaError(f"« {folder / 'config.json'} » n’est pas un objet JSON : retrouvez l’original.")
    return settings


def _check(
    folder: Path, expected: Mapping[str, Published], found: Mapping[str, Spec], superfluous: str | None
) -> None:
    """Refuse des poids qui ne sont pas ceux que config.json décrit."""
    advice = "téléchargez le modèle à nouveau."
    missing = [name for name in expected if name not in found]
    if missing:
        others = f" et {len(missing) - 1} autres" if missing[1:] else ""
        raise LlamaError(f"Il manque à « {folder} » le tenseur {missing[0]}{others} : {advice}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise LlamaError(
                f"« {folder} » : {name} est de forme {found[name].shape}, et config.json veut {tensor.shape} : {advice}"
            )
    unknown = [name for name in found if name not in expected and name != superfluous and not IGNORED.match(name)]
    if unknown:
        raise LlamaError(f"« {folder} » a un tenseur que config.json n’annonce pas, {unknown[0]} : {advice}")


def _downloaded(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.partition("@")
    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(
            repository, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED
        ))
    except errors.GatedRepoError as error:
        way_out = f"est protégé : acceptez ses conditions sur {page}, puis identifiez-vous par « hf auth login »."
        raise LlamaError(f"« {name} » {way_out}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        way_out = f"n’est pas un dossier d’ici, et {page} n’existe pas ou vous est fermé : vérifiez le nom."
        raise LlamaError(f"« {name} » {way_out}") from error
    except Exception as error:  # réseau : huggingface_hub et son client ont chacun leurs exceptions
        way_out = "n’est pas un dossier d’ici, et le Hub est injoignable : vérifiez le réseau, ou donnez un dossier."
        raise LlamaError(f"« {name} » {way_out}") from error


def _converted(gguf: Path) -> Path:
    """Le dossier de transformers d’un GGUF, poids déquantifiés en float32 : dans le cache, ou converti maintenant."""
    status = gguf.stat()
    version = f"{gguf.resolve()} {status.st_size} {status.st_mtime_ns}"
    name = f"{gguf.stem}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    folder = sources.cache_dir() / "convertis" / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = f"On ne peut pas écrire dans {folder.parent} ({error.strerror})"
            raise LlamaError(f"{cause} : choisissez un autre dossier par la variable LLAMA_CACHE.") from error
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # un autre processus a pu le convertir pendant l’attente
                _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    place, name = gguf.parent, gguf.name
    logging.disable_progress_bar()
    try:
        with progress_bar(total=3, desc=f"Conversion de {name} (une fois pour toutes)", unit="étape") as bar:
            settings = GgufConfig(gguf_file=name, dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=name, dtype=torch.float32, quantization_config=settings
            )
            model.config.quantization_config = None
            to_config(model.config.to_dict())  # refuser avant d’écrire
            bar.update()
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
            bar.update()
            with new_folder(folder, False, [], 4 * model.num_parameters()) as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            bar.update()
    except LlamaError:
        raise
    except Exception as error:  # transformers et gguf n’ont pas d’exception commune pour un fichier abîmé
        raise LlamaError(
            f"« {gguf} » n’est pas un GGUF que transformers sait convertir ({_first_line(error)})."
        ) from error
    finally:
        logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
