"""La commande `llama`, ou `python -m llama` : ses commandes, dans l’ordre de l’aide (leur français : `console`)."""

from __future__ import annotations

from llama import catalogue, training_commands, usage_commands
from llama.console import app

__all__ = ["app", "catalogue", "main", "training_commands", "usage_commands"]


def main() -> None:
    """Point d’entrée de la commande."""
    app(prog_name="llama")
