"""Les questionnaires : ce qui est mal écrit est refusé par une ligne qui dit où, le reste se lit partout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from sphinx.testing.util import SphinxTestApp

import quiz

ROOT = Path(__file__).parents[1]
QUIZZES = sorted((ROOT / "docs/quiz").glob("*.yaml"))
NBSP = "\u00a0"

RIGHT = {"texte": ":math:`\\ln V`", "juste": True, "explication": "C’est *l’ignorance*."}
WRONG = {"texte": "Zéro & moins", "juste": False, "explication": f"Ce serait la perfection{NBSP}!"}
QUESTION = {"question": "Que vaut la perte ?", "reponses": [WRONG, RIGHT]}


def write(folder: Path, content: object) -> Path:
    path = folder / "essai.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return path


def without(entry: dict, key: str) -> dict:
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize("path", QUIZZES, ids=lambda path: path.stem)
def test_the_course_s_quizzes(path):
    questions = quiz.load(path)
    assert len(questions) >= 8
    positions = {[answer.correct for answer in question.answers].index(True) for question in questions}
    assert len(positions) > 1, "la bonne réponse n’est pas toujours à la même place"
    for question in questions:
        explanations = [answer.explanation for answer in question.answers]
        assert len(set(explanations)) == len(explanations)
        assert min(map(len, explanations)) > 20


def test_each_quiz_has_its_chapter():
    assert QUIZZES
    for path in QUIZZES:
        chapter = ROOT / "docs" / f"{path.stem}.rst"
        assert f".. quiz:: {path.stem}\n" in chapter.read_text(encoding="utf-8")


def test_load(tmp_path):
    [question] = quiz.load(write(tmp_path, [QUESTION]))
    assert question.text == "Que vaut la perte ?"
    assert [answer.correct for answer in question.answers] == [False, True]
    assert question.answers[0].explanation == WRONG["explication"]


@pytest.mark.parametrize(("content", "message"), [
    ("- question: [", "essai.yaml, ligne 1_: YAML illisible"),
    ("[]", "essai.yaml doit être une liste de questions"),
    ({"question": "?"}, "essai.yaml doit être une liste de questions"),
    (["?"], "question 1_: des clés sont attendues (question, reponses)"),
    ([QUESTION, without(QUESTION, "question")], "question 2_: «_question_» doit être un texte"),
    ([{**QUESTION, "question": " "}], "question 1_: «_question_» doit être un texte"),
    ([{**QUESTION, "niveau": 2}], "question 1_: clé inconnue «_niveau_»"),
    ([{**QUESTION, "reponses": []}], "question 1_: «_reponses_» doit être une liste"),
    ([{**QUESTION, "reponses": [RIGHT]}], "question 1_: il faut de 2 à 8 réponses"),
    ([{**QUESTION, "reponses": [RIGHT, without(WRONG, "explication")]}],
     "question 1, réponse b_: «_explication_» doit être un texte"),
    ([{**QUESTION, "reponses": [RIGHT, {**WRONG, "juste": "non"}]}],
     "question 1, réponse b_: «_juste_» doit être true ou false"),
    ([{**QUESTION, "reponses": [WRONG, {**WRONG, "texte": "autre"}]}],
     "question 1_: il faut exactement une réponse juste"),
    ([{**QUESTION, "reponses": [RIGHT, {**RIGHT, "texte": "autre"}]}],
     "question 1_: il faut exactement une réponse juste"),
    ([{**QUESTION, "reponses": [RIGHT, {**WRONG, "texte": RIGHT["texte"]}]}],
     "question 1_: deux réponses ont le même texte"),
])
def test_load_refuses(tmp_path, content, message):
    with pytest.raises(quiz.QuizError) as error:
        quiz.load(write(tmp_path, content))
    assert message.replace("_", NBSP) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def build(tmp_path):
    """Construit une page qui ne contient que le questionnaire ; rend la page et les avertissements."""
    source = tmp_path / "site"
    (source / "docs/quiz").mkdir(parents=True)
    (source / "conf.py").write_text('extensions = ["quiz"]\nlanguage = "fr"\nhtml_theme = "basic"\n')
    (source / "index.rst").write_text("Quiz\n====\n\n.. quiz:: essai\n")

    def run(content: object, builder: str = "html") -> tuple[str, str]:
        write(source / "docs/quiz", content)
        app = SphinxTestApp(builder, srcdir=source, builddir=source / "_build")
        try:
            app.build()
            path = Path(app.outdir) / ("index.html" if builder == "html" else "index.txt")
            return path.read_text(encoding="utf-8"), app.warning.getvalue()
        finally:
            app.cleanup()

    return run


def test_page(build):
    html, warnings = build([QUESTION, {**QUESTION, "question": "Et *après* ?"}])
    assert warnings == ""
    assert len(re.findall(r"<fieldset[^>]*>\s*<legend>", html)) == 2
    names = re.findall(r'<label><input type="radio" name="([^"]+)" value="[ab]">', html)
    assert names == ["quiz-essai-1"] * 2 + ["quiz-essai-2"] * 2
    assert "Et <em>après</em> ?" in html and "Zéro &amp; moins" in html
    assert '<span class="math' in html


def test_page_reads_without_javascript(build):
    html, _ = build([QUESTION])
    details = re.search(r"<details.*?</details>", html, re.DOTALL)[0]
    text = re.sub(r"<[^>]+>", "", details)
    assert "a. Faux. Ce serait la perfection" in text and "b. Juste. C’est l’ignorance." in text
    assert "hidden" not in details


def test_text_format_has_everything(build):
    text, warnings = build([QUESTION], builder="text")
    assert warnings == ""
    for words in ("Que vaut la perte ?", "Zéro & moins", "Faux", "la perfection", "Juste", "l’ignorance"):
        assert words in text


def test_changed_quiz_rebuilds_its_page(build):
    build([QUESTION])
    html, _ = build([{**QUESTION, "question": "Une autre ?"}])
    assert "Une autre ?" in html


def test_bad_quiz_is_a_warning(build):
    _, warnings = build([{**QUESTION, "reponses": [WRONG, WRONG]}])
    assert f"quiz{NBSP}: essai.yaml, question 1{NBSP}: il faut exactement une réponse juste" in warnings
    assert "index.rst:4" in warnings
