"""Les carnets tels qu’ils sont dans le dépôt suivent les règles du cours, et ces règles savent dire non."""

from __future__ import annotations

import base64
import copy
import io
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode, v4
from PIL import Image, ImageDraw

import notebooks

LESSONS = Path(__file__).parents[1] / "lessons"


def cell(
    source: str, *outputs: NotebookNode, tags: tuple[str, ...] = (), count: int | None = 1
) -> NotebookNode:
    metadata = {"tags": list(tags)} if tags else {}
    return v4.new_code_cell(source, outputs=list(outputs), metadata=metadata, execution_count=count)


def printed(text: str, name: str = "stdout") -> NotebookNode:
    return v4.new_output("stream", text=text, name=name)


def result(text: str, **data: str) -> NotebookNode:
    return v4.new_output("execute_result", data={"text/plain": text, **data}, execution_count=1)


def drawn(image: str, text: str = "Figure « pertes » : empreinte 1f") -> NotebookNode:
    return v4.new_output("display_data", data={"image/png": image, "text/plain": text})


def notebook(*cells: NotebookNode) -> NotebookNode:
    copies = [copy.deepcopy(cell) for cell in cells]
    for number, made in enumerate(copies):
        made.id = f"c{number}"
    made = v4.new_notebook(cells=[v4.new_markdown_cell("# Titre"), *copies])
    made.metadata["sources"] = notebooks.source_digest(made)
    return made


def png(text: str = "", shade: int = 255) -> str:
    image, buffer = Image.new("RGB", (120, 40), (shade,) * 3), io.BytesIO()
    ImageDraw.Draw(image).text((10, 10), text, fill=(0, 0, 0))
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


FACT = cell("1 + 1", result("2"))
TIMED = cell("duree()", printed("3,2 s"), tags=("nbval-ignore-output",))
CHECK = cell("assert duree() > 0")
FAILED = v4.new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])
RAISES = cell("1", printed("vu\u00a0: True"), tags=("raises-exception",))


# --- Les vrais carnets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(LESSONS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_lesson_follows_the_rules(path: Path) -> None:
    content = path.read_text(encoding="utf-8")
    lesson = nbformat.reads(content, as_version=4)
    nbformat.validate(lesson)
    assert notebooks.code_cells(lesson)
    assert list(notebooks.violations(lesson)) == []
    assert content == nbformat.writes(lesson) + "\n", "écrit autrement que « make lessons » ne l’écrit"


@pytest.mark.parametrize("path", sorted(LESSONS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_first_cell_brings_the_course_from_the_address_of_pyproject(path: Path) -> None:
    project = tomllib.loads((LESSONS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first = notebooks.code_cells(nbformat.read(path, as_version=4))[0].source
    assert f'"{project["urls"]["Repository"]}"' in first and "git clone" in first
    assert "--no-deps" in first and "google.colab" in first


def test_there_are_lessons() -> None:
    assert list(LESSONS.glob("*.ipynb"))


# --- Les règles, sur de petits carnets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "cells",
    [
        (FACT,),
        (FACT, FACT, FACT, FACT, TIMED, CHECK),
        (cell("import json\nfrom llama import lesson\nimport torch.nn as nn"), FACT),
        (cell("%pip --version\n!true\nx = 1"),),
        (cell("\n".join(f"x{i} = {i}" for i in range(40))),),
        (cell("trace()", drawn(png()), tags=("nbval-ignore-output",)), CHECK),
    ],
)
def test_sound_notebook_passes(cells: tuple[NotebookNode, ...]) -> None:
    assert list(notebooks.violations(notebook(*cells))) == []


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((FACT, cell("2 + 2", count=None)), "cellule de code 1\u00a0: jamais exécutée"),
        ((cell("1 / 0", FAILED),), "une erreur est restée"),
        ((cell("\n".join(f"x{i} = {i}" for i in range(41))),), "41 lignes, 40 au plus"),
        ((cell("import chromium"),), "importe «\u00a0chromium\u00a0»"),
        ((cell("def f():\n    from .voisin import g"),), "importe «\u00a0.voisin\u00a0»"),
        ((*[FACT] * 4, TIMED), "n’affirme rien"),
        ((*[FACT] * 4, TIMED, FACT), "n’affirme rien"),
        ((*[FACT] * 4, TIMED, cell("'assert'", result("'assert'"))), "n’affirme rien"),
        ((*[FACT] * 4, TIMED, cell("assert True", tags=("nbval-skip",)), CHECK), "n’affirme rien"),
        ((FACT, FACT, FACT, TIMED, CHECK), "comparées\u00a0: 3 sur 4"),
        ((*[FACT] * 3, RAISES, CHECK), "comparées\u00a0: 3 sur 4"),
        ((*[FACT] * 3, cell("# NBVAL_IGNORE_OUTPUT\n1", result("1")), CHECK), "comparées\u00a0: 3 sur 4"),
        ((*[FACT] * 3, cell("# NBVAL_SKIP\n1", result("1")), CHECK), "comparées\u00a0: 3 sur 4"),
        ((*[FACT] * 3, cell("1", printed("iVBORw0KGgo 12"))), "comparées\u00a0: 3 sur 4"),
    ],
)  # fmt: skip
def test_faulty_notebook_is_named(cells: tuple[NotebookNode, ...], expected: str) -> None:
    found = list(notebooks.violations(notebook(*cells)))
    assert len(found) == 1 and expected in found[0], found


def test_edited_source_is_stale() -> None:
    edited = notebook(FACT, CHECK)
    edited.cells[1].source = "1 + 2"
    assert "make lessons" in "".join(notebooks.violations(edited))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ((result("2"),), True),
        ((result("True"),), True),
        ((printed("égaux\u00a0: oui"),), True),
        ((printed("aucun nombre"),), False),
        ((printed("3 avertissements", name="stderr"),), False),
        ((drawn(png(), "<Figure size 640x480 with 1 Axes>"),), False),
        ((drawn(png()), printed("3 courbes")), True),
        ((result("x = 1", **{"text/markdown": "```python\nx = 1\n```"}),), False),
        ((result("tableau 3", **{"text/html": "<table>3</table>"}),), True),
        ((), False),
    ],
)
def test_computed_value(outputs: tuple[NotebookNode, ...], expected: bool) -> None:
    assert notebooks.computes(cell("f()", *outputs)) is expected


def test_sanitizing_drops_images_and_nothing_else() -> None:
    text = "perte : 2,31 nats ; 12 347 jetons ; <llama.Config object at 0x7f> é\n"
    assert notebooks.sanitize(text) == text
    assert notebooks.sanitize(png("a")) == notebooks.sanitize(png("b"))
    assert notebooks.sanitize("<?xml?>\n<svg>1</svg>") == notebooks.sanitize("<?xml?>\n<svg>2</svg>")


# --- Ne réécrire que ce qui a changé ------------------------------------------------------------------------


def rerun(old: NotebookNode, *outputs: NotebookNode) -> tuple[int, list[NotebookNode]]:
    """Rejoue `old` en donnant une nouvelle sortie à chaque cellule ; rend ce que garde `keep_unchanged`."""
    new = copy.deepcopy(old)
    for number, (made, output) in enumerate(zip(notebooks.code_cells(new), outputs, strict=True), start=1):
        made.outputs, made.execution_count = [output], number
    changed = notebooks.keep_unchanged(old, new)
    return changed, [made.outputs[0] for made in notebooks.code_cells(new)]


def test_same_facts_keep_even_the_timings() -> None:
    old = notebook(FACT, TIMED)
    changed, outputs = rerun(old, result("2"), printed("9,9 s"))
    assert changed == 0
    assert outputs[1] == printed("3,2 s")


def test_changed_fact_is_rewritten_with_the_timings() -> None:
    old = notebook(FACT, cell("0", result("0")), TIMED)
    changed, outputs = rerun(old, result("3"), result("0"), printed("9,9 s"))
    assert changed == 2
    assert [outputs[0].data, outputs[2].text] == [result("3").data, "9,9 s"]
    assert outputs[1].execution_count == 2  # gardée, sous le numéro de la nouvelle exécution


def test_timing_never_run_or_edited_is_rewritten() -> None:
    unrun = notebook(FACT, cell("duree()", tags=("nbval-ignore-output",), count=None))
    assert rerun(unrun, result("2"), printed("9,9 s"))[1][1] == printed("9,9 s")
    edited = notebook(FACT, TIMED)
    edited.cells[2].source = "duree(2)"
    assert rerun(edited, result("2"), printed("9,9 s"))[1][1] == printed("9,9 s")


def test_images_compare_by_their_pixels() -> None:
    assert notebooks.same_image(png("12 %"), png("12 %", shade=250))
    assert not notebooks.same_image(png("12 %"), png("13 %"))
    old = notebook(cell("trace()", drawn(png("12 %"))))
    assert rerun(old, drawn(png("12 %", shade=250)))[1] == [drawn(png("12 %"))]
    assert rerun(old, drawn(png("13 %")))[1] == [drawn(png("13 %"))]


def test_metadata_count_as_a_change() -> None:
    """Le texte de remplacement d’une figure n’est que dans les métadonnées."""
    described = drawn(png())
    described.metadata["scrapbook"] = {"alt": "une courbe qui descend"}
    assert rerun(notebook(cell("trace()", drawn(png()))), described)[1] == [described]


def test_execute_writes_once_then_leaves_the_file_alone(tmp_path: Path) -> None:
    """Un vrai noyau : la première exécution écrit, la seconde ne touche à rien, une erreur non plus."""
    path = tmp_path / "essai.ipynb"
    timed = cell("import time; time.perf_counter()", tags=("nbval-ignore-output",), count=None)
    made = notebook(cell("print('a')\n1 + 1", count=None), timed, cell("assert True", count=None))
    nbformat.write(made, path)
    assert notebooks.execute(path) == 3
    first = path.read_bytes()
    assert list(notebooks.violations(nbformat.read(path, as_version=4))) == [
        "cellules comparées\u00a0: 1 sur 2 qui calculent, moins de 80\u00a0%"
    ]
    assert notebooks.execute(path) == 0
    assert path.read_bytes() == first

    broken = nbformat.read(path, as_version=4)
    broken.cells[1].source = "1 / 0"
    nbformat.write(broken, path)
    before = path.read_bytes()
    with pytest.raises(notebooks.CellExecutionError):
        notebooks.execute(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
