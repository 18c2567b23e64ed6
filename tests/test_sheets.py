"""`sheets` : chaque source, en tout petit, donne ses documents et ses questions."""

import json
from datetime import UTC, datetime

import pytest

from llama import sheets
from llama.sheets import Document


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path.parent


def test_contributions(tmp_path):
    def entry(index, title, markdown, *conventions):
        return {
            "index": index,
            "title": title,
            "answers": {
                "generic": {"markdown": markdown},
                "conventions": [{"idcc": idcc, "markdown": text} for idcc, text in conventions],
            },
        }

    folder = write(
        tmp_path / "contributions.json",
        [
            entry(1, "Préavis\u00a0? ", "Un **mois**.", ("0016", "Deux mois."), ("0044", "Trois mois.")),
            entry(2, "Essai ?", '<Content href="x"></Content>\n\nVoir la fiche.'),
            entry(
                3, "Durée ?", 'Selon.\n\n<Tab title="CDI">\n\nLongue.\n\n</Tab>\n<Content href="x"></Content>'
            ),
        ],
    )
    documents = list(sheets.DOCUMENTS["contributions"](folder))
    assert [document.id for document in documents] == ["1", "2", "3", "1-0016", "1-0044"]
    assert documents[0] == Document("1", "Préavis\u00a0?", "Un mois.", "droit du travail")
    assert documents[3].theme == "convention collective 0016"
    questions = list(sheets.QUESTIONS["contributions"](folder))
    assert [question["question"] for question in questions] == ["Préavis\u00a0?", "Durée ?"]
    assert questions[1]["réponse"] == "Selon.\n\nCDI\nLongue."


def test_labour_sheets(tmp_path):
    def section(title, html):
        return {"title": title, "anchor": "ici", "html": html}

    folder = write(
        tmp_path / "fiches-travail.json",
        [
            {
                "pubId": "article1",
                "title": "Le CDI",
                "url": "https://exemple.fr/cdi",
                "intro": "<p>En bref.</p>",
                "sections": [
                    section("Le CDI", "<p>Définition.</p>"),
                    section(
                        "Qui signe ?",
                        "<p>Les deux.</p><h3>À lire sur ce site</h3><p>Un renvoi.</p><h3>Où</h3><p>Ici.</p>",
                    ),
                    section("Textes de référence", "<p>Article L. 1</p><h3>Suite</h3><p>Article L. 2</p>"),
                    section("Qui contacter ?", "<p>La mairie.</p>"),
                ],
            }
        ],
    )
    (document,) = sheets.DOCUMENTS["fiches-travail"](folder)
    assert document.text == "En bref.\nDéfinition.\n\nQui signe ?\nLes deux.\n\nOù\nIci."
    assert document.url == "https://exemple.fr/cdi"
    assert list(sheets.QUESTIONS["fiches-travail"](folder)) == [
        {
            "question": "Qui signe ?",
            "réponse": "Les deux.\n\nOù\nIci.",
            "thème": "Le CDI",
            "url": "https://exemple.fr/cdi#ici",
        }
    ]


def test_public_sheets(tmp_path):
    def sheet(path, kind, title, text):
        def element(name, *children):
            return {"type": "element", "name": name, "children": list(children)}

        def leaf(name, value):
            return element(name, {"type": "text", "text": value})

        write(
            tmp_path / path,
            {
                "children": [
                    {
                        "type": "element",
                        "name": "Publication",
                        "attributes": {"type": kind},
                        "children": [
                            leaf("dc:title", title),
                            leaf("dc:subject", "Travail"),
                            leaf("SurTitre", "Fiche"),
                            element("Texte", leaf("Paragraphe", text)),
                            element("Definition", leaf("Paragraphe", "non")),
                        ],
                    }
                ]
            },
        )

    sheet("professionnels/F1.json", "Fiche Question-réponse conditionnée", "Peut-on ?", "Oui.")
    sheet("particuliers/F20.json", "Fiche d'information", "Le congé", "Cinq semaines.")
    sheet("particuliers/F3.json", "Fiche Question-réponse", "Doit-on ?", "Non.")
    documents = list(sheets.DOCUMENTS["fiches-service-public"](tmp_path))
    assert [document.id for document in documents] == [
        "particuliers/F20",
        "particuliers/F3",
        "professionnels/F1",
    ]
    assert documents[0] == Document(
        "particuliers/F20",
        "Le congé",
        "Cinq semaines.",
        "Travail",
        "https://www.service-public.fr/particuliers/vosdroits/F20",
    )
    questions = list(sheets.QUESTIONS["fiches-service-public"](tmp_path))
    assert [(question["question"], question["réponse"]) for question in questions] == [
        ("Doit-on ?", "Non."),
        ("Peut-on ?", "Oui."),
    ]


def test_legal_articles_in_force(tmp_path):
    def day(year):
        return int(datetime(year, 1, 1, tzinfo=UTC).timestamp() * 1000)

    def article(number, start, end, html="<p>Texte.</p>"):
        return {
            "type": "article",
            "data": {
                "id": f"LEGIARTI{number}",
                "num": number,
                "texteHtml": html,
                "dateDebut": day(start),
                "dateFin": day(end),
            },
        }

    folder = write(
        tmp_path / "LEGITEXT1.json",
        {
            "type": "code",
            "data": {"title": "Code du travail ", "dateDebutVersion": "2026-03-27"},
            "children": [
                {
                    "type": "section",
                    "data": {"title": "Livre I  "},
                    "children": [
                        article("L1", 2008, 2999, "<p>Un <a href='x'>renvoi</a>.</p><p></p>Deux."),
                        article("L2", 2008, 2020),
                        article("L3", 2030, 2999),
                        article("", 2008, 2999),
                    ],
                },
                article("L4", 2026, 2027),
            ],
        },
    )
    first, last = sheets.DOCUMENTS["legi-data"](folder)
    assert (first.title, first.text, first.theme) == (
        "Article L1 du Code du travail",
        "Un renvoi.\nDeux.",
        "Livre I",
    )
    assert first.url.endswith("/LEGIARTIL1") and last.title == "Article L4 du Code du travail"


def test_workshop(tmp_path):
    def lines(name, *rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")

    asked = {"question": "Peut-on\u2028?", "réponse": "Oui.", "thème": "congés", "articles": ["L1221-1"]}
    lines("travail.jsonl", asked)
    lines("quotidien.jsonl", {"question": "Quand ?", "réponse": "Demain.", "thème": "temps", "articles": []})
    lines("textes.jsonl", {"titre": "Conte", "texte": "Il était une fois.", "thème": "conte"})
    assert [question["thème"] for question in sheets.QUESTIONS["atelier"](tmp_path)] == ["congés", "temps"]
    assert next(iter(sheets.QUESTIONS["atelier"](tmp_path))) == asked
    assert [document.id for document in sheets.DOCUMENTS["atelier"](tmp_path)] == [
        "textes/1",
        "questions/1",
        "questions/2",
    ]


@pytest.mark.parametrize(
    "entries, kept",
    [
        (
            [
                Document("1", "a", "x"),
                Document("2", "a", "x"),
                Document("3", "c", ""),
                Document("4", "d", "x"),
            ],
            ["1", "4"],
        ),
        (
            [
                {"question": "q", "réponse": "a"},
                {"question": "r", "réponse": "a"},
                {"question": "q", "réponse": "a"},
                {"question": "s", "réponse": ""},
            ],
            ["q", "r"],
        ),
    ],
)
def test_distinct(entries, kept):
    assert [row.get("id") or row["question"] for row in sheets.distinct(entries)] == kept
