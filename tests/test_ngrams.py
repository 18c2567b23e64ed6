"""`ngrams` : la formule de Kneser et Ney, comptée naïvement, et l’interface d’un `LlamaModel`."""

import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.config import LlamaError
from llama.evaluation import bits_per_byte, perplexity
from llama.generation import generate, stream
from llama.ngrams import USUAL_DISCOUNT, NGramModel
from llama.tokenization import SimpleCharTokenizer

V = 6
DOCUMENTS = [[0, 1, 2, 1, 2, 3], [1, 2, 3], [0, 1, 1, 2, 4, 0, 1, 2], [2], [3, 0, 1, 2, 1]]
documents = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=12), min_size=1, max_size=6)


def textbook(documents, order):
    """La même loi, par des dictionnaires et la formule : P(w | contexte), le contexte étant un tuple."""
    padded = [["début"] * (order - 1) + list(ids) for ids in documents]
    grams = [Counter(tuple(ids[i - k + 1:i + 1]) for ids in padded for i in range(order - 1, len(ids)))
             for k in range(1, order + 1)]
    counts = [Counter() for _ in range(order)]
    counts[-1] = grams[-1]
    for k in range(order - 1):  # le nombre de prédécesseurs différents
        for gram in grams[k + 1]:
            counts[k][gram[1:]] += 1

    def discount(own):
        once, twice = (sum(count == n for count in own.values()) for n in (1, 2))
        return once / (once + 2 * twice) if once and twice else USUAL_DISCOUNT

    followers = [defaultdict(dict) for _ in range(order)]
    for k, own in enumerate(counts):
        for gram, count in own.items():
            followers[k][gram[:-1]][gram[-1]] = count

    def probability(word, context):
        if len(context) == order:
            context = context[1:]
        lower = probability(word, context[1:]) if context else 1 / V
        own = followers[len(context)].get(context)
        if not own:
            return lower
        d, total = discount(counts[len(context)]), sum(own.values())
        return max(own.get(word, 0) - d, 0) / total + d * len(own) / total * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_textbook(order):
    model, expected = NGramModel.fit(DOCUMENTS, V, order), textbook(DOCUMENTS, order)
    sequence = [0, 1, 2, 1, 5, 1, 2, 3, 0]
    got = model(torch.tensor([sequence])).exp()[0]
    for t in range(len(sequence)):
        seen = tuple((["début"] * order + sequence[:t + 1])[-(order - 1):]) if order > 1 else ()
        assert got[t].tolist() == pytest.approx([expected(word, seen) for word in range(V)], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 4), st.lists(st.integers(0, V - 1), min_size=1, max_size=10))
def test_probabilities_sum_to_one_and_none_is_zero(documents, order, sequence):
    got = NGramModel.fit(documents, V, order)(torch.tensor([sequence])).exp()
    assert torch.allclose(got.sum(-1), torch.ones(1, len(sequence)), atol=1e-5) and bool((got > 0).all())


def test_a_longer_context_predicts_its_own_text_better():
    values = [perplexity(NGramModel.fit(DOCUMENTS, V, order), DOCUMENTS, block_size=8) for order in (1, 2, 3)]
    assert values == sorted(values, reverse=True)


def test_no_sequence_spans_two_documents():
    model = NGramModel.fit([[0, 1], [2, 3]], V, 2)
    assert model.n_grams == [4, 4]  # 0, 1, 2, 3 ; début-0, 0-1, début-2, 2-3
    assert float(model(torch.tensor([[1]])).exp()[0, 0, 2]) == pytest.approx(float(model.unigrams[2]))


def test_the_mask_separates_documents_and_hides_padding():
    model = NGramModel.fit(DOCUMENTS, V, 3)
    packed = model(torch.tensor([[0, 1, 2, 3]]), mask=torch.tensor([[1, 1, 2, 2]]))
    assert torch.allclose(packed[:, 2:], model(torch.tensor([[2, 3]])), atol=1e-6)
    padded = model(torch.tensor([[0, 0, 1, 2]]), mask=torch.tensor([[0, 0, 1, 1]]))
    assert torch.allclose(padded[:, 2:], model(torch.tensor([[1, 2]])), atol=1e-6)


def test_generation_reads_the_whole_past_and_not_its_neighbours():
    model = NGramModel.fit([[0, 1, 2, 3, 4]] * 5, V, 3)
    assert generate(model, [[0], [1, 2]], max_new_tokens=2) == [[1, 2], [3, 4]]
    drawn = generate(model, [[0], [1, 2]], max_new_tokens=4, temperature=1.0, seed=3)
    assert drawn[1] == generate(model, [[1, 2]], max_new_tokens=4, temperature=1.0, seed=4)[0]


def test_works_with_a_tokenizer():
    text = "le salarié et le contrat du salarié"
    tokenizer = SimpleCharTokenizer.train([text])
    model = NGramModel.fit([tokenizer.encode_document(text)], tokenizer.vocab_size, 4)
    assert 0 < bits_per_byte(model, tokenizer, [text], block_size=16) < math.log2(tokenizer.vocab_size)
    pieces = "".join(stream(model, tokenizer.encode_document("le sal"), tokenizer, max_new_tokens=4))
    assert pieces == "arié"


def test_train_and_eval_are_those_of_a_module():
    model = NGramModel.fit(DOCUMENTS, V)
    assert model.order == 3 and model.eval() is model and model.train() is model and model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("arguments, cause", [
    (([], V), "Corpus vide"), (([[]], V), "Corpus vide"), (([[1, 6]], V), "Le jeton 6"), (([[-1]], V), "Le jeton -1"),
    ((DOCUMENTS, V, 0), "order doit valoir au moins 1"),
])
def test_bad_input_is_named(arguments, cause):
    with pytest.raises(LlamaError) as error:
        NGramModel.fit(*arguments)
    assert cause in str(error.value).replace("\u00a0", " ")
