"""Recherche en français : « lecon », « leçon » et « leçons » trouvent les mêmes pages.

L’indexeur français de Sphinx garde les accents, que beaucoup ne tapent pas. On les ôte avant de réduire les
mots à leur racine, des deux côtés : dans l’index (Python) et dans la requête (recherche.js).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from sphinx.application import Sphinx
from sphinx.search.fr import SearchFrench

COMPOUND = re.compile(r"\w+(?:-\w+)+")


class AccentlessSearchFrench(SearchFrench):
    """Le français de Sphinx, sans égard aux accents."""

    def split(self, input: str) -> list[str]:
        compounds = [word.replace("-", "") for word in COMPOUND.findall(input)]
        return super().split(input) + compounds  # « preentrainement » trouve « pré-entraînement »

    def stem(self, word: str) -> str:
        return super().stem(strip_accents(word.lower()))


def strip_accents(word: str) -> str:
    """Ôte les signes diacritiques et défait les ligatures : « cœur » → « coeur »."""
    decomposed = unicodedata.normalize("NFD", word)
    letters = "".join(char for char in decomposed if unicodedata.category(char)[0] != "M")
    return letters.replace("œ", "oe").replace("æ", "ae")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_search_language(AccentlessSearchFrench)
    app.add_js_file("recherche.js", defer="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
