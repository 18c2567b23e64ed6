"""Ce que contient chaque source : ses documents, et ses questions avec réponses, en texte nu.

Une paire de fonctions par source, du dossier récupéré par `sources.fetch` aux `Document` et aux questions,
dans un ordre qui ne dépend que du dossier. Le balisage est l’affaire de `markup` ; le réseau et le cache,
celle de `sources`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama.markup import Line, compose, html_lines, markdown_lines, tidy, tree_lines

_LINKS = re.compile(  # titres de sections faites de liens ou de renvois, sans phrases
    r"[AÀ] lire|Lire (en|la|le|aussi)|Voir aussi|Services? en ligne|Textes? de référence|Sources? |"
    r"Références |(Pour )?en savoir plus|Articles? associés|Modèles? de|Documents?( à|$)|Télécharge|"
    r"Ressources|Dernières actualités|(Qui|Les) contact|Liens utiles|Sites? (à consulter|internet)|"
    r"Fiches complémentaires",
    re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """Un texte d’une source ; `text` ne répète pas `title`."""

    id: str
    title: str
    text: str
    theme: str = ""
    url: str = ""


Question = dict[str, Any]  # question, réponse, thème, url
LABOUR_LAW = "droit du travail"


def _question(question: str, answer: str, theme: str, url: str) -> Question:
    return {"question": question, "réponse": answer, "thème": theme, "url": url}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def contributions(folder: Path) -> Iterator[Document]:
    """Les réponses générales, puis celles de chaque convention collective, désignée par son numéro (IDCC)."""
    entries = [(str(entry["index"]), tidy(entry["title"]), entry["answers"])
               for entry in _json(folder / "contributions.json")]
    for index, title, answers in entries:
        yield Document(index, title, _answer(answers["generic"]), LABOUR_LAW)
    for index, title, answers in entries:
        for answer in answers["conventions"]:
            idcc = answer["idcc"]
            yield Document(f"{index}-{idcc}", title, _answer(answer), f"convention collective {idcc}")


def contribution_questions(folder: Path) -> Iterator[Question]:
    """Les questions dont la réponse générale est sur place, et non dans une fiche de service-public.fr."""
    for entry in _json(folder / "contributions.json"):
        answer = entry["answers"]["generic"]
        if "<Content" not in answer["markdown"] or "<Tab" in answer["markdown"]:
            yield _question(tidy(entry["title"]), _answer(answer), LABOUR_LAW, "")


def _answer(answer: dict) -> str:
    return compose(markdown_lines(answer["markdown"]))


def labour_sheets(folder: Path) -> Iterator[Document]:
    """Les fiches de travail-emploi.gouv.fr, introduction puis sections."""
    for sheet in _json(folder / "fiches-travail.json"):
        title = tidy(sheet["title"])
        lines = html_lines(sheet["intro"] or "")
        for section in sheet["sections"]:
            heading = tidy(section["title"])
            lines += [(1, heading)] if heading != title else []
            lines += html_lines(section["html"], level=2)
        yield Document(sheet["pubId"], title, compose(_prose(lines)), LABOUR_LAW, sheet["url"])


def labour_questions(folder: Path) -> Iterator[Question]:
    """Les sections dont le titre est une question ; le thème est le titre de la fiche, qui dit de quoi."""
    for sheet in _json(folder / "fiches-travail.json"):
        for section in sheet["sections"]:
            question = tidy(section["title"])
            if question.endswith("?") and not _LINKS.match(question):
                answer = compose(_prose(html_lines(section["html"])))
                yield _question(question, answer, tidy(sheet["title"]), f"{sheet['url']}#{section['anchor']}")


def _prose(lines: Iterable[Line]) -> Iterator[Line]:
    """Sans les sections de liens, sous-titres compris."""
    hidden = 0  # niveau du titre de la section ignorée
    for level, text in lines:
        if level and (not hidden or level <= hidden):
            hidden = level if _LINKS.match(text) else 0
        if not hidden:
            yield level, text


def _public_roots(folder: Path) -> Iterator[tuple[str, dict]]:
    """Chaque fiche de service-public.fr : son identifiant (`"particuliers/F1016"`) et son arbre."""
    for audience in ("particuliers", "professionnels", "associations"):
        for path in sorted((folder / audience).glob("*.json")):
            yield f"{audience}/{path.stem}", _json(path)["children"][0]


def _public_sheet(identifier: str, root: dict) -> Document:
    card = {child["name"]: tidy(child["children"][0]["text"]) for child in root["children"]
            if child["name"] in ("dc:title", "dc:subject")}
    text = compose(line for child in root["children"] for line in tree_lines(child)
                   if child["name"] in ("Introduction", "Texte", "ListeSituations"))
    url = f"https://www.service-public.fr/{identifier.replace('/', '/vosdroits/')}"
    return Document(identifier, card["dc:title"], text, card.get("dc:subject", ""), url)


def public_sheets(folder: Path) -> Iterator[Document]:
    """Les fiches de service-public.fr pour les particuliers, les professionnels et les associations."""
    return (_public_sheet(*sheet) for sheet in _public_roots(folder))


def public_questions(folder: Path) -> Iterator[Question]:
    """Les fiches « Question-réponse »."""
    for identifier, root in _public_roots(folder):
        if root["attributes"]["type"].startswith("Fiche Question-réponse"):
            sheet = _public_sheet(identifier, root)
            yield _question(sheet.title, sheet.text, sheet.theme, sheet.url)


def legal_articles(folder: Path) -> Iterator[Document]:
    """Les articles en vigueur, à la date du paquet, de chaque code ; le thème est leur place dans le code."""
    for path in sorted(folder.glob("LEGITEXT*.json")):
        code = _json(path)
        name = tidy(code["data"]["title"])
        day = datetime.fromisoformat(code["data"]["dateDebutVersion"]).replace(tzinfo=UTC)
        for article, place in _articles(code, ()):
            if article["num"] and article["dateDebut"] <= 1000 * day.timestamp() < article["dateFin"]:
                yield Document(article["id"], f"Article {tidy(article['num'])} du {name}",
                               compose(html_lines(article["texteHtml"] or "")), " > ".join(place),
                               f"https://www.legifrance.gouv.fr/codes/article_lc/{article['id']}")


def _articles(node: dict, place: tuple[str, ...]) -> Iterator[tuple[dict, tuple[str, ...]]]:
    for child in node.get("children", []):
        if child["type"] == "article":
            yield child["data"], place
        else:
            yield from _articles(child, (*place, tidy(child["data"]["title"])))


def workshop(folder: Path) -> Iterator[Document]:
    """Le corpus écrit pour le cours : ses textes, puis ses questions, dont le texte est la réponse."""
    for number, text in enumerate(_rows(folder / "textes.jsonl"), 1):
        yield Document(f"textes/{number}", text["titre"], text["texte"], text["thème"])
    for number, entry in enumerate(workshop_questions(folder), 1):
        yield Document(f"questions/{number}", entry["question"], entry["réponse"], entry["thème"])


def workshop_questions(folder: Path) -> Iterator[Question]:
    """Les questions de droit du travail, avec les articles cités, puis celles de la vie quotidienne."""
    for name in ("travail", "quotidien"):
        yield from _rows(folder / f"{name}.jsonl")


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def distinct(entries: Iterable[Document | Question]) -> Iterator[dict[str, Any]]:
    """Les entrées non vides, chacune une fois, en dictionnaires : une fiche est parfois publiée deux fois."""
    seen = set()
    for entry in entries:
        row = asdict(entry) if isinstance(entry, Document) else entry
        title, text = (row["title"], row["text"]) if "text" in row else (row["question"], row["réponse"])
        if text and (title, text) not in seen:
            seen.add((title, text))
            yield row


DOCUMENTS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "contributions": contributions,
    "fiches-travail": labour_sheets,
    "fiches-service-public": public_sheets,
    "legi-data": legal_articles,
    "atelier": workshop,
}
QUESTIONS: dict[str, Callable[[Path], Iterator[Question]]] = {
    "contributions": contribution_questions,
    "fiches-travail": labour_questions,
    "fiches-service-public": public_questions,
    "atelier": workshop_questions,
}
