"""`cli` : en français, une ligne par erreur, les codes de sortie promis."""

import enum
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import llama
from llama import cli, sources
from llama.config import LlamaError

ENGLISH = re.compile(
    r"Usage: |Show this|Options:|Arguments:|Commands:|COMMAND |\[ARGS\]|Missing|No such|Got |Try |"
    r"Error|\[required|; required|\[default|Invalid|Aborted|Did you|Possible|Input|"
    r"<(int|float|str|path|list)[ >]"
)


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), prog_name="llama")


def assert_french(text: str) -> None:
    assert not ENGLISH.search(text), text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def fetched(monkeypatch):
    """Remplace `sources.fetch` ; rend les appels reçus."""
    calls = []

    def fetch(name, **options):
        folder = sources.folder_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        calls.append((name, options))
        return folder

    monkeypatch.setattr(sources, "fetch", fetch)
    return calls


def test_every_help_is_french_and_shows_examples():
    commands = typer.main.get_command(cli.app).commands
    assert "fetch" in commands
    for arguments in ((), ("--help",), *((name, "--help") for name in commands)):
        result = run(*arguments)
        assert result.exit_code == 0
        assert_french(result.output)
    for name in commands:
        assert f"\n    llama {name} " in run(name, "--help").output


def test_version():
    assert run("--version").output == f"llama {llama.__version__}\n"


def test_list(cache, fetched):
    (cache / "sources/smollm2-0.1.2").mkdir(parents=True)
    result = run("fetch", "--list")
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert result.exit_code == 0 and set(lines) == {"nom", *sources.CATALOGUE} and not fetched
    assert " oui " in lines["smollm2"] and " non " in lines["minilm"] and "92,9\u00a0Mo" in lines["smollm2"]


def test_list_as_json(fetched):
    rows = json.loads(run("fetch", "--list", "--json").stdout)
    assert [row["name"] for row in rows] == list(sources.CATALOGUE)
    assert rows[0]["sha256"] == sources.CATALOGUE["contributions"].sha256 and rows[0]["cached"] is False


def test_fetch_several(fetched):
    result = run("fetch", "smollm2", "minilm", "--verify", "--force")
    assert result.exit_code == 0 and len(result.output.splitlines()) == 2
    assert fetched == [(name, {"verify": True, "force": True}) for name in ("smollm2", "minilm")]


def test_fetch_as_json(fetched):
    (row,) = json.loads(run("fetch", "smollm2", "--json").stdout)
    assert row["name"] == "smollm2" and row["cached"] is True and row["seconds"] >= 0
    assert row["folder"] == str(sources.folder_of("smollm2"))


def test_unknown_name_stops_before_any_download(fetched):
    result = run("fetch", "smollm2", "inconnue")
    assert result.exit_code == 2 and not fetched and result.stderr.count("\n") == 1
    assert "« inconnue »".replace(" ", "\u00a0") in result.stderr and "fiches-travail" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("fetch",), "Quelle source"),
        (("fetsh",), "commande inconnue\u00a0: 'fetsh'. Vouliez-vous dire 'fetch'"),
        (("fetch", "--forcer"), "option inconnue\u00a0: --forcer (options proches\u00a0: --force)"),
        (("--bidon",), "option inconnue\u00a0: --bidon"),
        (("fetch", "--list=3"), "l’option '--list' ne prend pas de valeur"),
    ],
)
def test_usage_errors_are_one_french_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert_french(result.stderr)


def test_other_commands_speak_french_too(monkeypatch):
    """Une commande comme en ajouteront les leçons, avec tout ce que typer sait refuser."""

    class Precision(enum.StrEnum):
        FLOAT32 = "float32"
        BF16 = "bf16"

    app = typer.Typer(cls=cli._Group, add_completion=False, rich_markup_mode=None)
    app.callback()(lambda: None)

    @app.command(cls=cli._Command)
    def train(
        text: Annotated[str, typer.Argument(metavar="TEXTE")],
        out: Annotated[Path, typer.Option()],
        steps: Annotated[int, typer.Option(min=1)] = 100,
        rate: Annotated[float, typer.Option(max=1.0)] = 0.1,
        precision: Annotated[Precision, typer.Option()] = Precision.FLOAT32,
    ) -> None:
        """Entraîne."""

    runner = CliRunner()
    help_text = runner.invoke(app, ["train", "--help"]).output
    assert "<entier>" in help_text and "[par défaut\u00a0: 100" in help_text and "[obligatoire]" in help_text
    assert_french(help_text)
    given = ["train", "texte", "--out", "dossier"]
    assert runner.invoke(app, given).exit_code == 0
    for arguments, message in [
        (["train"], "il manque l’argument 'TEXTE'."),
        (["train", "texte"], "il manque l’option '--out'."),
        ([*given, "--steps"], "l’option '--steps' demande une valeur."),
        ([*given, "--steps", "dix"], "valeur refusée pour '--steps'\u00a0: un entier est attendu."),
        ([*given, "--steps", "0"], "il faut au moins 1."),
        ([*given, "--rate", "beaucoup"], "un nombre est attendu."),
        ([*given, "--rate", "2"], "il faut au plus 1."),
        ([*given, "--precision", "bf8"], "'bf8' n’est pas parmi 'float32', 'bf16'."),
        ([*given, "autre"], "argument en trop\u00a0: autre."),
    ]:
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
        assert_french(result.stderr)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (LlamaError("Une ligne claire."), 2, "Une ligne claire.\n"),
        (KeyboardInterrupt(), 130, "Interrompu.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disque plein"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "modele/"), 2, "modele/\u00a0: introuvable."),
    ],
)
def test_errors_of_a_command(monkeypatch, error, code, message):
    def fetch(name, **options):
        raise error

    monkeypatch.setattr(sources, "fetch", fetch)
    result = run("fetch", "smollm2")
    assert result.exit_code == code and message in result.stderr and result.stdout == ""
    assert result.stderr.count("\n") == 1


def test_a_defect_keeps_its_trace(monkeypatch):
    monkeypatch.setattr(sources, "fetch", lambda name, **options: 1 / 0)
    assert isinstance(run("fetch", "smollm2").exception, ZeroDivisionError)


def test_as_a_process(cache):
    def llama_process(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "llama", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(llama.__file__).parents[1])},
        )

    done = llama_process("fetch", "inconnue")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("Source inconnue")
    assert done.stderr.count("\n") == 1
    assert llama_process("fetch", "--list").stdout == run("fetch", "--list").stdout
