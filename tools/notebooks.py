"""Les carnets du cours : les réexécuter sur place, et vérifier les règles qu’ils suivent.

    python tools/notebooks.py lessons/04_preentrainement.ipynb …

Une sortie n’est réécrite que si elle a changé : relancer un carnet dont rien n’a bougé laisse le fichier
intact. Les règles (`violations`) sont celles que `tests/test_notebooks.py` impose ; comparer les sorties est
l’affaire de nbval, dont ce module reprend les marques et le fichier de nettoyage.
"""

from __future__ import annotations

import ast
import base64
import copy
import functools
import hashlib
import importlib.metadata
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbval.plugin import find_comment_markers, find_metadata_tags, get_sanitize_patterns

SANITIZE = Path(__file__).parents[1] / "tests" / "nbval_sanitize.cfg"
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_TIMEOUT = 300  # secondes
MAX_LINES = 40
MIN_COMPARED = 0.8
PIXEL_TOLERANCE = 8  # sur 255 : ce qu’un lissage de courbe change d’une machine à l’autre
VALUE = re.compile(r"\d|\b(True|False|oui|non)\b")


# --- Réexécuter ---------------------------------------------------------------------------------------------


def execute(path: Path) -> int:
    """Réexécute un carnet sur place et rend le nombre de cellules dont les sorties ont été réécrites.

    Raises:
        CellExecutionError: une cellule échoue ; le fichier reste tel qu’il était.
    """
    before = path.read_text(encoding="utf-8")
    old = nbformat.reads(before, as_version=4)
    new = copy.deepcopy(old)
    NotebookClient(
        new,
        timeout=CELL_TIMEOUT,
        kernel_name=KERNELSPEC["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    changed = keep_unchanged(old, new)
    new.metadata = {**old.metadata, "kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    new.metadata["sources"] = source_digest(new)
    after = nbformat.writes(new) + "\n"
    if after != before:
        partial = path.with_suffix(".partiel")
        partial.write_text(after, encoding="utf-8")
        os.replace(partial, path)
    return changed


def keep_unchanged(old: NotebookNode, new: NotebookNode) -> int:
    """Remet dans `new` les sorties de `old` qui disent la même chose ; rend le nombre de cellules réécrites.

    Une sortie que nbval ne compare pas (une durée, par exemple) n’est jamais deux fois la même : elle n’est
    remplacée que si un fait comparé, ou le code, a changé depuis la dernière exécution.
    """
    pairs = list(zip(code_cells(old), code_cells(new), strict=True))
    same = [same_outputs(a.outputs, b.outputs) and a.execution_count is not None for a, b in pairs]
    facts_hold = old.metadata.get("sources") == source_digest(new) and all(
        equal or not is_compared(cell) and cell.execution_count is not None
        for equal, (cell, _) in zip(same, pairs, strict=True)
    )
    for equal, (a, b) in zip(same, pairs, strict=True):
        if equal or facts_hold:
            b.outputs = a.outputs
            for output in b.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = b.execution_count
    return 0 if facts_hold else same.count(False)


def same_outputs(old: list[NotebookNode], new: list[NotebookNode]) -> bool:
    """Compare deux listes de sorties : textes nettoyés, métadonnées, images à une nuance près."""
    return len(old) == len(new) and all(_same_output(a, b) for a, b in zip(old, new, strict=True))


def _same_output(a: NotebookNode, b: NotebookNode) -> bool:
    for key in ("output_type", "name", "metadata", "ename", "evalue"):
        if a.get(key) != b.get(key):
            return False
    if sanitize(a.get("text", "")) != sanitize(b.get("text", "")):
        return False
    first, second = a.get("data", {}), b.get("data", {})
    return first.keys() == second.keys() and all(
        same_image(first[mime], second[mime]) if mime == "image/png" else first[mime] == second[mime]
        for mime in first
    )


def same_image(a: str, b: str) -> bool:
    """Compare deux PNG en base64, pixel à pixel, à `PIXEL_TOLERANCE` près."""
    if a == b:
        return True
    from PIL import Image, ImageChops

    one, two = (Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA") for text in (a, b))
    if one.size != two.size:
        return False
    return max(high for _, high in ImageChops.difference(one, two).getextrema()) <= PIXEL_TOLERANCE


def source_digest(notebook: NotebookNode) -> str:
    """Résume le code d’un carnet : ce dont ses sorties ont été tirées."""
    sources = "\0".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


# --- Vérifier -----------------------------------------------------------------------------------------------


def violations(notebook: NotebookNode) -> Iterator[str]:
    """Énumère les règles du cours qu’un carnet enfreint, une ligne chacune."""
    cells = code_cells(notebook)
    trees = [_parse(cell.source) for cell in cells]
    for number, (cell, tree) in enumerate(zip(cells, trees, strict=True)):
        where = f"cellule de code {number}"
        if cell.execution_count is None:
            yield f"{where} : jamais exécutée, donc jamais comparée"
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"{where} : une erreur est restée dans ses sorties"
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            yield f"{where} : {lines} lignes, {MAX_LINES} au plus"
        for module in _imports(tree):
            if not _is_published(module):
                yield f"{where} : importe « {module} », qui n’est ni llama ni une bibliothèque publiée"
        following = number + 1 < len(cells) and not _options(cells[number + 1]).get("skip")
        if not is_compared(cell) and not (following and _asserts(trees[number + 1])):
            yield f"{where} : sortie non comparée, et la cellule suivante n’affirme rien (assert)"
    computed = [cell for cell in cells if computes(cell)]
    compared = sum(is_compared(cell) and computes(cell, cleaned=True) for cell in computed)
    if compared < MIN_COMPARED * len(computed):
        share = f"{100 * MIN_COMPARED:.0f} %"
        yield f"cellules comparées : {compared} sur {len(computed)} qui calculent, moins de {share}"
    if notebook.metadata.get("sources") != source_digest(notebook):
        yield "le code a changé depuis la dernière exécution : lancez « make lessons »"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Rend les cellules de code, dans l’ordre ; nbval les numérote de même, à partir de 0."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_compared(cell: NotebookNode) -> bool:
    """nbval compare-t-il la sortie de cette cellule ? Marques et commentaires sont lus par nbval lui-même."""
    options = _options(cell)
    return options.get("check", True) and not options.get("skip") and not options.get("check_exception")


def computes(cell: NotebookNode, cleaned: bool = False) -> bool:
    """La sortie montre-t-elle une valeur calculée : un chiffre ou un booléen, hors images et code montré ?

    Args:
        cell: cellule de code, exécutée.
        cleaned: ne regarder que ce que le nettoyage de nbval laisse à comparer.
    """
    return any(VALUE.search(sanitize(text) if cleaned else text) for text in _texts(cell))


def sanitize(text: str) -> str:
    """Nettoie un texte comme nbval le fait avant de comparer."""
    for pattern, replacement in _patterns().items():
        text = re.sub(pattern, replacement, text)
    return text


def _texts(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        data = output.get("data", {})
        is_image = any(mime.startswith("image/") for mime in data)
        is_source = data.get("text/markdown", "").startswith("```")
        if output.get("name") == "stdout":
            yield output.text
        elif not is_image and not is_source:
            yield data.get("text/plain", "")


def _options(cell: NotebookNode) -> dict[str, bool]:
    return {**dict(find_metadata_tags(cell.metadata)), **dict(find_comment_markers(cell.source))}


def _asserts(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def _parse(source: str) -> ast.Module:
    """Lit le code d’une cellule, commandes d’IPython comprises (`%pip`, `!ls`)."""
    return ast.parse(TransformerManager().transform_cell(source))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").partition(".")[0]


def _is_published(module: str) -> bool:
    return module == "llama" or module in sys.stdlib_module_names or module in _distributions()


@functools.cache
def _distributions() -> frozenset[str]:
    return frozenset(importlib.metadata.packages_distributions())


@functools.cache
def _patterns() -> dict[str, str]:
    return dict(get_sanitize_patterns(SANITIZE.read_text(encoding="utf-8")))


def main() -> None:
    if not sys.argv[1:]:
        sys.exit("Aucun carnet de ce nom dans lessons/.")
    for name in sys.argv[1:]:
        start = time.monotonic()
        try:
            changed = execute(Path(name))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            sys.exit(f"{name} : une cellule échoue, le fichier reste tel qu’il était.\n{error}")
        print(f"{name} : {time.monotonic() - start:.0f} s, cellules réécrites : {changed}", flush=True)


if __name__ == "__main__":
    main()
