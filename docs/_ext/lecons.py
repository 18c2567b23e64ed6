"""L’ossature d’une leçon : en-tête du chapitre, liens vers son carnet, cartes de l’accueil, numéros.

Une leçon est un chapitre docs/NN_nom.rst et un carnet lessons/NN_nom.ipynb ; NN est son numéro, partout :
titre, figures, exercices, équations. L’adresse du dépôt vient de pyproject.toml.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.util.docutils import SphinxDirective

LESSON = re.compile(r"(docs|lessons)/((\d\d)_\w+)")


def colab_url(repository: str, stem: str) -> str | None:
    """Rend l’adresse d’un carnet dans Colab, ou None si le dépôt n’est pas chez GitHub."""
    address = urlsplit(repository)
    if address.netloc != "github.com":
        return None
    path = address.path.strip("/").removesuffix(".git")
    return f"https://colab.research.google.com/github/{path}/blob/main/lessons/{stem}.ipynb"


def links(env: BuildEnvironment, stem: str, *, to: str) -> nodes.container:
    """Rend la rangée de liens d’une leçon : l’autre page (`to`), Colab, le téléchargement du carnet."""
    folder, text = ("lessons", "Voir le carnet exécuté") if to == "carnet" else ("docs", "Lire le chapitre")
    children: list[nodes.Node] = [
        addnodes.pending_xref(
            "", nodes.inline("", text), refdomain="std", reftype="doc", reftarget=f"/{folder}/{stem}",
            refdoc=env.docname, refexplicit=True, refwarn=True,
        ),
        addnodes.download_reference(
            "", "", nodes.inline("", "Télécharger le carnet"),
            refdoc=env.docname, reftype="download", reftarget=f"/lessons/{stem}.ipynb", refwarn=True,
        ),
    ]
    url = colab_url(env.config.lecons_depot, stem)
    if url:
        children.insert(1, nodes.reference("", "Ouvrir dans Colab", refuri=url, internal=False))
    return nodes.container("", nodes.paragraph("", "", *children), classes=["liens-lecon", "no-search"])


class LessonDirective(SphinxDirective):
    """``.. lecon:: 04_preentrainement`` : l’en-tête d’un chapitre ; le corps énonce les objectifs."""

    required_arguments = 1
    has_content = True
    option_spec = {"duree": directives.unchanged_required, "prerequis": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        stem = self.arguments[0]
        card = nodes.container(classes=["lecon"])
        for label, option in (("Durée", "duree"), ("Prérequis", "prerequis")):
            if option in self.options:
                children, messages = self.parse_inline(self.options[option], lineno=self.lineno)
                term = nodes.strong("", f"{label} : ")
                card += nodes.paragraph("", "", term, *children, *messages, classes=["lecon-repere"])
        if self.content:
            card += nodes.paragraph("", "", nodes.strong("", "À la fin de cette leçon, vous saurez :"))
            card += self.parse_content_to_nodes()
        card += links(self.env, stem, to="carnet")
        toctree = f".. toctree::\n   :hidden:\n\n   Carnet exécuté </lessons/{stem}>\n"
        return [card, *self.parse_text_to_nodes(toctree)]


class LessonsDirective(SphinxDirective):
    """``.. lecons::`` : les cartes du programme, d’après une liste de définitions « nom : titre ».

    Une leçon dont le chapitre existe devient un lien ; les autres sont annoncées « à venir ».
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        self.assert_has_content()
        cards = nodes.bullet_list(classes=["lecons"], bullet="-")
        for item in nodes.container("", *self.parse_content_to_nodes()).findall(nodes.definition_list_item):
            cards += self._card(item[0].astext(), item[1].astext(), item[-1].children)
        return [cards]

    def _card(self, stem: str, title: str, description: list[nodes.Node]) -> nodes.list_item:
        docname = f"docs/{stem}"
        number = nodes.inline("", stem[:2].lstrip("0"), classes=["lecon-numero"])
        available = docname in self.env.found_docs
        label: nodes.Node = nodes.inline("", title)
        if available:
            label = addnodes.pending_xref(
                "", label, refdomain="std", reftype="doc", reftarget=f"/{docname}",
                refdoc=self.env.docname, refexplicit=True, refwarn=True,
            )
        head = nodes.paragraph("", "", number, nodes.Text(" "), label, classes=["lecon-titre"])
        if not available:
            head += [nodes.Text(" "), nodes.inline("", "à venir", classes=["lecon-a-venir"])]
        state = "disponible" if available else "a-venir"
        return nodes.list_item("", head, *(node.deepcopy() for node in description), classes=[state])


def add_notebook_links(app: Sphinx, doctree: nodes.document) -> None:
    """Met sous le titre d’un carnet les mêmes liens que dans son chapitre."""
    match = LESSON.fullmatch(app.env.docname)
    title = next(doctree.findall(nodes.title), None)
    if match and match[1] == "lessons" and title is not None:
        section = title.parent
        section.insert(section.index(title) + 1, links(app.env, match[2], to="chapitre"))


def number_lessons(collector: TocTreeCollector, env: BuildEnvironment) -> list[str]:
    """Numérote chaque chapitre par son nom de fichier : la leçon 4 est la 4 même quand la 3 n’est pas écrite.

    Sphinx ne sait que compter les entrées d’une table des matières ; ses figures suivent ces numéros-là.
    """
    before = env.toc_secnumbers
    rewrite = _assign_section_numbers(collector, env)
    for docname in env.found_docs:
        match = LESSON.fullmatch(docname)
        if match and match[1] == "docs" and docname in env.tocs:
            env.toc_secnumbers[docname] = _number(env.tocs[docname], (int(match[3]),))
            env.titles[docname]["secnumber"] = (int(match[3]),)
            if env.toc_secnumbers[docname] != before.get(docname):
                rewrite.append(docname)
    return rewrite


def _number(toc: nodes.Element, prefix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Numérote l’arbre des titres d’un chapitre : {ancre: (4, 1)} ; le titre a celui de la leçon."""
    numbers: dict[str, tuple[int, ...]] = {}
    items = [child for child in toc.children if isinstance(child, nodes.list_item)]
    for position, item in enumerate(items, start=1):
        reference = item[0][0]
        number = prefix if reference["anchorname"] == "" else (*prefix, position)
        reference["secnumber"] = numbers[reference["anchorname"]] = number
        for sub_list in item.children[1:]:
            if isinstance(sub_list, nodes.bullet_list):
                numbers.update(_number(sub_list, number))
    return numbers


_assign_section_numbers = TocTreeCollector.assign_section_numbers


def setup(app: Sphinx) -> dict[str, Any]:
    TocTreeCollector.assign_section_numbers = number_lessons
    app.add_config_value("lecons_depot", "", "env", types=str)
    app.add_directive("lecon", LessonDirective)
    app.add_directive("lecons", LessonsDirective)
    app.connect("doctree-read", add_notebook_links, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
