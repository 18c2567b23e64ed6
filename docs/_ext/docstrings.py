"""Les docstrings du cours, écrites pour être lues dans le code, deviennent du reStructuredText.

Un bloc en retrait après une ligne vide (schéma, exemple) est rendu tel quel ; une barre verticale n’appelle
aucune substitution. Les rubriques à la Google (Args, Returns, Raises) sont l’affaire de napoleon, qui passe
ensuite.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note):$")
BAR = re.compile(r"(`[^`]*`)|\|")


def to_rst(lines: list[str]) -> list[str]:
    """Traduit une docstring, ligne à ligne."""
    result: list[str] = []
    in_section = in_block = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and not indented:
            in_section, in_block = bool(SECTION.match(line)), False
        elif indented and not in_section and not in_block and result and not result[-1].strip():
            in_block = True
            if not _announces_block(result):
                result += [".. code-block:: text", ""]
        if line.strip() == "\b":  # pour typer : « ne recompose pas ce paragraphe »
            line = ""
        result.append(line if in_block else BAR.sub(lambda match: match[1] or r"\|", line))
    return result


def _announces_block(lines: list[str]) -> bool:
    written = [line for line in lines if line.strip()]
    return bool(written) and (written[-1].endswith("::") or written[-1].startswith(".. "))


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # avant napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
