"""La ligne de commande parle français : aide, erreurs, annonces, résumés, options que les commandes partagent.

Une commande est une fonction décorée par `@command()`, dont la docstring est l’aide ; elle charge torch
elle-même s’il lui en faut. Ce qu’elle annonce (`say`) va sur la sortie d’erreur, ce qu’elle rend (`conclude`)
sur la sortie. Les erreurs prévues sont des `LlamaError` : `_Group.main`, seul endroit qui les attrape, en écrit
la ligne et sort avec le code 2.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import llama
from llama.config import LlamaError, system_cause

_FRENCH = (  # ce que typer écrit en anglais, dans l’aide et dans les erreurs d’usage
    (r"^Usage: ", "Usage : "),
    (r"\[\[NOM\]\.\.\.\]\.\.\.", "[NOM]…"),
    (r"\{([A-Z]+)\}", "\\1"),
    (r"COMMAND \[ARGS\]\.\.\.", "COMMANDE [ARGUMENTS]…"),
    (r"^(Options|Arguments):$", "\\1 :"),
    (r"^Commands:$", "Commandes :"),
    (r"Show this message and exit\.", "Affiche cette aide."),
    (r"\[default:(?=\s)", "[par défaut :"),
    (r"(?<=[\[\s])required\]", "obligatoire]"),
    (r"([\d.]+)<=x<=([\d.]+)", "entre \\1 et \\2"),
    (r"x>=([\d.]+)", "au moins \\1"),
    (r";(?=\s+(au moins|entre|obligatoire))", " ;"),
    (r" <list\[\w+\]>", ""),
    (r"<int>( {3}(?=  ))?", "<entier>"),  # les espaces pris, ou rendus, gardent les colonnes
    (r"<int range>", "<entier>   "),
    (r"<float>( (?=  ))?", "<nombre>"),
    (r"<float range>", "<nombre>     "),
    (r"<str>( {2}(?=  ))?", "<texte>"),
    (r"<(path|file|directory)>( {2}(?=  ))?", "<chemin>"),
    (r"^Missing argument (.*)\.$", "il manque l’argument \\1."),
    (r"^Missing option (.*)\.$", "il manque l’option \\1."),
    (r"^Missing command\.$", "il manque une commande."),
    (r"^No such command (.*?)\.", "commande inconnue : \\1."),
    (r"^No such option: (\S+)", "option inconnue : \\1"),
    (r"Did you mean (.*)\?", "Vouliez-vous dire \\1 ?"),
    (r"\(Possible options: (.*)\)", "(options proches : \\1)"),
    (r"^Option (.*) requires an argument\.$", "l’option \\1 demande une valeur."),
    (r"^Option (.*) does not take a value\.$", "l’option \\1 ne prend pas de valeur."),
    (r"^Got unexpected extra argument\S* \((.*)\)$", "argument en trop : \\1."),
    (r"^Invalid value for (.*?): (?:Value error, )?(.*)$", "valeur refusée pour \\1 : \\2"),
    (r"Input should be a valid integer.*", "un entier est attendu."),
    (r"Input should be a valid number.*", "un nombre est attendu."),
    (r"Input should be (?:greater than or equal to|>=) (\S+)", "il faut au moins \\1."),
    (r"Input should be (?:less than or equal to|<=) (\S+)", "il faut au plus \\1."),
    (r"Input should be greater than (\S+)", "il faut plus que \\1."),
    (r"Input should be less than (\S+)", "il faut moins que \\1."),
    (r"('.*?') is not one of (.*)\.", "\\1 n’est pas parmi \\2."),
)


def _french(text: str) -> str:
    for english, french in _FRENCH:
        text = re.sub(english, french, text, flags=re.MULTILINE)
    return text


class Interruption(Exception):
    """Un Ctrl-C ; le message dit ce qui est gardé."""


class _Command(TyperCommand):
    """Une commande dont l’aide est en français, et dont les erreurs nomment les options."""

    def get_help(self, ctx: typer.Context) -> str:
        return _french(super().get_help(ctx))

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interruption(str(stop) or "Interrompu.") from None
        except LlamaError as error:
            raise LlamaError(self._as_options(str(error))) from error

    def _as_options(self, message: str) -> str:
        """`batch_size` se dit `--batch-size` à qui tape une commande."""
        names = [p.name for p in self.params if p.name and "_" in p.name]
        for name in names:
            message = re.sub(rf"(?<![\w/.-]){name}(?![\w/.-])", f"--{name.replace('_', '-')}", message)
        message = re.sub(r", ou donnez encoding=[^ .]*", "", message)
        return message.replace("force=True", "--force")


class _Group(TyperGroup):
    """Le groupe des commandes : aide en français, et une ligne par erreur, jamais de trace."""

    def get_help(self, ctx: typer.Context) -> str:
        return _french(super().get_help(ctx))

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except LlamaError as error:
            _stop(str(error), 2)
        except (Interruption, KeyboardInterrupt, typer.Abort) as stop:
            _stop(str(stop) or "Interrompu.", 130)
        except OSError as error:
            where = f"{error.filename} : " if error.filename else ""
            _stop(f"Erreur du système : {where}{system_cause(error)}.", 2)
        except Exception as error:
            if not hasattr(error, "format_message"):  # un défaut du programme : la trace sert à le corriger
                raise
            _stop(f"Erreur : {_french(error.format_message())} L’aide est dans « llama --help ».", 2)
        sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> None:
    """Dit pourquoi l’on s’arrête ; une erreur peut n’atteindre qu’un processus de torchrun, qui se nomme alors."""
    if first_process():
        say(message)
    elif code == 2:
        typer.echo(f"Processus {os.environ['RANK']} : {message}", err=True)
    sys.exit(code)


app = typer.Typer(cls=_Group, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
command = functools.partial(app.command, cls=_Command)


@app.callback(invoke_without_command=True)
def _llama(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Affiche la version.")] = False,
) -> None:
    """L’atelier des LLM : récupérer, entraîner, affiner, fusionner et évaluer des modèles de langage."""
    if version:
        typer.echo(f"llama {llama.__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def first_process() -> bool:
    """Sous torchrun, un seul processus parle et écrit."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Annonce, sur la sortie d’erreur : la sortie reste à ce que la commande rend."""
    if first_process():
        typer.echo(text, err=True)


def conclude(summary: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """Rend le résultat d’une commande : le résumé en JSON, ou quelques lignes."""
    if first_process():
        typer.echo(json.dumps(summary, ensure_ascii=False, indent=2) if as_json else "\n".join(lines))


def number(value: float, digits: int = 0) -> str:
    """`number(1234567)` donne `"1 234 567"`, `number(1.5, 2)` donne `"1,50"`."""
    return f"{value:,.{digits}f}".replace(",", "\u00a0").replace(".", ",")


METRICS = {
    "accuracy": "choix multiple", "bits_per_byte": "bits par octet", "loss": "perte (nats par jeton)",
    "perplexity": "perplexité", "f1": "F1", "exact_match": "exactitude",
}
"""Ce que l’on mesure, dans l’ordre où on le dit."""


class Device(StrEnum):
    """Où calculer."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Type des calculs ; les poids restent en float32."""

    FLOAT32 = "float32"
    BF16 = "bf16"


_MODEL = "dossier, fichier GGUF, source (smollm2) ou nom du Hub"
Model = Annotated[str, typer.Option("--model", metavar="MODÈLE", help=f"Modèle : {_MODEL}.")]
Teacher = Annotated[str, typer.Option("--teacher", metavar="MODÈLE", help=f"Maître : {_MODEL}.")]
Data = Annotated[str, typer.Option(
    "--data", metavar="DONNÉES", help="Fichier CSV, JSON, JSONL ou TXT, dossier, source, ou jeu du Hub.")]
InputKey = Annotated[str | None, typer.Option(
    "--input-key", metavar="COLONNE", help="Colonne des questions, si elle n’a pas un nom usuel.")]
OutputKey = Annotated[str | None, typer.Option(
    "--output-key", metavar="COLONNE", help="Colonne des réponses, si elle n’a pas un nom usuel.")]
Out = Annotated[Path, typer.Option("--out", metavar="DOSSIER", help="Dossier à créer.")]
SummaryFile = Annotated[Path | None, typer.Option(
    "--out", metavar="FICHIER", help="Fichier JSON où écrire le résumé.")]
Force = Annotated[bool, typer.Option("--force", help="Remplace ce qui existe déjà.")]
Json = Annotated[bool, typer.Option("--json", help="Écrit le résumé en JSON sur la sortie.")]
Seed = Annotated[int, typer.Option("--seed", help="Graine du hasard.")]
Threads = Annotated[int | None, typer.Option(
    "--threads", min=1, help="Fils de calcul ; sinon, ce que torch choisit.")]
Where = Annotated[Device, typer.Option("--device", help="Où calculer : auto prend le GPU s’il y en a un.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Pas d’optimiseur.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Exemples par pas, ou à la fois.")]
MicroBatchSize = Annotated[int | None, typer.Option(
    "--micro-batch-size", min=1, help="Exemples passés à la fois (accumulation) ; sinon tous.")]
BlockSize = Annotated[int, typer.Option("--block-size", min=1, help="Jetons par exemple, au plus.")]
Numbers = Annotated[Precision, typer.Option("--precision", help="Type des calculs.")]
EvalEvery = Annotated[int | None, typer.Option(
    "--eval-every", min=0, help="Pas entre deux évaluations ; sinon six en tout.")]
CheckpointEvery = Annotated[int, typer.Option(
    "--checkpoint-every", min=0, help="Pas entre deux points de reprise ; 0 : Ctrl-C seul en écrit un.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Jetons écrits au plus.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="0 prend toujours le plus probable.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Ne garde que les k jetons les plus probables.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Garde les jetons qui font cette masse.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Écarte les jetons sous cette part du premier.")]
RepetitionPenalty = Annotated[float, typer.Option(
    "--repetition-penalty", help="Pénalise les jetons déjà vus ; 1 ne fait rien.")]
