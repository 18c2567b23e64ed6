"""Du carnet au chapitre : un vrai petit carnet, exécuté, et un vrai petit site construit avec lui."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx.testing.util import SphinxTestApp

import carnet

ROOT = Path(__file__).parents[1]
NBSP, NARROW = "\u00a0", "\u202f"

CELLS = [
    ("setup", "from llama import lesson, plots\nlesson.setup()"),
    ("valeurs", "lesson.record('perte', 2.3149, 'nats')\nlesson.record('jetons', 1234567)"),
    ("valeurs", "lesson.record('part', 0.4149, digits=4)"),
    ("dessin", "fig, ax = plots.subplots(size=(4, 3))\nax.plot([1, 2])\n"
               "lesson.figure('courbe', fig, alt='Une droite qui monte.', data=[1, 2])"),
    ("tableau", "import pandas\npandas.DataFrame({'modèle': ['dense']})"),
    ("source", "lesson.show_source(lesson.in_colab)"),
    ("texte", "print('première ligne')\nprint('<seconde>')"),
]
CONF = """
extensions = ["myst_nb", "carnet", "parcours"]
source_suffix = {".rst": "restructuredtext", ".ipynb": "myst-nb"}
nb_execution_mode = "off"
language = "fr"
numfig = True
html_theme = "basic"
exclude_patterns = ["_build"]
"""
CHAPTER = """
Chapitre
========

.. toctree::

   lessons/petit

Perte :valeur:`petit:perte` ; :valeur:`petit:perte | unité` ; :valeur:`petit:perte | .1f` ;
:valeur:`petit:jetons` ; :valeur:`petit:part | .1%` ; :valeur:`petit:perte | .1f unité`. Voir
:numref:`fig-courbe`.

.. figure-carnet:: petit:courbe
   :name: fig-courbe

   Légende, :valeur:`petit:perte`.

.. carnet:: petit valeurs

.. carnet:: petit dessin
   :sortie-seule:

.. carnet:: petit tableau
   :sortie-seule:

.. carnet:: petit source
   :sortie-seule:

.. carnet:: petit texte
   :code-seul:

.. carnet:: petit texte
   :sortie-seule:

.. parcours::
   :hasard: 25
   :titre: Le parcours

   Premier : petit:perte
   Second : petit:perte, petit:part, petit:perte
"""


@pytest.fixture(scope="module")
def executed() -> nbformat.NotebookNode:
    """Le carnet, exécuté par un vrai noyau comme le fait `make lessons`."""
    notebook = new_notebook(cells=[new_markdown_cell("# Carnet")])
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.cells += [new_code_cell(source, metadata={"tags": [tag]}) for tag, source in CELLS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lessons"), "LLAMA_PROFIL": "rapide"}
    return NotebookClient(notebook, kernel_name="python3", timeout=60).execute(env=environment)


@pytest.fixture
def build(tmp_path, executed):
    """Construit le petit site : `build()` rend le HTML du chapitre et les avertissements."""
    source = tmp_path / "site"
    (source / "lessons").mkdir(parents=True)
    (source / "conf.py").write_text(CONF)
    nbformat.write(executed, source / "lessons" / "petit.ipynb")

    def run(chapter: str = CHAPTER, builder: str = "html") -> tuple[str, str]:
        page = source / "index.rst"
        if not page.exists() or page.read_text() != chapter:
            page.write_text(chapter)
        app = SphinxTestApp(builder, srcdir=source, builddir=source / "_build")
        try:
            app.build()
            suffix = "html" if builder == "html" else "txt"
            return (Path(app.outdir) / f"index.{suffix}").read_text(), app.warning.getvalue()
        finally:
            app.cleanup()

    run.source = source
    return run


def text_of(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


@pytest.fixture
def page(build):
    html, warnings = build()
    assert warnings == ""
    return html


def test_values(page):
    text = text_of(page)
    large, percent = f"1{NARROW}234{NARROW}567", f"41,5{NARROW}%"
    expected = ["2,31", f"2,31{NBSP}nats", "2,3", large, percent, f"2,3{NBSP}nats"]
    assert re.search("Perte " + r"\s;\s".join(map(re.escape, expected)) + r"\. Voir", text)


def test_figure_takes_its_alt_from_the_notebook(page, build):
    figure = re.search(r"<figure.*?</figure>", page, re.DOTALL)[0]
    assert 'alt="Une droite qui monte."' in figure and 'id="fig-courbe"' in figure
    assert "Légende, " in figure and "2,31" in figure
    image = re.search(r'src="([^"]+)"', figure)[1]
    assert (build.source / "_build/html" / image).read_bytes().startswith(b"\x89PNG")
    assert "width: 384px" in figure
    assert re.search(r'href="#fig-courbe"><span class="std std-numref">Fig\. 1', page)


def test_cells_with_code_and_outputs(page):
    text = text_of(page)
    assert "lesson.record('perte', 2.3149, 'nats')" in text.replace("&#39;", "'")
    assert f"perte{NBSP}: 2,31{NBSP}nats" in text and f"part{NBSP}: 0,4149" in text


def test_half_cells(page):
    assert page.count("print") == 2, "le code de « texte » paraît une fois, en deux appels"
    assert text_of(page).count("première ligne") == 2, "dans le code, puis dans la sortie"
    assert "&lt;seconde&gt;" in page
    assert "plots.subplots" not in text_of(page)


def test_rich_outputs(page):
    assert re.search(r"<table[^>]*dataframe.*?<td>dense</td>", page, re.DOTALL)
    assert re.search(r'highlight-python.*?<span class="k">def</span>.*?in_colab', page, re.DOTALL)
    assert page.count('alt="Une droite qui monte."') == 2


def test_figure_alt_on_the_page_of_the_notebook(page, build):
    html = (build.source / "_build/html/lessons/petit.html").read_text()
    assert 'alt="Une droite qui monte."' in html


def test_journey_gathers_values_in_a_figure(page, build):
    figure = re.search(r'<img alt="Le parcours[^>]*>', page)[0]
    assert f"Premier, 2,31{NBSP}nats{NBSP}; Second, 2,31{NBSP}nats." in figure
    image = re.search(r'src="([^"]+)"', figure)[1]
    assert (build.source / "_build/html" / image).read_bytes().startswith(b"\x89PNG")


def test_other_formats_get_the_plain_table(build):
    text, warnings = build(builder="text")
    assert warnings == ""
    assert re.search(r"modèle\s+0\s+dense", text) and "<table" not in text


@pytest.mark.parametrize(("line", "message"), [
    (":valeur:`autre:perte`", "le carnet lessons/autre.ipynb n’existe pas"),
    (":valeur:`petit:rien`", "le carnet petit n’enregistre pas la valeur «_rien_»"),
    (":valeur:`petit:courbe`", "le carnet petit n’enregistre pas la valeur «_courbe_»"),
    (":valeur:`perte`", "«_perte_» ne se lit pas_: écrivez «_carnet:nom_»"),
    (":valeur:`petit:perte | .3f`", "«_.3f_» demande plus de chiffres que le carnet n’en enregistre"),
    (":valeur:`petit:part | .3%`", "le format «_.3%_» demande plus de chiffres"),
    (":valeur:`petit:perte | zzz`", "le format «_zzz_» ne convient pas à la valeur 2.31"),
    (".. figure-carnet:: petit:perte", "le carnet petit n’enregistre pas la figure «_perte_»"),
    (".. figure-carnet:: petit:courbe\n   :alt: autre", "unknown option: \"alt\""),
    (".. parcours::\n\n   Un : petit:rien", "le carnet petit n’enregistre pas la valeur «_rien_»"),
    (".. parcours::\n\n   Un petit:perte", "écrivez «_nom_: carnet:valeur_»"),
    (".. parcours::\n\n   Un : petit:perte, petit:part", "une valeur et ses deux bornes"),
    (".. carnet:: petit rien", "le carnet petit n’a pas de cellule de code étiquetée «_rien_»"),
    (".. carnet:: petit texte\n   :code-seul:\n   :sortie-seule:", "entre :code-seul: et :sortie-seule:"),
])
def test_broken_reference_is_a_warning(build, line, message):
    _, warnings = build(f":orphan:\n\nChapitre\n========\n\n{line}\n")
    assert message.replace("_", NBSP) in warnings
    assert "index.rst:6" in warnings, "l’avertissement dit où"


def test_name_recorded_twice_is_a_warning(build, executed):
    again = new_code_cell("", outputs=executed.cells[2].outputs, execution_count=9)
    twice = new_notebook(cells=[*executed.cells, again], metadata=executed.metadata)
    nbformat.write(twice, build.source / "lessons/petit.ipynb")
    assert f"enregistre deux fois le nom «{NBSP}perte{NBSP}»" in build()[1]


def test_unreadable_notebook_has_a_clear_error(tmp_path):
    path = tmp_path / "petit.ipynb"
    path.write_text("{")
    with pytest.raises(carnet.CarnetError, match="petit.ipynb est illisible"):
        carnet._read(path, 0)


def test_changed_notebook_rebuilds_its_chapter(build, executed):
    build()
    page = build.source / "_build/html/index.html"
    written = page.stat().st_mtime_ns
    build()
    assert page.stat().st_mtime_ns == written, "rien n’a changé : rien n’est récrit"

    changed = nbformat.reads(nbformat.writes(executed), as_version=4)
    outputs = [output for cell in changed.cells if cell.cell_type == "code" for output in cell.outputs]
    by_name = {output.metadata.get("scrapbook", {}).get("name"): output
               for output in outputs if "metadata" in output}
    by_name["perte"].metadata.scrapbook.update(value=1.5, text="1,50")
    by_name["courbe"].metadata.scrapbook["alt"] = "Une droite qui descend."
    nbformat.write(changed, build.source / "lessons/petit.ipynb")
    html, warnings = build()
    assert warnings == ""
    assert "1,50" in html and "2,31" not in re.search(r"Perte.*?Voir", html, re.DOTALL)[0]
    assert 'alt="Une droite qui descend."' in html and "qui monte" not in html


def test_streams_are_merged_in_order():
    def stream(name, text):
        return new_output("stream", name=name, text=text)

    outputs = [stream("stdout", "a"), stream("stdout", "b"), stream("stderr", "c"), stream("stdout", "d")]
    merged = [(output.name, output.text) for output in carnet.merge_streams(outputs)]
    assert merged == [("stdout", "ab"), ("stderr", "c"), ("stdout", "d")]
    assert [output.text for output in outputs] == ["a", "b", "c", "d"]
