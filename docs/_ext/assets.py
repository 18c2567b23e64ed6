"""Ce que les pages chargent et que le dépôt ne contient pas : MathJax et les polices, en versions exactes.

Les paquets npm sont récupérés à la première construction, vérifiés, et seuls les fichiers utiles en sont
gardés, dans le cache du cours. Les pages n’appellent ainsi aucun tiers, et le site se construit ensuite hors
ligne.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError
from tqdm import tqdm

from llama import archive
from llama.config import LlamaError
from llama.sources import cache_dir


@dataclass(frozen=True)
class Package:
    """Un paquet npm, et les fichiers qu’on en garde : {motif dans l’archive: dossier sous `_static`}."""

    name: str
    version: str
    sha256: str
    size: int
    files: dict[str, str]


PACKAGES = (
    Package(
        "mathjax", "3.2.2", "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09", 6_132_118,
        {
            "package/es5/tex-mml-chtml.js": "mathjax",
            "package/es5/input/tex/extensions/*.js": "mathjax/input/tex/extensions",
            "package/es5/output/chtml/fonts/woff-v2/*.woff": "mathjax/output/chtml/fonts/woff-v2",
        },
    ),
    Package(
        "@fontsource-variable/source-sans-3", "5.3.0",
        "115c2d5a38a05d52c77ba02e4d939644bae30585a30a2e4657a3be2c99d5c7dc", 313_891,
        {"package/files/source-sans-3-latin-wght-*.woff2": "polices"},
    ),
    Package(
        "@fontsource-variable/source-serif-4", "5.3.1",
        "8c452853c74be1e43e9fbfe76321c26f4678a2d431e93209ff1d9faec03fd96f", 2_182_467,
        {"package/files/source-serif-4-latin-wght-normal.woff2": "polices"},
    ),
    Package(
        "@fontsource-variable/source-code-pro", "5.3.0",
        "ad0ce660b35cd54214f105c7b85db16238e360afa800ca7c4aeae439c53cc517", 180_984,
        {"package/files/source-code-pro-latin-wght-*.woff2": "polices"},
    ),
)
UNPACKED_LIMIT = 20_000_000  # octets, par paquet : bien au-dessus de ce qu’on garde


def fetch() -> Path:
    """Rend le dossier des fichiers, en les récupérant d’abord si le cache ne les a pas.

    Raises:
        LlamaError: npm, le réseau ou la place manquent, ou une archive n’est pas celle qui est attendue.
    """
    folder = cache_dir() / "site" / hashlib.sha256(repr(PACKAGES).encode()).hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                content = Path(scratch) / "content"
                for package in PACKAGES:
                    _add(package, Path(scratch), content)
                content.rename(folder)
    return folder


def _add(package: Package, scratch: Path, content: Path) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        with tqdm(total=package.size, desc=package.name, unit="o", unit_scale=True) as bar:
            received = archive.download("npm", package.name, package.version, package.size, Path(own), bar)
        if archive.digest(received) != package.sha256:
            raise LlamaError(f"{package.name} : l’archive reçue n’est pas celle du cours ; "
                             "recommencez, ou changez de miroir.")
        for pattern, target in package.files.items():
            archive.unpack(received, pattern, UNPACKED_LIMIT, content / target)


def add_static_path(app: Sphinx, config: Config) -> None:
    """Joint ces fichiers à ceux que Sphinx copie sous `_static`."""
    try:
        config.html_static_path.append(str(fetch()))
    except LlamaError as error:
        raise ExtensionError(str(error)) from error


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", add_static_path)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
