"""`console` : en français, une ligne par erreur, les codes de sortie promis."""

import enum
import errno
import json
import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import llama
from llama import console
from llama.config import LlamaError

ENGLISH = re.compile(
    r"Usage: |Show this|Options:|Arguments:|Commands:|COMMAND |\[ARGS\]|Missing|No such|Got |Try |"
    r"Error|\[required|; required|\[default|Invalid|Aborted|Did you|Possible|Input|x>=|"
    r"<(int|float|str|path|list)[ >]"
)


def assert_french(text: str) -> None:
    assert not ENGLISH.search(text), text


def application(action):
    """Une application d’une seule commande, qui appelle `action`."""
    app = typer.Typer(cls=console._Group, add_completion=False, rich_markup_mode=None)
    app.callback()(lambda: None)

    @app.command(cls=console._Command)
    def work(batch_size: int = 1, out: Path = Path("x")) -> None:
        """Travaille."""
        action()

    return app


def run(action, *arguments: str):
    return CliRunner().invoke(application(action), ["work", *arguments])


def fails_with(error):
    def action():
        raise error

    return action


def test_version_and_help_without_a_command():
    runner = CliRunner()
    assert runner.invoke(console.app, ["--version"]).output == f"llama {llama.__version__}\n"
    assert runner.invoke(console.app, []).output == runner.invoke(console.app, ["--help"]).output


def test_everything_typer_refuses_is_said_in_french():
    """Une commande comme en ajouteront les leçons, avec tout ce que typer sait refuser."""

    class Precision(enum.StrEnum):
        FLOAT32 = "float32"
        BF16 = "bf16"

    app = typer.Typer(cls=console._Group, add_completion=False, rich_markup_mode=None)
    app.callback()(lambda: None)

    @app.command(cls=console._Command)
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
        (KeyboardInterrupt("Interrompu : rien n’est gardé."), 130, "Interrompu : rien n’est gardé.\n"),
        (typer.Abort(), 130, "Interrompu.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disque plein"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "modele/"), 2, "modele/\u00a0: introuvable."),
    ],
)
def test_errors_of_a_command(error, code, message):
    result = run(fails_with(error))
    assert result.exit_code == code and message in result.stderr and result.stdout == ""
    assert result.stderr.count("\n") == 1


def test_a_defect_keeps_its_trace():
    assert isinstance(run(lambda: 1 / 0).exception, ZeroDivisionError)


def test_errors_name_the_options():
    """Ce que la bibliothèque nomme `batch_size` se tape `--batch-size`, sauf dans un chemin."""
    message = "batch_size (8) : voyez a/batch_size/b, ou donnez force=True, ou donnez encoding='cp1252'."
    expected = "--batch-size (8) : voyez a/batch_size/b, ou donnez --force.\n"
    assert run(fails_with(LlamaError(message))).stderr == expected


def test_announces_apart_from_results(monkeypatch):
    def action():
        console.say("Je travaille.")
        console.conclude({"perte": 1.5, "où": "là"}, ["Perte : 1,5", "Là."], as_json=False)
        console.conclude({"perte": 1.5, "où": "là"}, [], as_json=True)

    result = run(action)
    assert result.stderr == "Je travaille.\n"
    assert result.stdout.startswith("Perte : 1,5\nLà.\n")
    assert json.loads(result.stdout.partition("Là.")[2]) == {"perte": 1.5, "où": "là"}
    monkeypatch.setenv("RANK", "1")
    assert run(action).output == ""


def test_another_process_names_itself(monkeypatch):
    """Une erreur peut n’atteindre que lui ; un Ctrl-C les atteint tous, et le premier suffit à le dire."""
    monkeypatch.setenv("RANK", "1")
    result = run(fails_with(LlamaError("Une ligne claire.")))
    assert (result.exit_code, result.stderr) == (2, "Processus 1\u00a0: Une ligne claire.\n") and result.stdout == ""
    result = run(fails_with(KeyboardInterrupt()))
    assert result.exit_code == 130 and result.output == ""


@pytest.mark.parametrize("value, digits, text", [
    (1234567, 0, "1\u00a0234\u00a0567"), (1.5, 2, "1,50"), (-12345.678, 1, "-12\u00a0345,7"), (0, 0, "0"),
])
def test_numbers_are_written_in_french(value, digits, text):
    assert console.number(value, digits) == text
