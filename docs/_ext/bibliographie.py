"""La bibliographie en français : « et » entre les auteurs, « et al. » s’il y en a d’autres (`and others`)."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.richtext import Text
from pybtex.style.formatting.alpha import Style
from pybtex.style.template import names, sentence
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


class FrenchStyle(Style):
    """Le style « alpha » de BibTeX, en français."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plain = self.format_name
        self.format_name = lambda who, abbr: Text("al.") if str(who) == "others" else plain(who, abbr)

    def format_names(self, role: str, as_sentence: bool = True) -> Any:
        authors = names(role, sep=", ", sep2=" et ", last_sep=" et ")
        return sentence[authors] if as_sentence else authors


def visit_citation(self: Any, node: nodes.citation) -> None:
    """Le rôle que pose docutils, `doc-biblioentry`, est déprécié, et sa liste n’a alors aucun élément."""
    HTML5Translator.visit_citation(self, node)
    self.body[-1] = self.body[-1].replace("doc-biblioentry", "listitem")


def setup(app: Sphinx) -> dict[str, Any]:
    register_plugin("pybtex.style.formatting", "francais", FrenchStyle)
    app.add_node(nodes.citation, override=True, html=(visit_citation, HTML5Translator.depart_citation))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
