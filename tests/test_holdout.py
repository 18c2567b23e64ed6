"""Le partage du corpus du cours : par sujet, sans recouvrement, toujours le même."""

import pytest

from llama import holdout
from llama.duplicates import leaks
from llama.sheets import Document


def _document(title, text, name="d", theme=""):
    return Document(f"{name}/{title}", title, text, theme)


@pytest.mark.parametrize("title, same", [
    ("Les congés payés", True),
    ("Congés payés du salarié", True),
    ("A-t-on droit à des congés payés pendant un CDD ?", True),
    ("Le congé de paternité", False),
    ("Le permis de conduire", False),
])
def test_titles_of_the_same_subject(title, same):
    assert (title in holdout._same_subject([title], ["Les congés payés"])) is same


@pytest.fixture
def small_sources(monkeypatch):
    """Deux cents fiches de travail, deux cents autres, avec leurs questions ; une fiche est recopiée."""
    word = "abcdefghijklmnopqrst"
    titles = [f"{a}{b}{a}{b} sujet{a}{b}" for a in word for b in word[:10]]
    texts = {title: " ".join(f"{title[:4]}{i}" for i in range(40)) for title in titles}
    labour = [_document(title, texts[title], "t") for title in titles]
    drawn = next(title for title in titles if holdout._drawn(title, holdout.LABOUR_LAW))
    public = [_document(f"autre{title}", texts[title].replace("0", "x0"), "p") for title in titles]
    public.append(_document("copie", texts[drawn], "p"))
    sheets = {"fiches-travail": labour, "fiches-service-public": public, "contributions": []}
    asked = [{"question": "Quelle règle ?", "réponse": "Celle-ci.", "thème": title, "url": ""} for title in titles]
    questions = {"fiches-travail": asked, "fiches-service-public": [], "contributions": []}
    monkeypatch.setattr(holdout.sources, "documents", sheets.__getitem__)
    monkeypatch.setattr(holdout.sources, "questions", questions.__getitem__)
    monkeypatch.setattr(holdout.sources, "legal_articles", dict)
    monkeypatch.setattr(holdout, "partition", holdout._partition)
    return labour, drawn


def test_the_parts_share_neither_title_nor_text(small_sources):
    labour, drawn = small_sources
    parts = holdout.partition()
    train, held_out = ({document.title for document in side} for side in (parts.train, parts.held_out))
    assert not train & held_out and drawn in held_out and "copie" not in train
    assert not leaks([holdout.text_of(d) for d in parts.train], [holdout.text_of(d) for d in parts.held_out])
    assert 0.15 < len(parts.subjects) / len(labour) < 0.35
    assert parts.subjects == {d.title for d in labour} & held_out


def test_questions_follow_their_sheet(small_sources):
    parts = holdout.partition()
    learnt, asked = holdout.questions()
    assert {row["thème"] for row in asked} == parts.subjects
    assert not {row["thème"] for row in learnt} & parts.subjects
    assert all(row["question"] == f"{row['thème']} : quelle règle ?" for row in learnt + asked)


def test_the_partition_is_kept_in_the_cache(small_sources, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    first = list(holdout._rows())
    kept = [holdout.sources.kept("cours", (holdout,), holdout._rows) for _ in range(2)]
    assert kept[0] == kept[1] == first and len(list(tmp_path.rglob("cours-*.jsonl"))) == 1


@pytest.mark.reseau
def test_the_course_never_learns_its_examination():
    parts = holdout.partition()
    learnt, asked = holdout.questions()
    titles = {document.title for document in parts.train}
    assert len(asked) >= 250 and not titles & parts.subjects
    assert not {row["question"] for row in learnt} & {row["question"] for row in asked}
    assert len(parts.train) > 10_000 and len(parts.held_out) > 300
