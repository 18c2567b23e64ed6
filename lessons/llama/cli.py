"""La commande `llama`, ou `python -m llama`.

Une commande est une fonction décorée par `@command()`, dont la docstring est l’aide ; elle charge torch
elle-même s’il lui en faut. Les erreurs prévues sont des `LlamaError` : `_Group.main`, seul endroit qui les
attrape, en écrit la ligne et sort avec le code 2.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import llama
from llama import sources
from llama.config import LlamaError

_FRENCH = (  # ce que typer écrit en anglais, dans l’aide et dans les erreurs d’usage
    (r"^Usage: ", "Usage : "),
    (r"\[\[NOM\]\.\.\.\]\.\.\.", "[NOM]…"),
    (r"COMMAND \[ARGS\]\.\.\.", "COMMANDE [ARGUMENTS]…"),
    (r"^(Options|Arguments):$", "\\1 :"),
    (r"^Commands:$", "Commandes :"),
    (r"Show this message and exit\.", "Affiche cette aide."),
    (r"\[default:(?=\s)", "[par défaut :"),
    (r"(\[|; )required\]", "\\1obligatoire]"),
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


class _Command(TyperCommand):
    """Une commande dont l’aide est en français."""

    def get_help(self, ctx: typer.Context) -> str:
        return _french(super().get_help(ctx))


class _Group(TyperGroup):
    """Le groupe des commandes : aide en français, et une ligne par erreur, jamais de trace."""

    def get_help(self, ctx: typer.Context) -> str:
        return _french(super().get_help(ctx))

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except LlamaError as error:
            _stop(str(error), 2)
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except OSError as error:
            where = f"{error.filename} : " if error.filename else ""
            _stop(f"Erreur du système : {where}{sources.system_cause(error)}.", 2)
        except Exception as error:
            if not hasattr(error, "format_message"):  # un défaut du programme : la trace sert à le corriger
                raise
            _stop(f"Erreur : {_french(error.format_message())} L’aide est dans « llama --help ».", 2)
        if code == 130:
            _stop("Interrompu.", 130)
        sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> None:
    typer.echo(message, err=True)
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


@command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="NOM", help="Sources à récupérer.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Montre le catalogue et le cache.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Relit le cache et compare les SHA-256.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Récupère même ce que le cache a déjà.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Écrit un résumé en JSON.")] = False,
) -> None:
    """Récupère des textes et des poids réels, vérifiés, dans le cache.

    Le cache est celui de l’utilisateur, ou le dossier de la variable LLAMA_CACHE.

    \b
    Exemples :
      llama fetch --list
      llama fetch fiches-travail smollm2
      llama fetch fiches-travail --verify
      llama fetch smollm2 --force
    """
    if listing:
        rows = [_entry(name) for name in sources.CATALOGUE]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2) if as_json else _table(rows))
        return
    if not names:
        raise LlamaError("Quelle source ? Donnez un nom, ou --list pour voir le catalogue.")
    for name in names:
        sources.folder_of(name)  # un nom inconnu se dit avant que les autres ne soient téléchargés
    rows = []
    for name in names:
        start = time.perf_counter()
        folder = sources.fetch(name, verify=verify, force=force)
        rows.append({**_entry(name), "seconds": round(time.perf_counter() - start, 3)})
        if not as_json:
            typer.echo(f"{name} : {folder}{' (vérifié)' if verify else ''}")
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))


def _entry(name: str) -> dict[str, Any]:
    source, folder = sources.CATALOGUE[name], sources.folder_of(name)
    return {"name": name, **asdict(source), "folder": str(folder), "cached": folder.is_dir()}


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [("nom", "taille", "sur disque", "en cache", "licence", "ce que c’est")]
    cells += [(row["name"], sources.megabytes(row["size"]), sources.megabytes(row["unpacked"]),
               "oui" if row["cached"] else "non", row["licence"], row["description"]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines)


def main() -> None:
    """Point d’entrée de la commande."""
    app(prog_name="llama")
