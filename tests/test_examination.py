"""`examination` : des réponses qui se comprennent seules, et un choix multiple que l’on ne réussit pas sans lire."""

import math
import random

import pytest
from tiny_models import make_model

from llama import examination
from llama.assembly import load
from llama.config import LlamaError
from llama.evaluation import answer_nats, choose, token_f1
from llama.runner import BasicModelRunner

SUBJECTS = ["congé", "préavis", "salaire", "repos", "stage", "licenciement", "retraite", "syndicat", "essai", "prime"]


def rows(n_sheets=10, by_sheet=3):
    """Des questions comme celles des fiches : chaque fiche en a plusieurs, chaque sujet ses mots."""
    words = ["durée", "montant", "refus", "demande", "délai"]
    return [
        {"question": f"Le {subject}\u00a0: quelle règle pour la {words[j]} du {subject} ?", "thème": f"Le {subject}",
         "réponse": f"L’employeur du numéro {i}{j} accorde au salarié la {words[j]} que fixe son accord collectif "
                    f"pour ce {subject}, après un avis motivé.\n\nSuite\nAutre phrase.",
         "url": f"https://exemple.fr/{subject}#{j}"}
        for i, subject in enumerate(SUBJECTS[:n_sheets]) for j in range(by_sheet)
    ]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(examination.holdout, "questions", lambda: ([], rows()))
    for function in (examination.questions, examination._examination):
        function.cache_clear()
    yield examination.multiple_choice()
    for function in (examination.questions, examination._examination):
        function.cache_clear()


START = "L’employeur remet au salarié, à la fin de son contrat, le certificat que la loi prévoit"


@pytest.mark.parametrize("answer, expected", [
    (f"{START}. Une autre phrase.", f"{START}. Une autre phrase."),
    (f"{START} dans son article L. 1234-19. Une autre phrase.", f"{START} dans son article L. 1234-19."),
    (f"Non, {START[0].lower()}{START[1:]}.", f"{START}."),
    (f"Oui. {START}.", f"{START}."),
    (f"Titre\n\n{START} (voir ci-dessous).", f"{START}."),
    (f"{START} :\n- Un bulletin,\n- CDD compris ;\n- le reste.\nSuite.",
     f"{START} : un bulletin ; CDD compris ; le reste."),
    (f"Il le doit en effet dans tous les cas que la loi prévoit ici.\n{START}.", f"{START}."),
    ("Oui, si la date de fin de son arrêt est avancée par son médecin traitant.", None),
    (f"{START} dans les conditions ci-dessous.", None),
    (f"{START} dans les cas suivants.", None),
    (f"{START} :", None),
    ("Trop court.", None),
    (f"{START}, " * 4 + "fin.", None),
    ("- Un élément de liste, qui est long mais qui n’est pas une phrase de réponse.", None),
    ("", None),
])
def test_the_reference_is_what_stands_alone(answer, expected):
    found = examination.reference(answer)
    assert (found and found.replace("\u00a0", " ")) == expected


def test_groups_share_their_answers_and_come_from_different_sheets(small):
    assert len(small) >= 20 and len(small) % 4 == 0
    sheet = {row["question"]: row["thème"] for row in rows()}
    own = {examination.reference(row["réponse"]): row["question"] for row in rows()}
    for start in range(0, len(small), 4):
        group = small[start:start + 4]
        assert all(item.choices == group[0].choices for item in group)
        assert sorted(item.answer for item in group) == [0, 1, 2, 3]
        assert len({sheet[item.question] for item in group}) == 4
        assert all(own[item.choices[item.answer]] == item.question for item in group)
        lengths = [len(choice) for choice in group[0].choices]
        assert max(lengths) <= examination.LENGTHS * min(lengths)
    assert len({item.question for item in small}) == len(small)


@pytest.mark.parametrize("seed", range(5))
def test_a_scorer_that_ignores_the_question_has_exactly_one_in_four(small, seed):
    taste = random.Random(seed)
    scores = {choice: taste.random() for item in small for choice in item.choices}
    chosen = choose(small, [[scores[choice] for choice in item.choices] for item in small])
    assert sum(guess == item.answer for guess, item in zip(chosen, small, strict=True)) * 4 == len(small)
    assert sum(item.answer == seed % 4 for item in small) * 4 == len(small)  # ni sa place


def test_the_examination_depends_on_its_questions_only(small):
    shuffled = rows()
    random.Random(0).shuffle(shuffled)
    assert examination.build(rows()) == small
    assert {item.question for item in examination.build(shuffled)} <= {row["question"] for row in rows()}


def test_an_answer_that_repeats_its_question_is_left_out():
    row = rows()[0]
    repeated = f"La règle pour la durée du congé, quelle que soit la règle, est {START[0].lower()}{START[1:]}."
    assert examination._selected([row]) and not examination._selected([row | {"réponse": repeated}])


def test_word_overlap_chooses_the_answer_with_the_words_of_the_question(small):
    chosen = examination.overlap_choices(small)
    assert sum(guess == item.answer for guess, item in zip(chosen, small, strict=True)) > len(small) / 2


def test_limit_takes_whole_groups(small):
    assert examination.multiple_choice(11) == small[:8] and examination.multiple_choice(1000) == small
    with pytest.raises(LlamaError, match="par groupes de 4"):
        examination.multiple_choice(3)


@pytest.mark.parametrize("template", [True, False])
def test_examine_measures_what_it_says(small, tmp_path, template):
    runner = BasicModelRunner(make_model(tmp_path / "base", template=template))
    model, tokenizer = runner.model, runner.tokenizer
    report = examination.examine(model, tokenizer, limit=8, n_answers=3, max_new_tokens=6)
    item, end, stop = small[0], "" if template else "\n", () if template else ("\n",)
    written = runner.predict(item.question + end, max_new_tokens=6, stop=stop).strip()
    assert report.answers[0] == (item.question, item.choices[item.answer], written)
    assert report.f1 == pytest.approx(sum(token_f1(text, wanted) for _, wanted, text in report.answers) / 3)
    right = [(runner.prompt(item.question + end), item.choices[item.answer]) for item in small[:8]]
    bits = sum(answer_nats(model, tokenizer, right)) / math.log(2) / sum(len(text.encode()) for _, text in right)
    assert report.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert report.accuracy.n == 8 and report.accuracy.low <= report.accuracy.value <= report.accuracy.high
    assert report == examination.examine(model, tokenizer, limit=8, n_answers=3, max_new_tokens=6, batch_size=3)
    assert set(report.metrics()) == {"accuracy", "accuracy_low", "accuracy_high", "bits_per_byte", "f1",
                                     "n_questions", "n_answers"}
    assert "f1" not in examination.examine(model, tokenizer, limit=4, n_answers=0).metrics()


def test_an_untrained_model_learns_nothing_from_the_question(small, tmp_path):
    model, tokenizer = load(make_model(tmp_path / "base", template=False))
    alone = examination.choice_nats(model, tokenizer, small, ask=lambda _: [tokenizer.bos_id])
    chosen = choose(small, alone)
    assert sum(guess == item.answer for guess, item in zip(chosen, small, strict=True)) * 4 == len(small)


@pytest.mark.reseau
def test_the_real_examination():
    items, pairs = examination.multiple_choice(), examination.questions()
    assert len(items) >= 200 and len({item.question for item in items}) == len(items)
    assert {(item.question, item.choices[item.answer]) for item in items} <= set(pairs)
    learnt = {row["question"] for row in examination.holdout.questions()[0]}
    assert not learnt & {question for question, _ in pairs}
    assert all(60 <= len(answer) <= 300 and answer[-1] == "." and not answer[0].islower() for _, answer in pairs)
    overlap = examination.overlap_choices(items)
    assert sum(guess == item.answer for guess, item in zip(overlap, items, strict=True)) < 0.75 * len(items)
