"""`bpe`, `tokenization`, `vocabulary` et `chat` : égaux à `tokenizers` et à transformers, et sans perte."""

import functools
import itertools
import json
import os
import re
import sys
import time
import unicodedata
from collections import Counter

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import snapshot
from tokenizers import Regex, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama import sources
from llama.bpe import PATTERN, apply_merges, byte_alphabet, isolated, learn_merges, merges_by_recounting
from llama.chat import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    ROLES,
    SPECIAL_TOKENS,
    TransformersTokenizer,
    as_tokenizer,
)
from llama.config import LlamaError
from llama.tokenization import BPETokenizer, SimpleCharTokenizer, Tokenizer

settings.register_profile("sans délai", deadline=None)  # la machine est parfois chargée
settings.load_profile("sans délai")

# Sans les caractères qu’une version d’Unicode plus récente que celle d’Oniguruma a pu ajouter.
UNICODE = st.text(st.characters(exclude_categories=["Cs", "Cn"]))
LETTERS = "aàâbceéèêilnotu'’ -«»!?:;,.\u00a0\u202f\n\t0123456789LDQ\u0301œ"
FRENCH = st.text(st.sampled_from(LETTERS), max_size=60)
FRAGMENTS = [*SPECIAL_TOKENS, "<|", "|>", "<", "user", "assistant", " ", "é"]
HOSTILE = st.lists(st.sampled_from(FRAGMENTS)).map("".join)
CHAT = [
    {"role": "system", "content": "Tu réponds en une phrase."},
    {"role": "user", "content": "Qu’est-ce qu’un CDI ?"},
    {"role": "assistant", "content": "Un contrat à durée indéterminée."},
    {"role": "user", "content": " \n"},
    {"role": "assistant", "content": ""},
]


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in sources.documents("atelier")]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return BPETokenizer.train(texts, 1024)


@pytest.fixture(scope="module")
def exported(tokenizer):
    return tokenizer.to_transformers()


def reference(texts, vocab_size, pre_tokenizer, special_tokens=SPECIAL_TOKENS, **options):
    """Un BPE de la bibliothèque `tokenizers`."""
    trained = tokenizers.Tokenizer(models.BPE(**options))
    trained.pre_tokenizer = pre_tokenizer
    trained.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special_tokens), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return trained


def split():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])


# Le prédécoupage.


@pytest.mark.parametrize(("text", "pieces"), [
    ("l’été arrive", ["l’", "été", " arrive"]),
    ("L'école, d'où qu'on vienne", ["L'", "école", ",", " d'", "où", " qu'", "on", " vienne"]),
    ("lorsqu’il jusqu’à presqu’île", ["lorsqu’", "il", " jusqu’", "à", " presqu’", "île"]),
    ("Aujourd’hui, aux prud'hommes", ["Aujourd’hui", ",", " aux", " prud'hommes"]),
    ("est-ce là ? Dis-le-moi", ["est", "-ce", " là", " ?", " Dis", "-le", "-moi"]),
    ("«\u00a0Oui\u00a0!\u00a0»\u202f:", ["«\u00a0", "Oui", "\u00a0!", "\u00a0»", "\u202f:"]),
    ("35 heures, 1\u202f607 h", ["35", " heures", ",", " ", "1", "\u202f", "607", " h"]),
    ("en 2026", ["en", " ", "202", "6"]),
    ("e\u0301te\u0301", ["e\u0301te\u0301"]),
    ("a  b\n\n  c\t", ["a", " ", " b", "\n\n", " ", " c", "\t"]),
    ("<|pad|>", ["<|", "pad", "|>"]),
    ("", []),
])
def test_pieces_of_french(tokenizer, text, pieces):
    assert tokenizer.pieces(text) == pieces


@given(st.one_of(UNICODE, FRENCH))
def test_pieces_are_those_of_tokenizers(text):
    ours = list(isolated(regex.compile(PATTERN), text))
    assert "".join(ours) == text
    assert ours == [text[start:end] for _, (start, end) in split().pre_tokenize_str(text)]


def test_engines_only_differ_on_characters_unknown_to_python():
    """Oniguruma et `regex` ne suivent pas la même version d’Unicode ; tout ce que Python connaît est
    d’accord."""
    assigned = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    text = "".join(assigned)
    for kind in (r"\s", r"[\p{L}\p{M}]", r"\p{N}"):
        kept = pre_tokenizers.Split(Regex(kind), "removed").pre_tokenize_str(text)
        assert "".join(piece for piece, _ in kept) == regex.sub(kind, "", text)


def test_alphabet_is_that_of_tokenizers_in_order():
    alphabet = byte_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert list(alphabet.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())


# L’apprentissage.


WORDS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


@given(st.dictionaries(WORDS, st.integers(1, 5), max_size=6))
def test_incremental_learning_equals_recounting(words):
    assert learn_merges(words, 12, 3) == merges_by_recounting(words, 12, 3)


def test_overlaps_count_and_ties_go_to_the_smallest_pair():
    assert learn_merges({(0, 0, 0): 1, (1, 2): 2}, 1, 3) == [(0, 0)]
    assert learn_merges({(2, 1): 1, (1, 2): 1, (1, 1): 1}, 3, 3) == [(1, 1), (1, 2), (2, 1)]


@settings(max_examples=40)
@given(st.lists(st.text("abé ", max_size=30), min_size=1, max_size=5).filter(lambda texts: any(texts)))
def test_small_corpora_learn_as_tokenizers(texts):
    ours, theirs = BPETokenizer.train(texts, 300), reference(texts, 300, split())
    model = json.loads(theirs.to_str())["model"]
    assert [list(pair) for pair in ours.vocabulary.merges] == model["merges"]
    assert ours.vocabulary.special_tokens | ours.vocabulary.tokens == model["vocab"]


def test_the_course_corpus_learns_and_encodes_as_tokenizers(texts):
    ours, theirs = BPETokenizer.train(texts, 2048), reference(texts, 2048, split())
    model = json.loads(theirs.to_str())["model"]
    assert ours.vocab_size == 2048
    assert [list(pair) for pair in ours.vocabulary.merges] == model["merges"]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text).ids for text in texts]


def test_exhausted_corpus_gives_a_smaller_vocabulary():
    tokenizer = BPETokenizer.train(["abab"], 4096)
    assert tokenizer.vocab_size == len(SPECIAL_TOKENS) + 256 + 2
    assert len(tokenizer.encode("abab")) == 1


def test_incremental_learning_is_much_faster(texts):
    """Le rapport croît avec le corpus et le vocabulaire : 50 au moins pour 5 Mo et 4 096 jetons (essai
    `reseau`)."""
    pattern = regex.compile(PATTERN)
    words = Counter(tuple(piece.encode()) for text in texts[:100] for piece in isolated(pattern, text))
    start = time.process_time()
    merges = learn_merges(words, 100, 256)
    middle = time.process_time()
    assert merges_by_recounting(words, 100, 256) == merges
    assert time.process_time() - middle > 8 * (middle - start)


# Encoder et décoder.


@given(st.one_of(UNICODE, FRENCH, HOSTILE))
def test_any_text_round_trips_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


@given(st.one_of(UNICODE, FRENCH))
def test_exported_tokenizer_gives_the_same_ids(tokenizer, exported, text):
    assert exported(text).input_ids == tokenizer.encode(text)


def test_exported_tokenizer_gives_the_same_ids_on_the_course_corpus(tokenizer, exported, texts):
    assert isinstance(exported, PreTrainedTokenizerFast)
    assert exported(texts).input_ids == [tokenizer.encode(text) for text in texts]


@given(st.lists(st.integers(0, 1023), max_size=30))
def test_decoding_any_ids_is_that_of_transformers(tokenizer, exported, ids):
    for skip in (False, True):
        assert tokenizer.decode(ids, skip) == exported.decode(ids, skip_special_tokens=skip)


def test_partial_characters_and_special_tokens_decode(tokenizer):
    bare = BPETokenizer.train(["a"], 262)
    ids = bare.encode("é€")
    assert [bare.decode(ids[:n]) for n in range(6)] == ["", "\ufffd", "é", "é\ufffd", "é\ufffd", "é€"]
    chat, _ = tokenizer.encode_chat(CHAT[1:2])
    assert tokenizer.decode(chat) == f"<|begin_of_text|><|user|>{CHAT[1]['content']}<|end_of_text|>"
    assert tokenizer.decode(chat, skip_special_tokens=True) == CHAT[1]["content"]
    torch = pytest.importorskip("torch")
    assert tokenizer.decode(torch.tensor(chat)) == tokenizer.decode(chat)


def test_merges_apply_in_the_order_they_were_learnt():
    ranks = {(0, 1): (1, 5), (1, 2): (0, 4)}
    assert apply_merges([0, 1, 2], ranks) == [0, 4]
    assert apply_merges([0, 0, 0], {(0, 0): (0, 9)}) == [9, 0]


def test_characters(texts):
    tokenizer = SimpleCharTokenizer.train(["été", "l’an"])
    assert list(tokenizer.vocabulary.tokens) == sorted("étl’an")
    assert tokenizer.vocab_size == len(SPECIAL_TOKENS) + 6
    assert tokenizer.decode(tokenizer.encode("l’été")) == "l’été"
    assert tokenizer.to_transformers()("l’été").input_ids == tokenizer.encode("l’été")
    assert tokenizer.to_transformers().decode(tokenizer.encode("l’été")) == "l’été"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_characters_round_trip(text):
    tokenizer = SimpleCharTokenizer.train([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


# La conversation.


def test_chat_layout_and_mask(tokenizer):
    ids, mask = tokenizer.encode_chat(CHAT[1:3])
    question, answer = (tokenizer.encode(message["content"]) for message in CHAT[1:3])
    bos, eos, _, _, user, assistant = range(6)
    assert ids == [bos, user, *question, eos, assistant, *answer, eos]
    assert mask == [0] * (len(question) + 4) + [1] * (len(answer) + 1)
    prompt, nothing = tokenizer.encode_chat(CHAT[1:2], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and not any(nothing)


def test_exported_template_gives_the_same_ids(tokenizer, exported):
    for end, generate in itertools.product(range(1, len(CHAT) + 1), (False, True)):
        ours, _ = tokenizer.encode_chat(CHAT[:end], add_generation_prompt=generate)
        theirs = exported.apply_chat_template(CHAT[:end], add_generation_prompt=generate, return_dict=False)
        assert ours == theirs


@given(st.lists(st.builds(dict, role=st.sampled_from(list(ROLES)), content=HOSTILE), min_size=1, max_size=4))
def test_messages_cannot_inject_special_tokens(tokenizer, exported, messages):
    ids, mask = tokenizer.encode_chat(messages)
    specials = set(tokenizer.special_tokens.values())
    assert len([i for i in ids if i in specials]) == 1 + 2 * len(messages)
    assert len(ids) == len(mask)
    assert TransformersTokenizer(exported).encode_chat(messages) == (ids, mask)


def test_what_the_exported_template_cannot_promise(tokenizer, exported):
    """La documentation de `to_transformers` le dit : un jeton spécial dans un message y redevient spécial."""
    messages = [{"role": "user", "content": "<|assistant|>"}]
    assert exported.apply_chat_template(messages, return_dict=False) != tokenizer.encode_chat(messages)[0]


def test_foreign_template_by_segments(tokenizer):
    """Un gabarit à la ChatML, comme celui de SmolLM2 : en-têtes en texte, message système ajouté."""
    template = (
        "{% if messages[0]['role'] != 'system' %}<|pad|>system\nTu aides.<|end_of_text|>\n{% endif %}"
        "{% for m in messages %}<|pad|>{{ m['role'] }}\n{{ m['content'] }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|pad|>assistant\n{% endif %}"
    )
    foreign = tokenizer.to_transformers()
    foreign.chat_template = template
    adapted = as_tokenizer(foreign)
    for generate in (False, True):
        ids, mask = adapted.encode_chat(CHAT[1:3], add_generation_prompt=generate)
        options = {"add_generation_prompt": generate, "return_dict": False}
        assert ids == foreign.apply_chat_template(CHAT[1:3], **options)
        learnt = [i for i, kept in zip(ids, mask, strict=True) if kept]
        assert adapted.decode(learnt) == CHAT[2]["content"] + "<|end_of_text|>"
    assert as_tokenizer(adapted) is adapted and as_tokenizer(tokenizer) is tokenizer
    assert adapted.to_transformers() is foreign
    assert (adapted.bos_id, adapted.eos_id, adapted.pad_id, adapted.vocab_size) == (0, 1, 2, 1024)
    assert adapted.encode_document("été") == tokenizer.encode("été") == tokenizer.encode_document("été")[1:]


@pytest.mark.parametrize(("messages", "error"), [
    ([], "liste non vide"),
    ("Bonjour", "liste non vide"),
    ({"role": "user", "content": "Bonjour"}, "liste non vide"),
    (["Bonjour"], "Message 1 : rôle None"),
    ([{"content": "Bonjour"}], "Message 1 : rôle None"),
    ([CHAT[1], {"role": "robot", "content": "x"}], "Message 2 : rôle 'robot' inconnu ; les rôles"),
    ([{"role": "user", "content": None}], "Message 1 : « content » doit être un texte"),
    ([{"role": "user"}], "Message 1 : « content » doit être un texte"),
])
def test_malformed_conversations(tokenizer, exported, messages, error):
    for each in (tokenizer, as_tokenizer(exported)):
        with pytest.raises(LlamaError, match=re.escape(error)):
            each.encode_chat(messages)


@pytest.mark.parametrize(("template", "error"), [
    (None, "n’a pas de gabarit"),
    ("{{ raise_exception('non') }}", "refuse ces messages"),
    ("{{ messages[0]['content'] }}", "n’insère pas chaque message"),
    ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "n’insère pas chaque message"),
])
def test_unusable_templates(tokenizer, template, error):
    foreign = tokenizer.to_transformers()
    foreign.chat_template = template
    with pytest.raises(LlamaError, match=error):
        as_tokenizer(foreign).encode_chat(CHAT[1:3])


# Les fichiers.


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    return tmp_path / "t"


def test_saved_folder_loads_here_and_in_transformers(tokenizer, folder, texts):
    loaded, auto = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, BPETokenizer) and loaded.vocabulary == tokenizer.vocabulary
    assert auto(texts[:20]).input_ids == [tokenizer.encode(text) for text in texts[:20]]
    assert auto.chat_template == CHAT_TEMPLATE
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == (BOS, EOS, PAD)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 2)
    auto.save_pretrained(folder.with_name("u"))
    assert BPETokenizer.load(folder.with_name("u")).vocabulary == tokenizer.vocabulary


def test_single_file_and_characters(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "seul.json")
    assert os.listdir(tmp_path) == ["seul.json"]
    alone = BPETokenizer.load(tmp_path / "seul.json")
    assert alone.vocabulary == tokenizer.vocabulary and alone.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
    characters = SimpleCharTokenizer.train(["été"])
    characters.save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c").vocabulary == characters.vocabulary
    with pytest.raises(LlamaError, match="est un SimpleCharTokenizer"):
        BPETokenizer.load(tmp_path / "c")
    with pytest.raises(LlamaError, match="est un BPETokenizer"):
        SimpleCharTokenizer.load(tmp_path / "seul.json")


def test_nothing_is_overwritten_without_force(tokenizer, folder):
    before = (folder / "tokenizer.json").read_bytes()
    other = BPETokenizer.train(["autre"], 300)
    with pytest.raises(LlamaError, match="existe déjà"):
        other.save(folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    other.save(folder, force=True)
    assert BPETokenizer.load(folder).vocabulary == other.vocabulary


def test_a_failed_write_leaves_the_old_file(tokenizer, folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llama.vocabulary.os.replace", full)
    with pytest.raises(LlamaError, match="ne peut pas être écrit .disque plein"):
        BPETokenizer.train(["autre"], 300).save(folder, force=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / "fichier").write_text("x")
    with pytest.raises(LlamaError, match="ne peut pas être écrit"):
        tokenizer.save(tmp_path / "fichier" / "t")


def edit(**changes):
    """Remplace des parties du fichier : `model__vocab=…` est `data["model"]["vocab"]`."""
    def apply(data):
        for path, value in changes.items():
            *parents, key = path.split("__")
            part = functools.reduce(dict.__getitem__, parents, data)
            part[key] = value(part[key]) if callable(value) else value
    return apply


SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
MALFORMED = {
    "sa version est '2.0'": edit(version="2.0"),
    "sa version est None": lambda data: data.pop("version"),
    "sa partie « model » manque": lambda data: data.pop("model"),
    "son modèle est de type 'Unigram'": edit(model__type="Unigram"),
    "son modèle est de type None": edit(model__type=None),
    "il normalise les textes": edit(normalizer={"type": "NFC"}),
    "il demande l’option « byte_fallback »": edit(model__byte_fallback=True),
    "il demande l’option « dropout »": edit(model__dropout=0.1),
    "il demande l’option « end_of_word_suffix »": edit(model__end_of_word_suffix="</w>"),
    "son vocabulaire (« vocab ») manque": edit(model__vocab=None),
    "un identifiant n’est pas un entier positif": edit(model__vocab=lambda vocab: vocab | {"ab": "12"}),
    "deux jetons ont le même identifiant": edit(model__vocab=lambda vocab: vocab | {"zzzz": 300}),
    "n’est pas une suite d’octets": edit(model__vocab=lambda vocab: vocab | {"日本": 5000}),
    "la liste de ses fusions (« merges ») manque": edit(model__merges=None),
    "sa fusion 0 est mal formée": edit(model__merges=["abc"]),
    "sa fusion 1 est mal formée": edit(model__merges=[["e", "s"], ["e", 3]]),
    "le jeton '<|pad|>' de sa fusion 0": edit(
        model__vocab=lambda vocab: vocab | {"<|": 5000, "pad|>": 5001}, model__merges=[["<|", "pad|>"]]
    ),
    "le jeton 'zq' de sa fusion 0 manque au vocabulaire": edit(model__merges=["z q"]),
    "« added_tokens » n’est pas une liste": edit(added_tokens={}),
    "son jeton spécial {'id': 0} est mal formé": edit(added_tokens=[{"id": 0}]),
    "l’identifiant 6 est celui de": edit(added_tokens=[{"id": 6, "content": "<|x|>"}]),
    "le jeton '!' a deux identifiants": edit(added_tokens=[{"id": 9000, "content": "!"}]),
    "son prédécoupage (« pre_tokenizer ») manque": edit(pre_tokenizer=None),
    "son prédécoupage 'Whitespace'": edit(pre_tokenizer={"type": "Whitespace"}),
    "son prédécoupage 'ByteLevel'": edit(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    "son prédécoupage 'Split'": edit(pre_tokenizer=SPLIT | {"invert": True}),
    "son motif de prédécoupage est invalide": edit(pre_tokenizer=SPLIT),
    "il n’est pas au niveau de l’octet": edit(pre_tokenizer=SPLIT | {"pattern": {"Regex": "a"}}),
    "ses mots ne sont pas des caractères": edit(model__type="WordLevel"),
}


@pytest.mark.parametrize("error", MALFORMED)
def test_foreign_files_are_refused(folder, error):
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    MALFORMED[error](data)
    file.write_text(json.dumps(data), encoding="utf-8")
    before = snapshot(folder)
    with pytest.raises(LlamaError, match=re.escape(error)) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value) and snapshot(folder) == before


@pytest.mark.parametrize(("name", "content", "error"), [
    ("tokenizer.json", None, "introuvable : vérifiez le chemin"),
    ("tokenizer.json", b"", "n’est pas du JSON complet (ligne 1)"),
    ("tokenizer.json", b'{"version": "1.0",\n "model": {"vo', "n’est pas du JSON complet (ligne 2)"),
    ("tokenizer.json", b"\x80\x04\x95", "n’est pas du JSON (l’octet 0 n’est pas de l’UTF-8)"),
    ("tokenizer.json", b"[1, 2]", "ce n’est pas un objet JSON"),
    ("tokenizer_config.json", b"[]", "« tokenizer_config.json » n’est pas un objet JSON"),
    ("tokenizer.json", b"[" * 100_000, "n’est pas du JSON complet"),
    ("tokenizer.json", b'{"version": ' + b"1" * 5_000, "n’est pas du JSON complet"),
    ("chat_template.jinja", b"\xff", "n’est pas un tokenizer que le cours sait lire"),
    ("tokenizer_config.json", b'{"eos_token": ["<s>"]}', "son eos_token ['<s>'] n’est pas un jeton spécial"),
    ("tokenizer_config.json", b'{"bos_token": "<s>"}', "son bos_token '<s>' n’est pas un jeton spécial"),
    ("tokenizer_config.json", b"{", "n’est pas du JSON complet"),
])
def test_damaged_files(folder, name, content, error):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    before = snapshot(folder)
    with pytest.raises(LlamaError, match=re.escape(error)) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value) and snapshot(folder) == before


def test_a_folder_in_place_of_the_file(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(LlamaError, match="est illisible"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(("call", "error"), [
    (lambda t: t.encode("ab\ud83d"), "U+D83D à la position 2"),
    (lambda t: t.encode(None), "Un texte (str) est attendu, non NoneType"),
    (lambda t: t.encode(b"octets"), "Un texte (str) est attendu, non bytes"),
    (lambda t: t.decode([5, 99_999]), "Identifiant 99999 inconnu de ce tokenizer, qui en a 1024"),
    (lambda t: t.decode([-1]), "Identifiant -1 inconnu"),
    (lambda _: BPETokenizer.train(["texte"], 261), "vocab_size (261) doit être d’au moins 262"),
    (lambda _: BPETokenizer.train([], 300), "Corpus vide"),
    (lambda _: BPETokenizer.train(["", ""], 300), "Corpus vide"),
    (lambda _: BPETokenizer.train("texte", 300), "une liste de textes"),
    (lambda _: BPETokenizer.train(["a", 3], 300), "Un texte (str) est attendu, non int"),
    (lambda _: BPETokenizer.train(["a\udc00"], 300), "U+DC00 à la position 1"),
    (lambda _: BPETokenizer.train(["a"], 300, ["<s>", "<s>"]), "Jetons spéciaux vides ou répétés"),
    (lambda _: BPETokenizer.train(["a"], 300, [""]), "Jetons spéciaux vides ou répétés"),
    (lambda _: BPETokenizer.train(["a"], 300, ["a"]), "Un jeton spécial est aussi un jeton ordinaire"),
    (lambda _: BPETokenizer.train(["a"], 300, ["<s>"]).encode_chat(CHAT), "n’a pas les jetons de conv"),
    (lambda _: SimpleCharTokenizer.train([]), "Corpus vide"),
    (lambda _: SimpleCharTokenizer.train("texte"), "une liste de textes"),
    (lambda _: SimpleCharTokenizer.train(["abc"]).encode("abça"), "inconnu 'ç' (U+00E7) à la position 2"),
])
def test_errors_name_the_cause(tokenizer, call, error):
    with pytest.raises(LlamaError, match=re.escape(error)) as caught:
        call(tokenizer)
    assert "\n" not in str(caught.value)


# Les tokenizers d’autres modèles.


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize("pre_tokenizer", [
    GPT2,
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    pre_tokenizers.Sequence([pre_tokenizers.Digits(), GPT2]),
    split(),
], ids=["gpt2", "smollm", "nombres", "motif"])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_other_models_files(texts, tmp_path, pre_tokenizer, ignore_merges):
    theirs = reference(texts[:200], 600, pre_tokenizer, ["<s>"], ignore_merges=ignore_merges)
    data = json.loads(theirs.to_str())
    data["model"]["vocab"]["Ġbonjour"] = 600  # un mot entier, que seul ignore_merges peut donner
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<s>"}}')
    ours = BPETokenizer.load(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    samples = [*texts[:100], "Le 12 mars 2026, à 7\u00a0h 30 : don't", "il dit bonjour"]
    assert [ours.encode(text) for text in samples] == [theirs.encode(text).ids for text in samples]
    assert (ours.encode("il dit bonjour")[-1] == 600) == ignore_merges
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (None, 0, 601)
    assert ours.encode_document("été") == ours.encode("été")


def test_a_vocabulary_without_every_byte(folder):
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    missing = byte_alphabet()[0xF0]
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if missing not in "".join(pair)]
    data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if missing not in token}
    file.write_text(json.dumps(data), encoding="utf-8")
    tokenizer = BPETokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("été")) == "été"
    with pytest.raises(LlamaError, match="L’octet 0xF0 de ' 😀' n’a pas de jeton"):
        tokenizer.encode("oui 😀")


# De vrais textes, en nombre.


@pytest.mark.reseau
def test_ten_thousand_french_strings():
    lines = [line for document in sources.documents("fiches-travail") for line in document.text.split("\n")]
    strings = list(dict.fromkeys(line for line in lines if line))[:10_000]
    assert len(strings) == 10_000
    tokenizer = BPETokenizer.train(strings, 4096)
    assert tokenizer.to_transformers()(strings).input_ids == [tokenizer.encode(text) for text in strings]


@pytest.mark.reseau
def test_training_speed_on_five_megabytes():
    """4 096 jetons en moins de 20 s, cinquante fois plus vite qu’en recomptant tout.

    Recompter dure des minutes ; un tour y coûte de moins en moins, à mesure que les mots raccourcissent : le
    coût du dernier, multiplié par leur nombre, minore le total.
    """
    texts, size = [], 0
    for document in sources.documents("fiches-service-public"):
        texts.append(document.text)
        size += len(document.text.encode())
        if size > 5_000_000:
            break
    start = time.process_time()
    tokenizer = BPETokenizer.train(texts, 4096)
    seconds = time.process_time() - start
    assert tokenizer.vocab_size == 4096 and seconds < 20
    pieces = Counter(piece for text in texts for piece in tokenizer.pieces(text))
    merged = {}
    for piece, count in pieces.items():
        word = tuple(tokenizer.encode(piece))
        merged[word] = merged.get(word, 0) + count
    start = time.process_time()
    merges_by_recounting(merged, 10, 4096)
    bound = (time.process_time() - start) / 10 * len(tokenizer.vocabulary.merges)
    assert bound > 50 * seconds, f"{seconds:.2f} s contre {bound:.0f} s au moins"
