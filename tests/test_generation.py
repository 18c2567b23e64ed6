"""`generation` : les mêmes jetons que transformers, et des tirages qui ne dépendent ni du lot ni des voisins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process

from llama.config import Config, LlamaError
from llama.generation import Sampling, generate, probabilities, stream
from llama.model import LlamaModel
from llama.tokenization import SimpleCharTokenizer

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [30, 30]]
TOKENIZER = SimpleCharTokenizer.train(["abcdefghijklmnopqrstuvwxyzéè’ ,.!?ABCDEFG"])


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    torch.manual_seed(0)
    config = Config(vocab_size=TOKENIZER.vocab_size, d_model=48, n_layers=3, n_heads=4, n_kv_heads=2, block_size=128)
    model = LlamaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def peer(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("modèle") / "pair"
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers(model, peer, penalty):
    ours = generate(model, PROMPTS, max_new_tokens=40, repetition_penalty=penalty)
    for prompt, tokens in zip(PROMPTS, ours, strict=True):
        expected = peer.generate(
            torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0,
            repetition_penalty=penalty,
        )
        assert tokens == expected[0, len(prompt):].tolist()


@pytest.mark.parametrize("settings, processor", [
    ({"temperature": 0.7}, logits_process.TemperatureLogitsWarper(0.7)),
    ({"temperature": 1.0, "top_k": 5}, logits_process.TopKLogitsWarper(5)),
    ({"temperature": 1.0, "top_p": 0.8}, logits_process.TopPLogitsWarper(0.8)),
    ({"temperature": 1.0, "min_p": 0.1}, logits_process.MinPLogitsWarper(0.1)),
])
def test_filters_equal_transformers(settings, processor):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = processor(torch.zeros(6, 1, dtype=torch.int64), logits).softmax(1)
    assert torch.allclose(probabilities(logits, Sampling(**settings)), expected, atol=1e-6)


@given(
    temperature=st.floats(0.1, 3), top_k=st.none() | st.integers(1, 60), top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1), seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_a_distribution_remains_a_distribution(temperature, top_k, top_p, min_p, seed):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    shares = probabilities(logits, sampling)
    assert torch.allclose(shares.sum(1), torch.ones(3), atol=1e-5)
    assert (shares.argmax(1) == logits.argmax(1)).all()
    if top_k is not None:
        assert ((shares > 0).sum(1) <= top_k).all()


def test_a_row_does_not_depend_on_its_neighbours(model):
    together = generate(model, PROMPTS, max_new_tokens=20, temperature=1.0, top_p=0.9, seed=3)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], max_new_tokens=20, temperature=1.0, top_p=0.9, seed=3 + row) == [together[row]]


def test_seed_decides(model):
    draws = [generate(model, [[4, 5]], max_new_tokens=30, temperature=1.5, seed=seed)[0] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_end_of_text_stops_each_row_and_is_not_given(model):
    free = generate(model, PROMPTS, max_new_tokens=30)
    eos = free[0][4]
    for before, after in zip(free, generate(model, PROMPTS, max_new_tokens=30, eos_id=eos), strict=True):
        assert after == (before[:before.index(eos)] if eos in before else before)


def test_stop_strings_cut_where_they_start(model):
    free = TOKENIZER.decode(generate(model, [[5, 9, 12]], max_new_tokens=30)[0])
    stop = free[7:10]
    cut = generate(model, [[5, 9, 12]], max_new_tokens=30, stop=[stop], tokenizer=TOKENIZER)[0]
    assert TOKENIZER.decode(cut) == free[:free.index(stop)]


@pytest.mark.parametrize("stop_at", [None, (3, 4), (9, 12)])
def test_stream_says_what_generate_says(model, stop_at):
    prompt = [5, 9, 12]
    free = TOKENIZER.decode(generate(model, [prompt], max_new_tokens=30)[0])
    stop = [free[slice(*stop_at)]] if stop_at else []
    pieces = list(stream(model, prompt, TOKENIZER, max_new_tokens=30, stop=stop))
    assert "".join(pieces) == (free[:free.index(stop[0])] if stop else free)
    assert len(pieces) > 1 or stop


def test_stream_holds_back_an_unfinished_character(model):
    class Bytes:
        """Un octet par jeton : « é » en demande deux."""

        def decode(self, ids, skip_special_tokens=False):
            return bytes(ids).decode("utf-8", errors="replace")

    text = list("été à la mer".encode())
    pieces = []

    class Scripted(torch.nn.Module):
        """Un modèle qui récite `text`."""

        config = Config(vocab_size=256, d_model=8, n_layers=1, n_heads=2)

        def __init__(self):
            super().__init__()
            self.weight, self.position = torch.nn.Parameter(torch.zeros(1)), 0

        def forward(self, ids, mask=None, cache=None):
            logits = torch.zeros(1, ids.shape[1], 256)
            logits[0, -1, text[self.position]] = 1.0
            self.position += 1
            return logits

    pieces = list(stream(Scripted(), [0], Bytes(), max_new_tokens=len(text)))
    assert "".join(pieces) == "été à la mer"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) and len(pieces) == len("été à la mer")


def test_training_mode_is_restored(model):
    model.train()
    generate(model, [[1]], max_new_tokens=1)
    assert model.training


@pytest.mark.parametrize("call, cause", [
    (lambda m: generate(m, []), "Rien à continuer"),
    (lambda m: generate(m, [[1], []]), "Rien à continuer"),
    (lambda m: generate(m, [[1]], max_new_tokens=0), "max_new_tokens doit valoir au moins 1"),
    (lambda m: generate(m, [[1]], temperature=-1.0), "temperature = -1.0"),
    (lambda m: generate(m, [[1]], top_k=0), "top_k = 0"),
    (lambda m: generate(m, [[1]], top_p=0.0), "top_p = 0.0"),
    (lambda m: generate(m, [[1]], min_p=1.5), "min_p = 1.5"),
    (lambda m: generate(m, [[1]], repetition_penalty=0.0), "repetition_penalty = 0.0"),
    (lambda m: generate(m, [[1]], stop=["a"]), "demandent un tokenizer"),
])
def test_bad_input_is_named(model, call, cause):
    with pytest.raises(LlamaError) as error:
        call(model)
    assert cause in str(error.value).replace("\u00a0", " ") and "\n" not in str(error.value)
