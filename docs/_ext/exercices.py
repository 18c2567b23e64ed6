"""Les solutions repliées, en `<details>` : au clavier, au lecteur d’écran et sans JavaScript.

`.. solution:: ex-nom` avec `:class: dropdown` vient de sphinx-exercise ; seul son rendu change ici.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx_exercise.nodes import is_extension_node, solution_node


class folded(nodes.General, nodes.Element):
    """Un contenu replié sous son titre."""


class FoldSolutions(SphinxPostTransform):
    """Replie les solutions, et ôte les identifiants que sphinx-exercise répète d’un exercice à l’autre."""

    default_priority = 900  # après les titres et les numéros de sphinx-exercise
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(is_extension_node)):
            title, content = node.children
            content["ids"] = []
            if isinstance(node, solution_node) and "dropdown" in node["classes"]:
                fold = folded("", *content.children, ids=node["ids"], classes=["solution"])
                fold["title"] = title.astext()
                node.replace_self(fold)


def visit_folded(self: Any, node: folded) -> None:
    self.body.append(self.starttag(node, "details"))
    self.body.append(f"<summary>{self.encode(node['title'])}</summary>\n")


def depart_folded(self: Any, node: folded) -> None:
    self.body.append("</details>\n")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_node(folded, html=(visit_folded, depart_folded))
    app.add_post_transform(FoldSolutions)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
