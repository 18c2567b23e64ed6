"""La commande `llama fetch` : le catalogue des sources, et ce que le cache en a."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from llama import console, sources
from llama.config import LlamaError
from llama.console import command


@command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="NOM", help="Sources à récupérer.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Montre le catalogue et le cache.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Relit le cache et compare les SHA-256.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Récupère même ce que le cache a déjà.")] = False,
    as_json: console.Json = False,
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
