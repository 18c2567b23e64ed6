"""Le corpus du cours, et ce que nul modèle du cours n’apprend : des fiches entières, et leurs questions.

Les sources se recoupent : la même fiche paraît sous deux publics, le même sujet dans trois recueils. Le partage
se fait donc par titre, puis tout ce qui traite d’un sujet réservé ou ressemble à une fiche réservée est ôté de
l’apprentissage. Il ne dépend que des textes : ni graine, ni liste à tenir. Les questions de l’examen qu’on en
tire sont l’affaire d’`examination`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import NamedTuple

from llama import duplicates, markup, sheets, sources
from llama.duplicates import deduplicate, leaks
from llama.sheets import Document, Question

SHEETS = ("fiches-travail", "fiches-service-public", "contributions")
LABOUR_LAW, OTHERS = 4, 20
"""Une fiche réservée sur 4 en droit du travail, sur 20 ailleurs."""
SAME_SUBJECT = 0.5
"""Part des mots pleins que deux titres partagent quand ils traitent du même sujet (indice de Jaccard)."""
_EMPTY = frozenset(
    "le la les un une des du de d l à a au aux en et ou dans par pour sur avec son sa ses est sont il elle on que qui "
    "quoi quel quelle quels quelles quand comment combien peut doit être cas c s qu n ne pas plus se ce cette ces y "
    "lors fait faire avoir t droit droits salarié salariés employeur travail contrat question réponse questions "
    "réponses".split()
)


class Partition(NamedTuple):
    """Le partage : documents à apprendre, fiches réservées, dont `subjects`, les titres de droit du travail."""

    train: list[Document]
    held_out: list[Document]
    subjects: frozenset[str]


@functools.cache
def partition() -> Partition:
    """Partage les fiches, les contributions et le Code du travail ; dix secondes, puis gardé dans le cache.

    Raises:
        LlamaError: une source ne s’obtient pas (`sources.fetch`).
    """
    versions = "-".join(sources.CATALOGUE[name].version for name in (*SHEETS, "legi-data"))
    rows = sources.kept(f"cours-{versions}", (markup, sheets, duplicates, sys.modules[__name__]), _rows)
    parts: dict[str, list] = {name: [] for name in Partition._fields}
    for row in rows:
        parts[row["part"]].append(row["subject"] if row["part"] == "subjects" else Document(**row["document"]))
    return Partition(parts["train"], parts["held_out"], frozenset(parts["subjects"]))


def _rows() -> Iterator[dict]:
    train, held_out, subjects = _partition()
    for part, documents in (("train", train), ("held_out", held_out)):
        yield from ({"part": part, "document": asdict(document)} for document in documents)
    yield from ({"part": "subjects", "subject": subject} for subject in sorted(subjects))


def _partition() -> Partition:
    everything = [(_labour(name, sheet), sheet) for name in SHEETS for sheet in sources.documents(name)]
    reserved = {sheet.title for labour, sheet in everything if _drawn(sheet.title, LABOUR_LAW if labour else OTHERS)}
    subjects = frozenset(sheet.title for labour, sheet in everything if labour and sheet.title in reserved)
    related = _same_subject([sheet.title for _, sheet in everything], subjects)
    held_out = [sheet for _, sheet in everything if sheet.title in reserved]  # contributions comprises
    train = [sheet for _, sheet in everything if sheet.title not in reserved and sheet.title not in related]
    train += sources.legal_articles().values()
    leaked = {i for i, _, _ in leaks([text_of(d) for d in train], [text_of(d) for d in held_out])}
    train = [document for i, document in enumerate(train) if i not in leaked]
    answers = {document.id for document in sources.documents("contributions")}
    return Partition(_distinct(train), _distinct([d for d in held_out if d.id not in answers]), subjects)


def questions() -> tuple[list[Question], list[Question]]:
    """Les questions à apprendre, et celles des sujets de droit du travail réservés, dont se fait l’examen.

    Celles des autres fiches réservées, ou trop proches d’elles, ne sont d’aucun côté. Une question qui est le titre
    d’une section dit d’abord le sujet de sa fiche : « La sanction disciplinaire : quelle est la procédure ? ».
    """
    parts = partition()
    learnt = {document.title for document in parts.train}
    rows = [(row["question"], row) for name in SHEETS[1:] for row in sources.questions(name)]
    for row in sources.questions("fiches-travail"):
        title, question = row["thème"], row["question"]
        rows.append((title, row | {"question": f"{title}\u00a0: {question[0].lower()}{question[1:]}"}))
    return ([row for title, row in rows if title in learnt], [row for title, row in rows if title in parts.subjects])


def text_of(document: Document) -> str:
    """Le titre, puis le texte : ce que lit un modèle."""
    return f"{document.title}\n{document.text}"


def _labour(name: str, sheet: Document) -> bool:
    return name != "fiches-service-public" or "Travail" in sheet.theme


def _drawn(title: str, one_in: int) -> bool:
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8]) % one_in == 0


def _distinct(documents: list[Document]) -> list[Document]:
    return [documents[i] for i in deduplicate([text_of(document) for document in documents])]


def _same_subject(titles: Iterable[str], subjects: Iterable[str]) -> set[str]:
    """Les titres dont les mots pleins sont, pour moitié au moins, ceux d’un sujet."""
    words = {title: _words(title) for title in {*titles, *subjects}}
    containing: dict[str, set[str]] = defaultdict(set)  # mot → sujets qui l’ont
    for subject in subjects:
        for word in words[subject]:
            containing[word].add(subject)
    return {
        title for title in words
        if any(len(words[title] & words[subject]) >= SAME_SUBJECT * len(words[title] | words[subject])
               for subject in set().union(*(containing[word] for word in words[title])))
    }


def _words(title: str) -> frozenset[str]:
    """Les mots pleins d’un titre, sans leurs terminaisons : `"Les congés payés"` → `{"congé", "payé"}`."""
    found = re.findall(r"\w+", title.lower())
    return frozenset(word.rstrip("s")[:7] for word in found if len(word) > 2 and word not in _EMPTY)
