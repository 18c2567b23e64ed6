"""Trouve un Chromium pour les essais de pages ; sous Linux x86-64, le pose dans l’environnement virtuel.

Le paquet npm `@sparticuz/chromium` contient le navigateur, les bibliothèques et une police qui manqueraient à
un système nu : rien d’autre à télécharger, aucun droit d’administration. Ailleurs, Chrome ou « playwright
install chromium » conviennent.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
FOLDER = Path(sys.prefix) / "chromium"
SYSTEM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MACOS_CHROME = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
FONTS_CONF = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>/usr/share/fonts</dir>
  <dir prefix="relative">fonts</dir>
  <cachedir>{cache}</cachedir>
</fontconfig>
"""


@dataclass(frozen=True)
class Chromium:
    """Un exécutable, et les variables d’environnement qu’il lui faut en plus."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)


def find() -> Chromium | None:
    """Cherche, dans l’ordre : celui de l’environnement virtuel, ceux du système, celui de Playwright."""
    if FOLDER.exists():
        env = {"LD_LIBRARY_PATH": str(FOLDER / "lib"), "FONTCONFIG_PATH": str(FOLDER)}
        return Chromium(FOLDER / "chromium", env)
    for name in SYSTEM_NAMES:
        if found := shutil.which(name):
            return Chromium(Path(found))
    for path in (MACOS_CHROME, _playwright_chromium()):
        if path.exists():
            return Chromium(path)
    return None


def install() -> None:
    """Pose le navigateur du paquet npm dans `FOLDER`, d’un seul coup : jamais à moitié."""
    with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
        archive = _download(Path(scratch))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        archive.unlink()
        packed, browser = Path(scratch) / "package" / "bin", Path(scratch) / "browser"
        browser.mkdir()
        for source in packed.glob("*.br"):
            _decompress(source, source.with_suffix(""))
        for name in ("al2023.tar", "fonts.tar"):
            with tarfile.open(packed / name) as tar:
                tar.extractall(browser, filter="data")
        (browser / "fonts.conf").write_text(FONTS_CONF.format(cache=FOLDER / "cache"))
        (packed / "chromium").rename(browser / "chromium")
        (browser / "chromium").chmod(0o755)
        browser.rename(FOLDER)


def _playwright_chromium() -> Path:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return Path(playwright.chromium.executable_path)


def _download(folder: Path) -> Path:
    """Demande le paquet au client npm de l’environnement ; vérifie son empreinte."""
    npm = Path(sys.executable).with_name("npm")
    command = [npm, "pack", PACKAGE, "--ignore-scripts", "--loglevel=error", f"--pack-destination={folder}"]
    process = subprocess.run(command, capture_output=True, text=True)
    archive = next(folder.glob("*.tgz"), None)
    if process.returncode or archive is None:
        reason = (process.stderr.strip().splitlines() or ["npm n’a rien rendu"])[0]
        sys.exit(f"Le navigateur des essais n’arrive pas : {reason} ; vérifiez le réseau, puis relancez.")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"L’empreinte de {PACKAGE} n’est pas celle attendue : rien n’est installé.")
    return archive


def _decompress(source: Path, target: Path) -> None:
    """Décompresse du brotli, que la bibliothèque standard de Python ne lit pas, avec Node."""
    script = "const [, i, o] = process.argv, fs = require('fs'); " \
        "fs.writeFileSync(o, require('zlib').brotliDecompressSync(fs.readFileSync(i)))"
    subprocess.run([Path(sys.executable).with_name("node"), "-e", script, source, target], check=True)


def main() -> None:
    bundled = (sys.platform, platform.machine()) == ("linux", "x86_64")
    if bundled and not FOLDER.exists():
        print("Installation d’un Chromium pour les essais (70 Mo)…", flush=True)
        install()
    elif find() is None:
        print("Aucun Chromium ici : les essais de pages seront passés. Pour les avoir, installez Chrome.")


if __name__ == "__main__":
    main()
