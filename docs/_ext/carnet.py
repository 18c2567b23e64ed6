"""Le pont du carnet au chapitre : nombres, figures et cellules lus dans les carnets exécutés.

- ``:valeur:`04_preentrainement:perte_finale``` écrit une valeur enregistrée par `llama.lesson.record` ;
- ``.. figure-carnet:: 04_preentrainement:courbe`` montre une figure de `llama.lesson.figure` ;
- ``.. carnet:: 04_preentrainement ma-cellule`` reproduit les cellules de code qui portent l’étiquette.

Rien n’est exécuté ici. Un carnet, un nom ou une étiquette introuvable est un avertissement, donc une erreur
sous ``-W`` ; chaque page dépend des carnets qu’elle cite et se reconstruit avec eux.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.directives.patches import Figure
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)

NBSP = "\u00a0"
FENCED_PYTHON = re.compile(r"\A```python\n(.*)\n```\Z", re.DOTALL)


class CarnetError(Exception):
    """Une référence à un carnet ne mène à rien ; le message est en français et tient en une ligne."""


@dataclass(frozen=True)
class Notebook:
    """Un carnet exécuté : ses cellules de code et ses sorties nommées."""

    stem: str
    cells: list[Any]
    outputs: dict[str, Any]

    def output(self, name: str, kind: str) -> Any:
        """Rend la sortie enregistrée sous `name`, qui doit porter la clé `kind` (`"text"` ou `"alt"`)."""
        output = self.outputs.get(name)
        if output is None or kind not in output.metadata.scrapbook:
            what = "la figure" if kind == "alt" else "la valeur"
            raise CarnetError(f"le carnet {self.stem} n’enregistre pas {what} « {name} »")
        return output

    def tagged(self, tag: str) -> list[Any]:
        """Rend les cellules de code qui portent l’étiquette, dans l’ordre."""
        cells = [cell for cell in self.cells if tag in cell.metadata.get("tags", [])]
        if not cells:
            raise CarnetError(f"le carnet {self.stem} n’a pas de cellule de code étiquetée « {tag} »")
        return cells


@cache
def _read(path: Path, modified: int) -> Notebook:
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:
        raise CarnetError(f"le carnet {path.name} est illisible ({error.__class__.__name__})") from error
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs: dict[str, Any] = {}
    for output in (output for cell in cells for output in cell.outputs):
        name = output.get("metadata", {}).get("scrapbook", {}).get("name")
        if name in outputs:
            raise CarnetError(f"le carnet {path.stem} enregistre deux fois le nom « {name} »")
        if name is not None:
            outputs[name] = output
    return Notebook(path.stem, cells, outputs)


def load(env: BuildEnvironment, stem: str) -> Notebook:
    """Lit un carnet (une fois par construction) et en fait dépendre la page en cours."""
    relative = Path(env.config.carnet_dossier) / f"{stem}.ipynb"
    env.note_dependency(relative.as_posix())
    path = env.srcdir / relative
    if not path.is_file():
        raise CarnetError(f"le carnet {relative.as_posix()} n’existe pas")
    return _read(path, path.stat().st_mtime_ns)


def split_reference(text: str) -> tuple[str, str]:
    """Coupe `carnet:nom` en deux."""
    stem, colon, name = (part.strip() for part in text.partition(":"))
    if not (stem and colon and name):
        raise CarnetError(f"« {text} » ne se lit pas : écrivez « carnet:nom »")
    return stem, name


class ValueRole(SphinxRole):
    """``:valeur:`carnet:nom``` : la valeur telle que le carnet l’affiche, sans son unité.

    ``:valeur:`carnet:nom | .1f``` la réécrit dans un format Python, ``| unité`` ajoute l’unité enregistrée ;
    les deux se combinent. Un format ne peut pas demander plus de chiffres que le carnet n’en a enregistré.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        reference, _, options = self.text.partition("|")
        try:
            stem, name = split_reference(reference)
            entry = load(self.env, stem).output(name, "text").metadata.scrapbook
            text = format_value(entry, options.split())
        except CarnetError as error:
            logger.warning("valeur : %s", error, location=self.get_location(), type="carnet")
            return [], []
        return [nodes.inline(self.rawtext, text, classes=["valeur"])], []


def format_value(entry: dict[str, Any], options: list[str]) -> str:
    """Écrit une valeur enregistrée, selon les options du rôle."""
    text = entry["text"]
    for spec in (option for option in options if option != "unité"):
        text = _reformat(entry["value"], entry["text"], spec)
    return f"{text}{NBSP}{entry['unit']}" if "unité" in options and entry["unit"] else text


def _reformat(value: Any, recorded: str, spec: str) -> str:
    try:
        text = format(value, spec)
    except (ValueError, TypeError) as error:
        raise CarnetError(f"le format « {spec} » ne convient pas à la valeur {value!r}") from error
    known = len(recorded.partition(",")[2]) - (2 if spec.endswith("%") else 0)
    if isinstance(value, float) and len(text.rstrip("%").partition(".")[2]) > max(known, 0):
        raise CarnetError(f"le format « {spec} » demande plus de chiffres que le carnet n’en enregistre")
    return text.replace("-", "−").replace(",", "\u202f").replace(".", ",").replace("%", "\u202f%")


def image_uri(env: BuildEnvironment, stem: str, png: str) -> str:
    """Écrit une image de carnet sous le dossier de construction et rend son adresse pour Sphinx.

    Le nom porte l’empreinte du contenu : une image inchangée n’est pas réécrite, une image changée a une
    autre adresse et aucun navigateur ne montre l’ancienne.
    """
    content = base64.b64decode(png)
    folder = Path(env.doctreedir) / "carnets"
    path = folder / f"{stem}-{_png_digest(png)[:16]}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return "/" + Path(os.path.relpath(path, env.srcdir)).as_posix()


def _png_digest(png: str) -> str:
    return hashlib.sha256(base64.b64decode(png)).hexdigest()


class FigureDirective(Figure):
    """``.. figure-carnet:: carnet:nom`` : `figure`, image et texte de remplacement pris dans le carnet."""

    option_spec = {key: value for key, value in Figure.option_spec.items() if key != "alt"}

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        try:
            stem, name = split_reference(self.arguments[0])
            output = load(env, stem).output(name, "alt")
        except CarnetError as error:
            logger.warning("figure-carnet : %s", error, location=(env.docname, self.lineno), type="carnet")
            return []
        self.arguments = [image_uri(env, stem, output.data["image/png"])]
        self.options["alt"] = output.metadata.scrapbook.alt
        width = output.metadata.get("image/png", {}).get("width")
        if width and not {"width", "scale", "height"} & self.options.keys():
            self.options["width"] = f"{width}px"
        return super().run()


class CellsDirective(SphinxDirective):
    """``.. carnet:: carnet étiquette`` : le code des cellules étiquetées et leurs sorties.

    ``:code-seul:`` et ``:sortie-seule:`` n’en gardent qu’une moitié.
    """

    required_arguments = 2
    option_spec = {"code-seul": directives.flag, "sortie-seule": directives.flag}

    def run(self) -> list[nodes.Node]:
        stem, tag = self.arguments
        try:
            if len(self.options) == 2:
                raise CarnetError("choisissez entre :code-seul: et :sortie-seule:")
            cells = load(self.env, stem).tagged(tag)
        except CarnetError as error:
            logger.warning("carnet : %s", error, location=self.get_location(), type="carnet")
            return []
        return [self._cell(stem, cell) for cell in cells]

    def _cell(self, stem: str, cell: Any) -> nodes.container:
        node = nodes.container(classes=["cell"])  # comme myst-nb dans la page du carnet
        if "sortie-seule" not in self.options:
            code = nodes.literal_block(cell.source, cell.source, language="ipython3")
            node += nodes.container("", code, classes=["cell_input"])
        if "code-seul" not in self.options:
            outputs = merge_streams(cell.outputs)
            rendered = [item for output in outputs for item in render(self.env, stem, output)]
            if rendered:
                node += nodes.container("", *rendered, classes=["cell_output"])
        self.set_source_info(node)
        return node


def merge_streams(outputs: list[Any]) -> list[Any]:
    """Réunit les morceaux consécutifs d’un même flux, que Jupyter coupe au hasard des tampons."""
    merged: list[Any] = []
    for output in outputs:
        previous = merged[-1] if merged else None
        if previous is not None and output.output_type == "stream" == previous.output_type:
            if output.name == previous.name:
                merged[-1] = nbformat.from_dict({**previous, "text": previous.text + output.text})
                continue
        merged.append(output)
    return merged


def render(env: BuildEnvironment, stem: str, output: Any) -> list[nodes.Node]:
    """Traduit une sortie de carnet en nœuds : image, code, tableau HTML (avec repli textuel) ou texte."""
    if output.output_type == "stream":
        return [_text(output.text, "stream")]
    if output.output_type == "error":
        return [_text("\n".join(output.traceback), "traceback")]
    data, metadata = output.data, output.metadata
    if "image/png" in data:
        image = nodes.image(uri=image_uri(env, stem, data["image/png"]))
        image["alt"] = metadata.get("scrapbook", {}).get("alt", data.get("text/plain", ""))
        if "width" in metadata.get("image/png", {}):
            image["width"] = f"{metadata['image/png']['width']}px"
        return [image]
    source = FENCED_PYTHON.match(data.get("text/markdown", ""))
    if source:
        return [nodes.literal_block(source[1], source[1], language="python", classes=["output"])]
    text = _text(data.get("text/plain", ""), "text_plain")
    if "text/html" in data:
        html = nodes.raw("", data["text/html"], format="html", classes=["output", "text_html"])
        return [addnodes.only("", html, expr="html"), addnodes.only("", text, expr="not html")]
    return [text]


def _text(text: str, kind: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="myst-ansi", classes=["output", kind])


def describe_images(app: Sphinx, doctree: nodes.document) -> None:
    """Donne aux figures de la page d’un carnet le texte de remplacement enregistré avec elles."""
    folder, _, stem = app.env.docname.rpartition("/")
    if folder != app.config.carnet_dossier:
        return
    try:
        outputs = load(app.env, stem).outputs.values()
    except CarnetError as error:
        logger.warning("carnet : %s", error, location=app.env.docname, type="carnet")
        return
    alts = {_png_digest(output.data["image/png"]): output.metadata.scrapbook.alt
            for output in outputs if "alt" in output.metadata.scrapbook}
    for image in doctree.findall(nodes.image):
        digest = Path(image["uri"]).stem  # myst-nb nomme ainsi l’image
        if digest in alts:
            image["alt"] = alts[digest]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("carnet_dossier", "lessons", "env", types=str)
    app.add_role("valeur", ValueRole())
    app.add_directive("figure-carnet", FigureDirective)
    app.add_directive("carnet", CellsDirective)
    app.connect("doctree-read", describe_images)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
