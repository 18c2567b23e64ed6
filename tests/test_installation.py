"""L’installation que lancent « make html » et « make test » : chaque empêchement tient en une ligne.

Un faux Python joue la création de l’environnement et pip ; seul l’essai sans réseau appelle les vrais.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml", "tools/install.sh")

PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  *"import pip"*) ;;
  *version_info*) echo "${STUB_VERSION:-3.11}" ;;
  *ensurepip*) [[ -z ${STUB_NO_VENV:-} ]] ;;
  "-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  "-m pip install"*) [[ -z ${STUB_PIP:-} ]] || { echo "$STUB_PIP"; exit 1; } ;;
esac
"""


class Clone:
    """Une copie du dépôt réduite à ce que l’installation lit, et un faux Python qui note ses appels."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        for name in FILES:
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.python = self.script("python", PYTHON)
        self.set_free_space(100_000)

    def script(self, name: str, text: str) -> Path:
        """Écrit une commande dans `bin/`, que `make` voit avant celles du système."""
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def set_free_space(self, megabytes: int) -> None:
        self.script("df", f"#!/bin/sh\necho Filesystem\necho /dev/x 9 9 {megabytes * 1024} 9 /\n")

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Lance make, sans rien hériter du make qui lance ces essais."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        env |= {"PATH": f"{self.folder / 'bin'}:{env['PATH']}", "CALLS": str(self.calls_file), **variables}
        arguments = (f"PYTHON={self.python}", *arguments)
        return subprocess.run(["make", *arguments], cwd=self.folder, env=env, capture_output=True, text=True)

    def calls(self) -> str:
        return self.calls_file.read_text() if self.calls_file.exists() else ""


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """Vérifie que la commande échoue en une seule ligne, et la rend ; make y ajoute la sienne."""
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("version", ["2.7", "3.8", "3.10"])
@pytest.mark.parametrize("target", ["html", "test"])
def test_old_python(clone: Clone, version: str, target: str) -> None:
    assert only_line(clone.make(target, STUB_VERSION=version)).startswith(f"Python {version} est trop ancien")
    assert not (clone.folder / ".venv").exists()


@pytest.mark.parametrize("version", ["3.11", "3.13", "4.0"])
def test_recent_python(clone: Clone, version: str) -> None:
    assert clone.make(".venv/.complet", STUB_VERSION=version).returncode == 0


def test_no_python(clone: Clone) -> None:
    assert only_line(clone.make("html", "PYTHON=/nulle/part/python3")).startswith("Python est introuvable")


def test_python_without_venv(clone: Clone) -> None:
    assert "n’a pas le module venv" in only_line(clone.make("html", STUB_NO_VENV="1"))


def test_disk_too_small(clone: Clone) -> None:
    clone.set_free_space(200)
    line = only_line(clone.make("html"))
    assert line.startswith("Place insuffisante sur le disque") and "200\u00a0Mo" in line
    assert "-m pip install" not in clone.calls()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disque est plein"),
        ("WARNING: Retrying (Retry(total=4)) after connection broken", "réseau ne répond pas"),
        ("ERROR: Ignored the following\nsuite", "a échoué\u00a0: ERROR: Ignored the following"),
    ],
)
def test_pip_failure_is_translated_and_resumed(clone: Clone, output: str, expected: str) -> None:
    assert expected in only_line(clone.make("html", STUB_PIP=output))
    assert not (clone.folder / ".venv" / ".complet").exists()
    assert clone.make(".venv/.complet").returncode == 0
    assert (clone.folder / ".venv" / ".complet").exists()


def test_interrupted_installation_starts_afresh(clone: Clone) -> None:
    """Des paquets à moitié écrits passeraient pour installés : l’environnement est refait."""
    assert clone.make(".venv/.complet").returncode == 0
    leftover = clone.folder / ".venv" / "a_moitie_ecrit"
    for path in (leftover, clone.folder / ".venv" / ".inacheve"):
        path.touch()
    (clone.folder / ".venv" / ".complet").unlink()
    assert clone.make(".venv/.complet").returncode == 0
    assert not leftover.exists() and not (clone.folder / ".venv" / ".inacheve").exists()


def test_unusable_environment_is_made_again(clone: Clone) -> None:
    """Un environnement d’un vieux Python, ou sans pip, ne sert à rien."""
    old = clone.folder / ".venv" / "bin" / "python"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert clone.make(".venv/.complet").returncode == 0
    assert "-m venv .venv" in clone.calls()


def test_second_run_installs_nothing(clone: Clone) -> None:
    assert clone.make(".venv/.complet").returncode == 0
    before = clone.calls()
    for target in ("html", "test"):
        assert "install.sh" not in clone.make("-n", target).stdout
    assert clone.make(".venv/.complet").returncode == 0
    assert clone.calls() == before


@pytest.mark.parametrize("changed", ["requirements.txt", "constraints.txt", "pyproject.toml"])
def test_changed_pins_install_again(clone: Clone, changed: str) -> None:
    assert clone.make(".venv/.complet").returncode == 0
    stamp = (clone.folder / ".venv" / ".complet").stat().st_mtime
    os.utime(clone.folder / changed, (stamp + 10, stamp + 10))
    assert "install.sh" in clone.make("-n", "html").stdout


def test_no_network(clone: Clone) -> None:
    """Le vrai Python et le vrai pip, devant un registre qui ne répond pas."""
    result = clone.make(
        "html", f"PYTHON={sys.executable}",
        PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="",
    )  # fmt: skip
    assert only_line(result).startswith("Le réseau ne répond pas")
    assert not (clone.folder / ".venv" / ".complet").exists()


def test_requirements_are_pinned_as_constrained() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        pairs = [line.partition("==")[::2] for line in lines if line]
        return {package.lower().replace("_", "-"): version for package, version in pairs}

    wanted, constraints = pins("requirements.txt"), pins("constraints.txt")
    assert all(wanted.values()) and all(constraints.values())
    assert {package: constraints.get(package) for package in wanted} == wanted


def test_one_version_everywhere() -> None:
    import llama

    installed = version("llama-library")
    assert llama.__version__ == installed
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == installed
    assert f"\n{installed} (" in (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8")
