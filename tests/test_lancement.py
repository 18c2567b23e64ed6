"""Les fichiers de lancement de la leçon 10 : chacun se lit par l’outil qui le lira, et nomme de vraies options."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llama.cli import app

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "lessons" / "lancement").iterdir())


@pytest.mark.parametrize("path", [f for f in FILES if f.suffix in (".sh", ".sbatch")], ids=lambda path: path.name)
def test_script_is_sound_and_executable(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    assert path.stat().st_mode & 0o111
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [f for f in FILES if f.name.startswith("accelerate")], ids=lambda path: path.name)
def test_accelerate_reads_its_configuration(path):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    read = config_args.load_config_from_file(str(path))
    assert (read.num_machines, read.num_processes) == (2, 16)


@pytest.mark.parametrize("path", [f for f in FILES if f.suffix == ".py"], ids=lambda path: path.name)
def test_program_compiles(path):
    ast.parse(path.read_text(encoding="utf-8"))


def test_ray_installs_from_the_address_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = yaml.safe_load((ROOT / "lessons" / "lancement" / "ray_environnement.yaml").read_text(encoding="utf-8"))
    assert packages["pip"] == [f"{project['name']} @ git+{project['urls']['Repository']}"]


def test_options_given_to_train_exist():
    scripts = [f for f in FILES if f.suffix in (".sh", ".sbatch") and "vllm" not in f.name]
    text = "".join(f.read_text(encoding="utf-8") for f in scripts)
    used = set(re.findall(r"--(?:data|sharded|out|steps|preset|checkpoint-every)\b", text))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output)
    assert used and all(option in shown for option in used)
