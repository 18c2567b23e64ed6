"""`assembly` : un modèle arrive avec son tokenizer ; sinon, une ligne dit comment en obtenir un."""

import json

import huggingface_hub
import pytest
from huggingface_hub import errors
from tiny_models import PAIRS, make_model, snapshot, tokenizer

from llama.assembly import PLAIN_TEMPLATE, chat_template, folded, load, with_chat_template, without_chat_template
from llama.chat import CHAT_TEMPLATE, TransformersTokenizer
from llama.config import LlamaError
from llama.lora import adapter_names, add_lora, save_adapter
from llama.tokenization import SimpleCharTokenizer

MESSAGES = [{"role": "user", "content": "Bonjour."}, {"role": "assistant", "content": "Bonsoir."}]


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "modèle")


def adapter(folder, out):
    model, _ = load(folder)
    add_lora(model, 2, 4.0, ["q_proj"])
    save_adapter(model, out)
    return out


def test_a_folder_gives_its_model_and_its_tokenizer(folder):
    model, own = load(folder)
    assert model.config.vocab_size == own.vocab_size and own.encode("Bonjour.") == tokenizer().encode("Bonjour.")
    assert model.name_or_path == str(folder)


def test_an_adapter_brings_its_base_and_its_tokenizer(folder, tmp_path):
    out = adapter(folder, tmp_path / "adaptateur")
    model, own = load(out)
    assert adapter_names(model) == ["default"] and chat_template(own) == CHAT_TEMPLATE
    without_chat_template(own).save(out)
    assert chat_template(load(out)[1]) is None  # le tokenizer de l’adaptateur passe avant celui de la base


def test_folded_keeps_what_was_learnt(folder, tmp_path):
    model, _ = load(adapter(folder, tmp_path / "adaptateur"))
    names = {name for name, _ in load(folder)[0].named_parameters()}
    assert folded(model) is model and not adapter_names(model)
    assert {name for name, _ in model.named_parameters()} == names and folded(model) is model


def set_base(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_refusals(folder, tmp_path):
    out = adapter(folder, tmp_path / "adaptateur")
    other = make_model(tmp_path / "autre")
    SimpleCharTokenizer.train(["é" * 3, *map(chr, range(32, 900))]).save(other, force=True)
    before = snapshot(tmp_path)
    with pytest.raises(LlamaError, match="ce n’est pas le sien"):
        load(other)
    assert snapshot(tmp_path) == before
    for base, message in ((None, "ne dit pas quel modèle"), (3, "ne dit pas quel modèle"),
                          (str(out), "ne dit pas quel modèle"), (str(tmp_path / "absent"), "Modèle introuvable")):
        set_base(out, base)
        with pytest.raises(LlamaError, match=message):
            load(out)
    (out / "adapter_config.json").write_text("[]")
    with pytest.raises(LlamaError, match="ne dit pas quel modèle"):
        load(out)


@pytest.mark.parametrize("error, message", [
    (errors.GatedRepoError, "est protégé"),
    (errors.RepositoryNotFoundError, "n’existe pas ou vous est fermé"),
    (ConnectionError, "le Hub est injoignable"),
])
def test_a_model_out_of_reach_says_how_to_get_one(monkeypatch, error, message):
    def download(*_, **__):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(LlamaError) as refusal:
        load("meta-llama/Llama-2-7b-hf")
    text = str(refusal.value)
    assert message in text and "llama fetch smollm2" in text and "\n" not in text


def test_a_mistyped_folder_is_not_sent_to_the_hub():
    with pytest.raises(LlamaError) as refusal:
        load("./absent")
    assert "Modèle introuvable" in str(refusal.value)


# Le gabarit


def test_our_tokens_give_our_template():
    bare = without_chat_template(tokenizer())
    assert chat_template(bare) is None and chat_template(with_chat_template(bare)) == CHAT_TEMPLATE
    complete = tokenizer()
    assert with_chat_template(complete) is complete


def test_other_tokenizers_get_plain_text():
    dressed = with_chat_template(tokenizer(chat=False))
    assert isinstance(dressed, TransformersTokenizer) and chat_template(dressed) == PLAIN_TEMPLATE
    ids, mask = dressed.encode_chat(MESSAGES)
    assert dressed.decode(ids) == (
        "<|begin_of_text|>### Question\nBonjour.\n\n### Réponse\nBonsoir.<|end_of_text|>"
    )
    learnt = dressed.decode([i for i, kept in zip(ids, mask, strict=True) if kept])
    assert learnt == "Bonsoir.<|end_of_text|>"
    prompt, _ = dressed.encode_chat(MESSAGES[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt  # ce qui s’apprend suit exactement ce qui sera demandé


def test_a_dressed_tokenizer_adds_no_token():
    plain = tokenizer(chat=False)
    dressed = with_chat_template(plain)
    assert dressed.vocab_size == plain.vocab_size
    assert all(dressed.encode(text) == plain.encode(text) for pair in PAIRS for text in pair)
