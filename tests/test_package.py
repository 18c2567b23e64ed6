"""`llama` : un import léger, et des noms publics qui arrivent à leur premier usage."""

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import llama


@pytest.mark.parametrize("name", sorted(llama._HOMES))
def test_public_name_comes_from_its_module(name):
    module = importlib.import_module(f"llama.{llama._HOMES[name]}")
    assert getattr(llama, name) is getattr(module, name) and name in dir(llama) and name in llama.__all__


def test_typing_imports_match_the_runtime_names():
    source = Path(llama.__file__).read_text(encoding="utf-8")
    declared = {line.split(" as ")[1] for line in source.splitlines() if line.startswith("    from llama.")}
    assert declared == set(llama._HOMES)


def test_version_comes_from_the_installation(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2.3 de {name}")
    assert llama._version() == "1.2.3 de llama-library"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert llama._version() == "0+sources"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Lama"):
        _ = llama.Lama


def test_import_is_light():
    program = (
        "import sys, llama, llama.cli, llama.sources\n"
        "print(*{'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    paths = {"PYTHONPATH": str(Path(llama.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=paths, check=True
    )
    assert done.stdout.strip() == ""
