"""Le corpus `atelier` : sa forme, sa typographie, ce qui s’y répète, et les articles de loi qu’il cite."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from llama.data import near_duplicates
from llama.sources import ATELIER, fetch

QUESTION = {"question": str, "réponse": str, "thème": str, "articles": list}
TEXT = {"titre": str, "texte": str, "thème": str}
FILES = {"travail": QUESTION, "quotidien": QUESTION, "textes": TEXT}
CODE = "LEGITEXT000006072050.json"  # le Code du travail

MAX_SIMILARITY = 0.5  # indice de Jaccard des suites de 5 mots : au-delà, deux textes sont quasi identiques
MAX_NEAR_DUPLICATES = 0
OPENING = 4  # mots ; une amorce partagée avec plus de MAX_SHARED autres lignes sent le gabarit
MAX_SHARED = 2
MAX_TEMPLATE_RATE = 0.02

NBSP = "\u00a0"
FAULTS = {
    "apostrophe droite": re.compile(r"'"),
    "guillemet droit": re.compile(r'"'),
    "ponctuation double sans espace insécable": re.compile(rf"(?<![{NBSP}?!])[;:!?»]"),
    "guillemet ouvrant sans espace insécable": re.compile(rf"«(?!{NBSP})"),
    "unité sans espace insécable": re.compile(r"\d ?[%€]"),
    "espaces de trop": re.compile(r"^\s|\s$|  | [.,…)]|\( "),
    "points de suspension": re.compile(r"\.\.\."),
    "ligature": re.compile(r"\b([cs]oeur|oeuvre|oeil|main-d’oeuvre|voeu)", re.IGNORECASE),
    "capitale sans accent": re.compile(r"\b(Etat|Ecri|Etre|Etudi|Egal|A (la|l’|quel|partir|quoi|qui)\b)"),
}


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ATELIER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


README = (ATELIER / "README.md").read_text(encoding="utf-8").splitlines()
CORPUS = {name: read(name) for name in FILES}
ENTRIES = CORPUS["travail"] + CORPUS["quotidien"]
QUESTIONS = [entry["question"] for entry in ENTRIES]
ANSWERS = [entry["réponse"] for entry in ENTRIES]
TEXTS = [entry["texte"] for entry in CORPUS["textes"]]


def words(text: str) -> list[str]:
    """`words("Qu’est-ce que c’est ?")` donne `["qu’est-ce", "que", "c’est"]`."""
    return re.findall(r"[\w’-]+", text.lower())


def template_rate(texts: list[str]) -> float:
    """La part des textes dont les premiers mots ouvrent aussi plus de `MAX_SHARED` autres textes."""
    openings = [tuple(words(text)[:OPENING]) for text in texts]
    counts = Counter(openings)
    return sum(counts[opening] - 1 > MAX_SHARED for opening in openings) / len(openings)


def faults(text: str) -> set[str]:
    return {name for name, pattern in FAULTS.items() if pattern.search(text)}


def cited(answer: str) -> list[str]:
    """Les articles qu’une réponse nomme, dans l’ordre : « L. 1221-1 » devient `"L1221-1"`."""
    found = re.findall(rf"\b([LRD])\.{NBSP}(\d+(?:-\d+)*)", answer)
    return list(dict.fromkeys(letter + number for letter, number in found))


def sentences(text: str) -> int:
    return len(re.findall(rf"(?<!\b[LRD])[.!?…](?=\s(?![{NBSP}»])|$)", text))


@pytest.mark.parametrize("name", FILES)
def test_schema(name):
    """Un objet par ligne, exactement les champs annoncés, aucun vide, et les accents écrits tels quels."""
    lines = (ATELIER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for line, entry in zip(lines, CORPUS[name], strict=True):
        assert {key: type(value) for key, value in entry.items()} == FILES[name], line
        assert line == json.dumps(entry, ensure_ascii=False)
        assert all(value.strip() for value in entry.values() if isinstance(value, str)), line


def test_size():
    assert len(CORPUS["travail"]) >= 180
    assert len(ENTRIES) >= 300
    assert len(TEXTS) >= 60
    assert sum(bool(entry["articles"]) for entry in CORPUS["travail"]) >= 80


@pytest.mark.parametrize("texts", [QUESTIONS, ANSWERS, TEXTS, [entry["titre"] for entry in CORPUS["textes"]]],
                         ids=["questions", "réponses", "textes", "titres"])
def test_nothing_twice(texts):
    repeated = [text for text, count in Counter(" ".join(words(text)) for text in texts).items() if count > 1]
    assert repeated == []


def test_every_question_asks():
    assert [question for question in QUESTIONS if not re.search(r"[?.!…»]$", question)] == []


def test_labour_answers_are_short():
    """De 25 à 90 mots, en une à quatre phrases : assez pour répondre, assez court pour un petit modèle."""
    sizes = [(len(words(entry["réponse"])), sentences(entry["réponse"]), entry["question"])
             for entry in CORPUS["travail"]]
    assert [size for size in sizes if not (25 <= size[0] <= 90 and 1 <= size[1] <= 4)] == []


@pytest.mark.parametrize("name", FILES)
def test_typography(name):
    found = [(faults(value), value) for entry in CORPUS[name] for value in entry.values()
             if isinstance(value, str) and faults(value)]
    assert found == []


@pytest.mark.parametrize("text, fault", [
    ("L'essai", "apostrophe droite"),
    ('Un "essai"', "guillemet droit"),
    ("Pourquoi ?", "ponctuation double sans espace insécable"),
    ("Pourquoi?", "ponctuation double sans espace insécable"),
    (f"«{NBSP}Oui »", "ponctuation double sans espace insécable"),
    (f"« Oui{NBSP}»", "guillemet ouvrant sans espace insécable"),
    ("25 %", "unité sans espace insécable"),
    ("Deux  espaces", "espaces de trop"),
    ("Etat", "capitale sans accent"),
])
def test_typography_check_sees_faults(text, fault):
    assert faults(text) == {fault}


def test_articles_are_those_of_the_answer():
    """Le champ `articles` est ce que la réponse cite, rien d’autre, et elle dit de quel code il s’agit."""
    for entry in ENTRIES:
        articles, question = entry["articles"], entry["question"]
        assert articles == cited(entry["réponse"]), question
        assert not articles or "Code du travail" in entry["réponse"], question
        assert all(re.fullmatch(r"[LRD]\d{4}(-\d+)*", article) for article in articles), question


@pytest.mark.parametrize("texts", [ANSWERS, TEXTS], ids=["réponses", "textes"])
def test_no_near_duplicates(texts):
    assert len(near_duplicates(texts, n=5, threshold=MAX_SIMILARITY)) <= MAX_NEAR_DUPLICATES


def test_near_duplicates_would_be_seen():
    """Une réponse recopiée à un mot près est trouvée, et elle seule."""
    copy = ANSWERS[0].replace("oralement", "verbalement")
    (first, second, similarity), = near_duplicates([*ANSWERS, copy], n=5, threshold=MAX_SIMILARITY)
    assert copy != ANSWERS[0]
    assert (first, second) == (0, len(ANSWERS))
    assert MAX_SIMILARITY <= similarity < 1


@pytest.mark.parametrize("texts", [QUESTIONS, ANSWERS, TEXTS], ids=["questions", "réponses", "textes"])
def test_few_templates(texts):
    assert template_rate(texts) <= MAX_TEMPLATE_RATE


def test_template_rate_would_be_seen():
    pattern = [f"Quelle est la durée du congé numéro {i} ?" for i in range(4)]
    assert template_rate([*pattern, "Combien dure le préavis ?"]) == 0.8
    assert template_rate(pattern[:3]) == 0


def test_readme_gives_these_measures():
    """Le tableau de README.md est celui que l’on mesure ; s’il est périmé, le message en donne les lignes."""
    measures = {
        "questions avec réponse": len(ENTRIES),
        "dont droit du travail": len(CORPUS["travail"]),
        "dont français de tous les jours": len(CORPUS["quotidien"]),
        "textes courts": len(TEXTS),
        "réponses qui citent le Code du travail": sum(bool(entry["articles"]) for entry in ENTRIES),
        "articles de loi distincts": len({article for entry in ENTRIES for article in entry["articles"]}),
        "paires de réponses quasi identiques": len(near_duplicates(ANSWERS, n=5, threshold=MAX_SIMILARITY)),
        "paires de textes quasi identiques": len(near_duplicates(TEXTS, n=5, threshold=MAX_SIMILARITY)),
        "questions à l’amorce répétée": f"{template_rate(QUESTIONS):.1%}",
        "réponses à l’amorce répétée": f"{template_rate(ANSWERS):.1%}",
    }
    rows = [f"| {label} | {value} |" for label, value in measures.items()]
    rows = [row.replace(".", ",").replace("%", f"{NBSP}%") for row in rows]
    assert set(rows) <= set(README), "\n".join(rows)


def articles_of(node: dict) -> Iterator[dict]:
    """Les articles d’un code, en descendant ses parties, livres, titres et chapitres."""
    if node["type"] == "article":
        yield node["data"]
    for child in node.get("children", ()):
        yield from articles_of(child)


@pytest.mark.reseau
def test_cited_articles_are_in_force():
    """Chaque article cité existe dans le Code du travail et y est en vigueur, à la date de README.md."""
    code = json.loads(next(fetch("legi-data").rglob(CODE)).read_text(encoding="utf-8"))
    in_force = {article["num"] for article in articles_of(code) if article["etat"] == "VIGUEUR"}
    assert "L1221-1" in in_force and "L9999-1" not in in_force
    missing = {(article, entry["question"]) for entry in ENTRIES for article in entry["articles"]
               if article not in in_force}
    assert missing == set()
    version = f"| version du Code du travail | {code['data']['dateDebutVersion']} |"
    assert version in README
