"""`questions` : toutes les façons d’en charger se valent, et ce qui évalue ne s’apprend jamais."""

import pandas as pd
import pytest
from tiny_models import PAIRS, write_pairs

from llama.config import LlamaError
from llama.questions import MAX_HELD_OUT, QuestionSet

ROWS = [{"question": question, "answer": answer} for question, answer in PAIRS]


def loaded(pairs=PAIRS, **options):
    questions = QuestionSet(**options)
    questions.add_pairs(pairs)
    return questions


def test_every_way_to_load_gives_the_same_pairs(tmp_path):
    table = pd.DataFrame(ROWS)
    table.to_csv(tmp_path / "qa.csv", index=False)
    write_pairs(tmp_path / "qa.jsonl", PAIRS, ("q", "r"))
    for load in (
        lambda questions: questions.load_data(ROWS),
        lambda questions: questions.load_data_from_jsonlines(tmp_path / "qa.jsonl", input_key="q", output_key="r"),
        lambda questions: questions.load_data_from_csv(tmp_path / "qa.csv"),
        lambda questions: questions.load_data_from_dataframe(table, "question", "answer"),
    ):
        questions = QuestionSet()
        load(questions)
        assert questions.pairs == PAIRS


def test_loading_adds_what_is_new_and_reports_the_rest(capsys):
    questions = QuestionSet()
    questions.load_data([{"question": "Un ?", "answer": "Oui."}, {"question": "Deux ?", "answer": ""}])
    questions.load_data([{"question": "Un ?", "answer": "Oui."}, {"question": "Trois ?", "answer": "Non."}])
    assert questions.pairs == [("Un ?", "Oui."), ("Trois ?", "Non.")]
    assert "élément 2\u00a0: réponse vide" in capsys.readouterr().err


def test_held_out_questions_are_neither_learnt_nor_resembled():
    longer = [(f"Lisez {' '.join(str(100 * i + k) for k in range(8))}.", f"Lu, {i}.") for i in range(40)]
    questions = loaded([*longer, *((question + " Merci.", answer) for question, answer in longer)])
    training, held_out = questions.parts()
    assert len(held_out) == round(0.1 * len(questions.pairs)) and questions.parts() == (training, held_out)
    stems = {question.removesuffix(" Merci.") for question, _ in held_out}
    assert not stems & {question.removesuffix(" Merci.") for question, _ in training}
    assert len(training) == len(questions.pairs) - 2 * len(stems)


def test_the_seed_and_the_fraction_choose():
    assert loaded(seed=0).parts() != loaded(seed=1).parts()
    assert len(loaded(val_fraction=0.5).parts()[1]) == len(PAIRS) // 2


def test_measuring_stays_short():
    many = [(f"Combien font {i} et {i} ?", f"Cela fait {2 * i}.") for i in range(2000)]
    assert len(loaded(many).parts()[1]) == MAX_HELD_OUT


def test_frozen_the_new_questions_are_all_learnt():
    questions = loaded(PAIRS[:20])
    held_out = questions.parts()[1]
    questions.frozen = True
    questions.add_pairs(PAIRS[20:])
    assert questions.parts()[1] == held_out and {*PAIRS[20:]} <= {*questions.parts()[0]}
    questions.frozen = False
    questions.add_pairs([("Encore ?", "Oui.")])
    assert len(questions.parts()[1]) > len(held_out)


@pytest.mark.parametrize("action, message", [
    (lambda questions: questions.parts(), "au moins deux questions"),
    (lambda questions: (questions.add_pairs(PAIRS[:1]), questions.parts()), r"\(1 chargée\)"),
    (lambda questions: questions.load_data({}), "liste de dictionnaires"),
    (lambda questions: questions.load_data([PAIRS[0]]), "liste de dictionnaires"),
    (lambda questions: questions.load_data(ROWS, "question"), "Donnez input_key et output_key"),
    (lambda questions: questions.load_data(ROWS, "question", "réponse"), "n’a pas de colonne"),
    (lambda questions: questions.load_data([{"question": 3, "answer": "x"}]), "n’est pas un texte"),
    (lambda questions: questions.load_data_from_csv("absent.csv"), "introuvable"),
    (lambda questions: questions.load_data_from_dataframe(pd.DataFrame({"question": []})), "question"),
])
def test_refusals(action, message):
    with pytest.raises(LlamaError, match=message) as refusal:
        action(QuestionSet())
    assert "\n" not in str(refusal.value)
