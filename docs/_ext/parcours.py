"""La courbe du cours : des valeurs prises dans plusieurs carnets, en une figure.

.. code-block:: rst

   .. parcours::
      :hasard: 25

      Un lecteur aveugle : 09_inference:examen_aveugle
      petit : 09_inference:examen_petit, 09_inference:examen_petit_bas, 09_inference:examen_petit_haut

Une ligne donne un nom et la valeur qui le juge, suivie, si le carnet les enregistre, des bornes de son intervalle.
"""

from __future__ import annotations

import base64
import io
import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.directives.patches import Figure
from sphinx.util import logging

from carnet import NBSP, CarnetError, image_uri, load, split_reference

logger = logging.getLogger(__name__)


class JourneyDirective(Figure):
    """``.. parcours::`` : une barre par ligne, de haut en bas, et le hasard en pointillé."""

    required_arguments = 0
    has_content = True
    option_spec = {**Figure.option_spec, "hasard": float, "titre": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        try:
            rows = [self._row(env, line) for line in self.content if line.strip()]
        except CarnetError as error:
            logger.warning("parcours : %s", error, location=(env.docname, self.lineno), type="carnet")
            return []
        chance, title = self.options.pop("hasard", None), self.options.pop("titre", "")
        self.content = self.content[:0]
        self.arguments = [image_uri(env, "parcours", draw(rows, chance, title))]
        self.options |= {"alt": describe(rows, title), "width": "720px"}
        return super().run()

    def _row(self, env: Any, line: str) -> tuple[str, list[dict[str, Any]]]:
        label, *rest = re.split(r"\s:\s", line, maxsplit=1)
        if not rest:
            raise CarnetError(f"« {line} » ne se lit pas : écrivez « nom : carnet:valeur »")
        entries = []
        for reference in rest[0].split(","):
            stem, name = split_reference(reference)
            entries.append(load(env, stem).output(name, "text").metadata.scrapbook)
        if len(entries) not in (1, 3):
            raise CarnetError(f"« {line} » demande une valeur, ou une valeur et ses deux bornes")
        return label.strip(), entries


def describe(rows: list[tuple[str, list[dict[str, Any]]]], title: str) -> str:
    """Le texte de remplacement : chaque nom et sa valeur, dans l’ordre."""
    values = " ; ".join(f"{label}, {entries[0]['text']}{NBSP}{entries[0]['unit']}" for label, entries in rows)
    return f"{title}. Barres horizontales, de haut en bas : {values}."


def draw(rows: list[tuple[str, list[dict[str, Any]]]], chance: float | None, title: str) -> str:
    """Rend l’image, en PNG encodé comme dans un carnet."""
    from matplotlib import pyplot

    from llama import plots

    figure, axis = plots.subplots(size=(9.0, 1.2 + 0.34 * len(rows)))
    values = [entries[0]["value"] for _, entries in rows]
    axis.barh(range(len(rows)), values, color=plots.BLUE)
    for place, (_, (value, *bounds)) in enumerate(rows):
        if bounds:
            low, high = (abs(value["value"] - bound["value"]) for bound in bounds)
            axis.errorbar(value["value"], place, xerr=[[low], [high]], fmt="none", ecolor=plots.INK, capsize=3)
        end = bounds[1]["value"] if bounds else value["value"]
        axis.text(end + 1, place, value["text"], va="center")
    if chance is not None:
        axis.axvline(chance, color=plots.VERMILION, ls=":", label="hasard")
        axis.legend(loc="lower right")
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="réponses justes (%)", xlim=(0, 100), title=title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("parcours", JourneyDirective)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
