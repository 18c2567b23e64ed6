"""`evaluation` : des nombres justes, qui ne dépendent pas de la taille des lots."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama.config import Config, LlamaError
from llama.evaluation import (
    MultipleChoice,
    answer_nats,
    bits_per_byte,
    choose,
    classification,
    exact_match,
    grouped_proportion,
    perplexity,
    proportion,
    rank_choices,
    token_f1,
    token_losses,
    windows,
)
from llama.model import LlamaModel
from llama.tokenization import SimpleCharTokenizer

TEXTS = ["Le salarié part en congé.", "La durée légale est de trente-cinq heures.", "Oui"]


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleCharTokenizer.train([*TEXTS, "Question : Réponse :\n é?"])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = LlamaModel(Config(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, block_size=16))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2)
    return model


def test_token_losses_are_those_of_each_sequence_alone(model, tokenizer):
    sequences = [tokenizer.encode(text) for text in TEXTS]
    together = token_losses(model, sequences, batch_size=3)
    for ids, losses in zip(sequences, together, strict=True):
        logits = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        alone = -logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert torch.allclose(losses, alone, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_changes_nothing(model, tokenizer, batch_size):
    items = [MultipleChoice("Qui ?", ["La durée", "Le salarié", "Oui"], 1), MultipleChoice("Quand ?", ["Oui", "La"], 0)]
    documents = [tokenizer.encode(text) for text in TEXTS]
    assert perplexity(model, documents, block_size=16, batch_size=batch_size) == pytest.approx(
        perplexity(model, documents, block_size=16, batch_size=16), rel=1e-5)
    assert rank_choices(model, tokenizer, items, batch_size=batch_size, template="{question}") == rank_choices(
        model, tokenizer, items, template="{question}")


def test_uniform_model_has_the_perplexity_of_its_vocabulary(tokenizer):
    uniform = LlamaModel(Config(vocab_size=tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=2))
    with torch.no_grad():
        for p in uniform.parameters():
            p.zero_()
    documents = [tokenizer.encode(TEXTS[0])]
    assert perplexity(uniform, documents, block_size=8) == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    text = "Le"
    assert bits_per_byte(uniform, tokenizer, [text], block_size=8) == pytest.approx(math.log2(tokenizer.vocab_size))


@given(st.integers(1, 60), st.integers(2, 12), st.data())
def test_windows_count_each_token_once_with_context(n, size, data):
    stride = data.draw(st.integers(1, size))
    counted = []
    for start, end, first in windows(n, size, stride):
        assert 0 <= start < first < end <= n and end - start <= size + 1
        assert first == 1 or first - start >= min(size - stride, first)
        counted += range(first, end)
    assert counted == list(range(1, n))


@pytest.mark.parametrize("prediction, reference, f1, exact", [
    ("L’employeur paie.", "l'Employeur paie !", 1.0, 1.0),
    ("le salarié et son employeur", "salarié", 2 * 1 / 5, 0.0),
    ("paie", "congé", 0.0, 0.0),
    ("", "", 1.0, 1.0), ("", "congé", 0.0, 0.0),
    ("deux deux", "deux", 2 / 3, 0.0),
])
def test_f1_and_exact_match(prediction, reference, f1, exact):
    assert token_f1(prediction, reference) == pytest.approx(f1)
    assert exact_match(prediction, reference) == exact


def test_classification():
    scores = classification(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    assert scores["accuracy"].value == 0.75
    assert scores["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_holds_its_estimate(n, data):
    successes = data.draw(st.integers(0, n))
    value, low, high, _ = proportion(successes, n)
    assert 0 <= low <= value <= high <= 1 and high - low < 2 / math.sqrt(n)


def test_wilson_known_value():
    value, low, high, n = proportion(8, 10)
    assert (value, n) == (0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_ranking_finds_what_the_model_finds_likely(model, tokenizer):
    item = MultipleChoice("Qui ?", ["La durée", "Le salarié", "Oui"], 0)
    losses = []
    for choice in item.choices:
        ids = [tokenizer.bos_id, *tokenizer.encode(item.question), *tokenizer.encode(choice)]
        losses.append(token_losses(model, [ids])[0][-len(tokenizer.encode(choice)):].sum() / len(choice.encode()))
    _, chosen = rank_choices(model, tokenizer, [item], template="{question}")
    assert chosen == [int(torch.stack(losses).argmin())]


def test_calibration_removes_what_a_choice_owes_to_itself(model, tokenizer):
    item = MultipleChoice("Qui ?", ["La durée", "Le salarié", "Oui"], 0)
    gains = []
    for choice in item.choices:
        asked, blind = (answer_nats(model, tokenizer, [([tokenizer.bos_id, *tokenizer.encode(q)], choice)])[0]
                        for q in (item.question, ""))
        gains.append((asked - blind) / len(choice.encode()))
    _, chosen = rank_choices(model, tokenizer, [item], template="{question}", calibrated=True)
    assert chosen == [gains.index(min(gains))]
    assert choose([item], [[3.0, 1.0, 2.0]]) == [1] and choose([item], [[3.0, 1.0, 2.0]], [[9.0, 0.0, 0.0]]) == [0]


def test_a_long_answer_passes_by_windows(model, tokenizer):
    prompt, answer = tokenizer.encode("Qui ?"), TEXTS[1]  # 43 caractères, pour un modèle qui en lit 16
    ids = [*prompt, *tokenizer.encode(answer)]
    expected = 0.0
    for start, end, first in windows(len(ids), 16, 8):
        losses = token_losses(model, [ids[start:end]])[0]
        expected += float(losses[max(first, len(prompt)) - start - 1:].sum()) if end > len(prompt) else 0.0
    assert answer_nats(model, tokenizer, [(prompt, answer)] * 2) == pytest.approx([expected] * 2, rel=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=60))
def test_grouped_interval_holds_its_estimate(groups):
    successes = [right for group in groups for right in group]
    value, low, high, n = grouped_proportion(successes, 4)
    assert low - 1e-9 <= value <= high + 1e-9 and n == len(successes) and value == pytest.approx(sum(successes) / n)


def test_grouped_interval_counts_groups_and_not_cases():
    alike = [right for i in range(50) for right in [i % 2 == 0] * 4]  # 50 cas indépendants, et non 200
    apart = [i % 2 == 0 for i in range(200)]  # chaque groupe a la même part
    wide, none = grouped_proportion(alike, 4), grouped_proportion(apart, 4)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(50), rel=0.1)
    assert none.low == none.high == 0.5
    assert grouped_proportion(alike, 4) == wide


@pytest.mark.parametrize("call, cause", [
    (lambda m, t: grouped_proportion([True] * 5, 4), "5 cas ne font pas des groupes de 4"),
    (lambda m, t: grouped_proportion([], 4), "0 cas"),
    (lambda m, t: perplexity(m, [[1]], block_size=8), "aucun document n’a deux jetons"),
    (lambda m, t: bits_per_byte(m, t, [""], block_size=8), "les textes sont vides"),
    (lambda m, t: token_losses(m, [[1, 2], [3]]), "Séquence 1"),
    (lambda m, t: classification([1], []), "1 prédictions pour 0 références"),
    (lambda m, t: proportion(3, 0), "3 succès sur 0 cas"),
    (lambda m, t: rank_choices(m, t, [MultipleChoice("Qui ?", ["Oui"], 1)]), "Question 1"),
    (lambda m, t: rank_choices(m, t, [MultipleChoice("Qui ?", ["Oui", ""], 0)]), "Question 1"),
])
def test_bad_input_is_named(model, tokenizer, call, cause):
    with pytest.raises(LlamaError) as error:
        call(model, tokenizer)
    assert cause in str(error.value).replace("\u00a0", " ")
