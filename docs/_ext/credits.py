"""`.. sources::` : les sources du cours, leur crédit et leur licence, tirés du catalogue de `llama`."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from llama import sources


class SourcesDirective(SphinxDirective):
    """Une entrée par source du catalogue."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(sources.__file__)
        entries = nodes.definition_list()
        for name, source in sources.CATALOGUE.items():
            package = nodes.literal("", f"{source.package} {source.version}")
            credit = f"{source.credit}. Licence : {source.licence}. Paquet : "
            details = nodes.paragraph("", "", nodes.Text(credit), package, nodes.Text("."))
            term = nodes.term("", "", nodes.literal("", name))
            entries += nodes.definition_list_item("", term, nodes.definition("", details))
        return [entries]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("sources", SourcesDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
