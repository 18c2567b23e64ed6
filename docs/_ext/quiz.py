"""Les questionnaires : `.. quiz:: 04_preentrainement` rend docs/quiz/04_preentrainement.yaml dans la page.

Chaque question est un groupe de boutons radio, utilisable au clavier et au lecteur d’écran ; choisir une
réponse montre aussitôt son explication (quiz.js). Sans JavaScript, et dans les formats imprimés, toutes les
réponses commentées se lisent sous la question. Les textes sont du reStructuredText : mathématiques et
`:valeur:` y marchent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)

LETTERS = "abcdefgh"


class QuizError(Exception):
    """Un questionnaire est mal écrit ; le message est en français, tient en une ligne et dit où."""


@dataclass(frozen=True)
class Answer:
    """Une réponse proposée, et pourquoi elle est juste ou fausse."""

    text: str
    correct: bool
    explanation: str


@dataclass(frozen=True)
class Question:
    """Une question et ses réponses, dont une seule est juste."""

    text: str
    answers: tuple[Answer, ...]


def load(path: Path) -> list[Question]:
    """Lit et valide un questionnaire.

    Le fichier est une liste de `{question, reponses: [{texte, juste, explication}]}`.

    Raises:
        QuizError: fichier absent, YAML illisible, clé manquante ou inconnue, pas exactement une réponse
        juste.
    """
    if not path.is_file():
        raise QuizError(f"{path.name} n’existe pas")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", ligne {mark.line + 1}" if mark else ""
        raise QuizError(f"{path.name}{where} : YAML illisible ({getattr(error, 'problem', '')})") from error
    if not isinstance(content, list) or not content:
        raise QuizError(f"{path.name} doit être une liste de questions")
    return [_question(entry, f"{path.name}, question {number}") for number, entry in enumerate(content, 1)]


def _question(entry: Any, where: str) -> Question:
    _check_keys(entry, {"question": str, "reponses": list}, where)
    if not 2 <= len(entry["reponses"]) <= len(LETTERS):
        raise QuizError(f"{where} : il faut de 2 à {len(LETTERS)} réponses")
    answers = []
    for letter, answer in zip(LETTERS, entry["reponses"], strict=False):
        _check_keys(answer, {"texte": str, "juste": bool, "explication": str}, f"{where}, réponse {letter}")
        answers.append(Answer(answer["texte"].strip(), answer["juste"], answer["explication"].strip()))
    if sum(answer.correct for answer in answers) != 1:
        raise QuizError(f"{where} : il faut exactement une réponse juste")
    if len({answer.text for answer in answers}) != len(answers):
        raise QuizError(f"{where} : deux réponses ont le même texte")
    return Question(entry["question"].strip(), tuple(answers))


def _check_keys(entry: Any, types: dict[str, type], where: str) -> None:
    if not isinstance(entry, dict):
        raise QuizError(f"{where} : des clés sont attendues ({', '.join(types)})")
    for key in entry.keys() - types.keys():
        raise QuizError(f"{where} : clé inconnue « {key} »")
    for key, kind in types.items():
        value = entry.get(key)
        if not isinstance(value, kind) or value in ("", []) or isinstance(value, str) and not value.strip():
            wanted = {str: "un texte", bool: "true ou false", list: "une liste"}[kind]
            raise QuizError(f"{where} : « {key} » doit être {wanted}")


# Ces nœuds héritent de listes ordinaires : les formats sans visiteur propre (PDF, texte) les rendent ainsi.
class quiz(nodes.enumerated_list): ...
class quiz_question(nodes.list_item): ...
class quiz_legend(nodes.paragraph): ...
class quiz_answers(nodes.bullet_list): ...
class quiz_answer(nodes.list_item): ...
class quiz_choice(nodes.paragraph): ...
class quiz_corrections(nodes.bullet_list): ...


class QuizDirective(SphinxDirective):
    """``.. quiz:: nom`` : rend le questionnaire ``docs/quiz/nom.yaml``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        relative = Path(self.config.quiz_dossier) / f"{self.arguments[0]}.yaml"
        self.env.note_dependency(relative.as_posix())
        try:
            questions = load(self.env.srcdir / relative)
        except QuizError as error:
            logger.warning("quiz : %s", error, location=self.get_location(), type="quiz")
            return []
        node = quiz(name=self.arguments[0], total=len(questions), enumtype="arabic", prefix="", suffix=".")
        for number, question in enumerate(questions, 1):
            node += self._question(question, f"quiz-{self.arguments[0]}-{number}")
        self.set_source_info(node)
        return [node]

    def _question(self, question: Question, group: str) -> quiz_question:
        legend = quiz_legend("", "", *self._inline(question.text))
        choices, corrections = quiz_answers(bullet="-"), quiz_corrections(bullet="-")
        for letter, answer in zip(LETTERS, question.answers, strict=False):
            text = [nodes.strong("", f"{letter}. "), *self._inline(answer.text)]
            choices += quiz_answer("", quiz_choice("", "", *text, group=group, letter=letter))
            verdict = nodes.strong("", f"{letter}. {'Juste' if answer.correct else 'Faux'}. ")
            body = nodes.paragraph("", "", verdict, *self._inline(answer.explanation))
            classes = ["juste" if answer.correct else "faux"]
            corrections += nodes.list_item("", body, classes=classes)
        return quiz_question("", legend, choices, corrections)

    def _inline(self, text: str) -> list[nodes.Node]:
        children, messages = self.parse_inline(re.sub(r"[ \n]+", " ", text), lineno=self.lineno)
        return children + messages


def visit_quiz(self: Any, node: quiz) -> None:
    self.body.append(self.starttag(node, "div", CLASS="quiz", **{"data-total": node["total"]}))


def depart_quiz(self: Any, node: quiz) -> None:
    self.body.append('<p class="quiz-score" role="status" hidden></p></div>\n')


def visit_question(self: Any, node: quiz_question) -> None:
    self.body.append(self.starttag(node, "fieldset", CLASS="quiz-question"))


def depart_question(self: Any, node: quiz_question) -> None:
    self.body.append('<div class="quiz-retour" role="status"></div></fieldset>\n')


def visit_legend(self: Any, node: quiz_legend) -> None:
    self.body.append('<legend><span class="quiz-numero" aria-hidden="true"></span><span>')


def depart_legend(self: Any, node: quiz_legend) -> None:
    self.body.append("</span></legend>\n")


def visit_answers(self: Any, node: quiz_answers) -> None:
    self.body.append('<div class="quiz-reponses">')


def depart_answers(self: Any, node: quiz_answers) -> None:
    self.body.append("</div>\n")


def visit_choice(self: Any, node: quiz_choice) -> None:
    self.body.append(f'<label><input type="radio" name="{node["group"]}" value="{node["letter"]}"><span>')


def depart_choice(self: Any, node: quiz_choice) -> None:
    self.body.append("</span></label>\n")


def nothing(self: Any, node: nodes.Element) -> None:
    """Un nœud sans balise propre."""


def visit_corrections(self: Any, node: quiz_corrections) -> None:
    self.body.append('<details class="quiz-corrige"><summary>Réponses commentées</summary><ul>')


def depart_corrections(self: Any, node: quiz_corrections) -> None:
    self.body.append("</ul></details>\n")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("quiz_dossier", "docs/quiz", "env", types=str)
    app.add_directive("quiz", QuizDirective)
    app.add_node(quiz, html=(visit_quiz, depart_quiz))
    app.add_node(quiz_question, html=(visit_question, depart_question))
    app.add_node(quiz_legend, html=(visit_legend, depart_legend))
    app.add_node(quiz_answers, html=(visit_answers, depart_answers))
    app.add_node(quiz_answer, html=(nothing, nothing))
    app.add_node(quiz_choice, html=(visit_choice, depart_choice))
    app.add_node(quiz_corrections, html=(visit_corrections, depart_corrections))
    app.add_js_file("quiz.js", defer="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
