"""`data`, `readers`, `duplicates`, `corpus` : des exemples exacts, une ligne claire par mauvaise entrée."""

import itertools
import json
import random
import re
import time
import urllib.error

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import snapshot

from llama import sources
from llama.chat import as_tokenizer
from llama.config import Config, LlamaError
from llama.corpus import ALPACA, corpus
from llama.data import (
    Examples,
    check_vocabulary,
    load_and_prepare_french_data,
    pack,
    question_examples,
    split,
)
from llama.duplicates import deduplicate, leaks, near_duplicates
from llama.readers import read_pairs, read_table, read_texts
from llama.tokenization import BPETokenizer, SimpleCharTokenizer

settings.register_profile("sans délai", deadline=None)  # la machine est parfois chargée
settings.load_profile("sans délai")

PAIRS = [("Qu’est-ce qu’un CDI ?", "Un contrat à durée indéterminée."), ("Oui ?", "Non."), ("Qui ?", "Vous.")]


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([document.text for document in sources.documents("atelier")], 512)


# Les blocs.


def test_packing_by_hand():
    packed = pack([[10, 11], [20, 21, 22], [30]], 4, eos_id=1)
    assert packed.ids.tolist() == [[10, 11, 1, 20], [21, 22, 1, 30]]
    assert packed.labels.tolist() == [[11, 1, -100, 21], [22, 1, -100, 1]]
    assert packed.mask.tolist() == [[1, 1, 1, 2], [1, 1, 1, 2]]
    together = pack([[10, 11], [20, 21, 22], [30]], 4, eos_id=1, separate=False)
    assert together.ids.equal(packed.ids) and together.mask.tolist() == [[1] * 4] * 2
    assert together.labels.tolist() == [[11, 1, 20, 21], [22, 1, 30, 1]]


DOCUMENTS = st.lists(st.lists(st.integers(2, 99), max_size=12), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(1, 9))
def test_packing_keeps_every_token_and_separates_documents(documents, block_size):
    stream = [(token, n) for n, document in enumerate(documents) if document for token in [*document, 1]]
    n_blocks = max(0, len(stream) - 1) // block_size
    if not n_blocks:
        with pytest.raises(LlamaError, match="Corpus vide|Texte trop court"):
            pack(documents, block_size, eos_id=1)
        return
    packed = pack(documents, block_size, eos_id=1)
    assert packed.ids.shape == (n_blocks, block_size)
    for t in range(n_blocks * block_size):
        (token, owner), (following, next_owner) = stream[t : t + 2]
        row, column = divmod(t, block_size)
        assert packed.ids[row, column] == token
        assert packed.labels[row, column] == (following if owner == next_owner else -100)
        same = [stream[row * block_size + s][1] == owner for s in range(block_size)]
        assert (packed.mask[row] == packed.mask[row, column]).tolist() == same
    assert (packed.mask[:, 0] == 1).all() and (packed.mask > 0).all()


def test_packing_takes_a_generator_and_no_end():
    documents = (list(range(5)) for _ in range(2))
    assert pack(documents, 3, eos_id=None).ids.tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


# Les conversations.


def test_questions_learn_only_their_answers(tokenizer):
    examples = question_examples(PAIRS, tokenizer, 48)
    assert examples.ids.shape == (3, 48)
    for (question, answer), ids, labels, mask in zip(PAIRS, *examples, strict=True):
        learnt = labels[labels != -100]
        assert tokenizer.decode(learnt) == answer + "<|end_of_text|>"
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (48 - n)
        assert (ids[n:] == tokenizer.pad_id).all() and (labels[n:] == -100).all()
        whole = [*ids[:n].tolist(), int(labels[n - 1])]
        assert tokenizer.decode(whole, skip_special_tokens=True) == question + answer


def test_labels_are_shifted_by_one(tokenizer):
    messages = [{"role": "user", "content": "Oui ?"}, {"role": "assistant", "content": "Non."}]
    ids, learnt = tokenizer.encode_chat(messages)
    examples = question_examples([("Oui ?", "Non.")], tokenizer, 16)
    for t, (following, kept) in enumerate(zip(ids[1:], learnt[1:], strict=True)):
        assert examples.ids[0, t] == ids[t]
        assert examples.labels[0, t] == (following if kept else -100)


def test_long_answers_are_cut_and_long_questions_left_out(tokenizer, capsys):
    long = "Une très longue question, vraiment très longue, " * 5
    examples = question_examples([(long, "Non."), ("Oui ?", long)], tokenizer, 24)
    assert examples.ids.shape == (1, 24) and examples.mask.all()
    assert examples.labels[0, -1] != -100
    assert capsys.readouterr().err == "Questions trop longues pour 24 jetons, omises : 1 sur 2.\n"


def test_questions_with_a_transformers_tokenizer(tokenizer):
    ours, theirs = question_examples(PAIRS, tokenizer, 48), tokenizer.to_transformers()
    for each in (theirs, as_tokenizer(theirs)):
        assert all(a.equal(b) for a, b in zip(ours, question_examples(PAIRS, each, 48), strict=True))


# Exemples, séparation, vocabulaire.


def test_examples_are_checked_and_selected():
    ids = torch.arange(6).reshape(3, 2)
    examples = Examples(ids, ids + 1, torch.ones_like(ids))
    assert examples.select([2, 0]).ids.tolist() == [[4, 5], [0, 1]]
    assert examples.select(slice(1)).labels.tolist() == [[1, 2]]
    first, second, third = examples
    assert isinstance(examples, tuple) and first is ids and third.all()


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_is_a_partition_in_order(n, fraction, seed):
    documents = list(range(n))
    train, val = split(documents, fraction, seed)
    assert sorted(train + val) == documents and train == sorted(train) and val == sorted(val)
    assert val and train and abs(len(val) - fraction * n) <= 1
    assert split(documents, fraction, seed) == (train, val)


def test_vocabulary_mismatch():
    config = Config(vocab_size=8, d_model=8, n_layers=1, n_heads=1)
    ids = torch.tensor([[1, 7]])
    check_vocabulary(Examples(ids, torch.tensor([[7, -100]]), ids), config)
    for wrong in (torch.tensor([[1, 8]]), torch.tensor([[1, -3]])):
        with pytest.raises(LlamaError, match=f"Le jeton {int(wrong[0, 1])} n’est pas au"):
            check_vocabulary(Examples(wrong, ids, ids), config)
    with pytest.raises(LlamaError, match="Le jeton 9 n’est pas au vocabulaire"):
        check_vocabulary(Examples(ids, torch.tensor([[9, 1]]), ids), config)


# Les quasi-doublons.


def variants(n, seed=0):
    """Des textes aléatoires, et pour chacun des copies de plus en plus changées."""
    generator = random.Random(seed)
    words = [f"mot{i}" for i in range(400)]
    texts = []
    for _ in range(n):
        base = generator.choices(words, k=generator.randint(3, 120))
        for rate in (0, 0.02, 0.05, 0.1, 0.3):
            changed = [generator.choice(words) if generator.random() < rate else word for word in base]
            texts.append(" ".join(changed))
    return texts


def by_brute_force(texts, n, threshold):
    sets = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        length = min(n, len(words))
        sets.append({tuple(words[i : i + length]) for i in range(len(words) - length + 1) if words})
    pairs = []
    for (i, a), (j, b) in itertools.combinations(enumerate(sets), 2):
        if a and b and len(a & b) / len(a | b) >= threshold:
            pairs.append((i, j, len(a & b) / len(a | b)))
    return pairs


@pytest.mark.parametrize(("n", "threshold"), [(5, 0.5), (3, 0.8), (1, 0.9), (2, 0.2), (5, 1.0)])
def test_near_duplicates_equal_brute_force(n, threshold):
    texts = [*variants(40), "", "  !  ", "Oui", "oui !", "Oui, oui."]
    found, expected = near_duplicates(texts, n, threshold), by_brute_force(texts, n, threshold)
    assert set(found) <= set(expected)
    missed = [pair for pair in expected if pair not in found]
    assert len(missed) <= 0.01 * len(expected) and all(jaccard < threshold + 0.15 for *_, jaccard in missed)
    assert found == sorted(found) == near_duplicates(texts, n, threshold)


def test_the_course_corpus_has_no_missed_duplicate():
    texts = [document.text for document in sources.documents("atelier")][:300]
    texts += [texts[0] + " Fin.", texts[5].upper(), texts[7].replace(",", " ;")]
    assert near_duplicates(texts) == by_brute_force(texts, 5, 0.5)
    assert {(0, 300), (5, 301), (7, 302)} <= {pair[:2] for pair in near_duplicates(texts)}


def test_deduplication_keeps_the_first_of_each():
    text = "le salarié a droit à un congé payé de cinq semaines par an"
    texts = [text, "tout autre chose que le reste des textes du corpus", text + " .", text.upper()]
    assert deduplicate(texts) == [0, 1]
    kept = deduplicate(variants(30))
    assert not near_duplicates([variants(30)[i] for i in kept])
    assert deduplicate([]) == [] and deduplicate(["seul"]) == [0]


def test_leaks_cross_the_split():
    text = "le salarié a droit à un congé payé de cinq semaines par an"
    train = ["rien de tel ici, vraiment rien du tout", text, text]
    assert leaks(train, [text + " !"]) == [(1, 0, 1.0), (2, 0, 1.0)]


# Les lecteurs.


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CSV = "question,answer\nOui ?,Non.\nQui ?,Vous.\n"
FORMATS = {
    "virgules.csv": CSV,
    "points-virgules.csv": "question;answer\r\nOui ?;Non.\r\n\r\nQui ?;Vous.\r\n",
    "tabulations.tsv": CSV.replace(",", "\t"),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "autres.csv": "id,question,answer\n1, Oui ? ,Non.\n2,Qui ?,Vous.\n",
    "liste.json": '[{"question": "Oui ?", "answer": "Non."}, {"answer": "Vous.", "question": "Qui ?"}]',
    "lignes.jsonl": '{"question": "Oui ?", "answer": "Non."}\n\n{"question": "Qui ?", "answer": "Vous."}\n',
    "français.csv": CSV.replace("answer", "réponse"),
    "alpaca.jsonl": '{"instruction": "Oui ?", "input": "", "output": "Non."}\n'
                    '{"instruction": "Qui ?", "input": null, "output": "Vous."}',
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same(tmp_path, name):
    pairs, report = read_pairs(write(tmp_path, name, FORMATS[name]))
    assert pairs == [("Oui ?", "Non."), ("Qui ?", "Vous.")] and report == []


def test_columns_context_and_encoding(tmp_path):
    path = write(tmp_path, "a.csv", "énoncé;corrigé\nété ?;là\n".encode("cp1252"))
    assert read_pairs(path, "énoncé", "corrigé", encoding="cp1252").pairs == [("été ?", "là")]
    row = {"instruction": "Traduis.", "input": "Hello", "output": "Bonjour"}
    path = write(tmp_path, "b.json", json.dumps([row]))
    assert read_pairs(path).pairs == [("Traduis.\n\nHello", "Bonjour")]


def test_quoted_fields_keep_line_numbers(tmp_path):
    content = 'question,answer\n"Un,\ndeux ?","dit ""oui"""\n\nQui ?,\nOù ?,Ici\n'
    path = write(tmp_path, "a.csv", content)
    assert read_table(path).index.tolist() == [2, 5, 6]
    pairs, report = read_pairs(path)
    assert pairs[0] == ("Un,\ndeux ?", 'dit "oui"') and report == ["ligne 5 : réponse vide"]


def test_report_names_each_faulty_line(tmp_path):
    rows = [
        {"question": "Oui ?", "answer": "Non."},
        {"question": "  ", "answer": "x"},
        {"question": "Qui ?", "answer": ""},
        {"question": "Qui ?"},
        {"question": "Qui ?", "answer": None},
        {"question": 3, "answer": "x"},
        {"question": "Qui ?", "answer": ["x"]},
        {"question": "Oui ?", "answer": " Non. "},
        {"question": "Qui ?", "answer": "\ud83d"},
    ]
    expected = [
        "2 : question vide", "3 : réponse vide", "4 : réponse absente", "5 : réponse absente",
        "6 : question n’est pas un texte (3)",
        "7 : réponse n’est pas un texte (['x'])",
        "8 : déjà vue {} 1",
        "9 : réponse avec une moitié de paire UTF-16, qui n’est pas un caractère",
    ]
    for name, content, unit in (("a.json", json.dumps(rows), "élément"),
                                ("a.jsonl", "\n".join(map(json.dumps, rows)), "ligne")):
        pairs, report = read_pairs(write(tmp_path, name, content))
        assert pairs == [("Oui ?", "Non.")]
        assert report == [f"{unit} {line.format(unit)}" for line in expected]


def test_texts_from_files_and_folders(tmp_path):
    write(tmp_path, "b.txt", "Un texte.\n")
    write(tmp_path, "a.jsonl", '{"text": "Deux."}\n{"text": " "}\n{"text": "Trois."}')
    write(tmp_path, "notes.md", "ignoré")
    (tmp_path / "sous").mkdir()
    write(tmp_path / "sous", "c.csv", "titre,texte\nx,Quatre.\n")
    assert read_texts(tmp_path) == ["Deux.", "Trois.", "Un texte.\n", "Quatre."]


BAD_TABLES = [
    ("a.csv", "", "est vide"),
    ("a.csv", " \n\n", "est vide"),
    ("a.csv", "question,answer\n", "ne contient aucune donnée"),
    ("a.csv", "question,answer\nOui,Non\nQui,Vous,Moi\n", "ligne 3 : 2 champs attendus, 3 trouvés ; mettez"),
    ("a.csv", "question,answer\nOui\n", "ligne 2 : 2 champs attendus, 1 trouvés"),
    ("a.csv", 'question,answer\n"Oui,Non\nQui,Vous\n', "ligne 2 : un guillemet droit n’est pas refermé"),
    ("a.csv", 'question,answer\nOui,"Non" merci\n', "ligne 2 : un guillemet droit dans un texte n’est"),
    ("a.csv", "question,question\na,b\n", "ligne 1 : deux colonnes ont le même nom"),
    ("a.csv", "question,answer\né,à\n".encode("cp1252"), "pas en utf-8 (ligne 2), mais sans doute en cp1252"),
    ("a.csv", CSV.encode("utf-16"), "pas en utf-8 (ligne 1), mais sans doute en utf-16"),
    ("a.csv", b"question,answer\nOui,\x00\n", "contient des octets nuls"),
    ("a.csv", "q;r\nOui;Non\n", "dites quelles colonnes sont les questions et les réponses (input_key"),
    ("a.csv", "q;r\nOui;Non\n", "ses colonnes : « q », « r »"),
    ("a.csv", "question,answer\n,\n ,x\n", "n’a aucune question avec sa réponse (ligne 3 : question vide)"),
    ("a.json", "", "est vide"),
    ("a.json", "[{]", "ligne 1 : JSON mal formé à la colonne 3"),
    ("a.json", '[{"question": "Oui",\n "answer": "No', "ligne 2 : JSON mal formé à la colonne 12"),
    ("a.json", '{"question": "Oui", "answer": "Non"}', "ligne 1 : une liste d’objets est attendue"),
    ("a.json", '[{"question": "Oui", "answer": "Non"}, "x"]', "élément 2 : un objet {…} est attendu"),
    ("a.json", "[]", "ne contient aucune donnée"),
    ("a.json", '[{"question": 1, "answer": 2}]', "(élément 1 : question n’est pas un texte (1))"),
    ("a.json", "[{}]", "ses colonnes : ."),
    ("a.jsonl", '{"question": "Oui", "answer": "Non"}\n{"question": \n', "ligne 2 : JSON mal formé à la"),
    ("a.jsonl", '{"question": "Oui", "answer": "Non"}\n\n["x"]\n', "ligne 3 : un objet {…} est attendu"),
    ("a.jsonl", "question,answer\nOui,Non\n", "ligne 1 : JSON mal formé à la colonne 1"),
    ("a.json", "[" * 100_000, "JSON mal formé"),
    ("a.jsonl", '{"question": ' + "1" * 5_000, "ligne 1 : JSON mal formé"),
    ("a.jsonl", b'{"question": "\xff"}', "n’est pas en utf-8 (ligne 1)"),
    ("a.txt", "Oui", "n’est pas un tableau : donnez un fichier .csv, .tsv, .json, .jsonl"),
    ("a.xlsx", "Oui", "n’est pas un tableau"),
]


@pytest.mark.parametrize(("name", "content", "error"), BAD_TABLES)
def test_bad_tables(tmp_path, name, content, error):
    path = write(tmp_path, name, content)
    before = snapshot(tmp_path)
    with pytest.raises(LlamaError, match=re.escape(error)) as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("call", "error"), [
    (lambda d: read_pairs(d / "absent.csv"), "introuvable : vérifiez le chemin"),
    (lambda d: read_table(d), "est un dossier : donnez le chemin d’un fichier"),
    (lambda d: read_table(write(d, "a.csv", CSV) / "b.csv"), "est illisible"),
    (lambda d: read_pairs(write(d, "a.csv", CSV), "question", "réponse"),
     "n’a pas de colonne « réponse » ; ses colonnes : « question », « answer »"),
    (lambda d: read_pairs(write(d, "a.csv", CSV), "question"), "Donnez input_key et output_key"),
    (lambda d: read_pairs(write(d, "a.csv", CSV), encoding="klingon"), "Encodage « klingon » inconnu"),
    (lambda d: read_texts(d), "ne contient aucun fichier .csv, .tsv, .json, .jsonl, .txt"),
    (lambda d: read_texts(write(d, "a.txt", "\n")), "est vide"),
    (lambda d: read_texts(write(d, "a.txt", "été".encode("cp1252"))), "sans doute en cp1252"),
    (lambda d: read_texts(write(d, "a.csv", CSV)), "n’a pas de colonne de texte (text, texte, content"),
    (lambda d: read_texts(write(d, "a.jsonl", '{"text": ""}')), "ne contient aucun texte"),
    (lambda d: read_texts(d / "absent"), "introuvable"),
    (lambda d: pack([], 4, eos_id=1), "Corpus vide"),
    (lambda d: pack([[], []], 4, eos_id=1), "Corpus vide"),
    (lambda d: pack([[5, 6, 7]], 4, eos_id=1), "Texte trop court : 4 jetons pour des blocs de 4, plus un"),
    (lambda d: pack([[5]], 0, eos_id=1), "block_size doit être un entier strictement positif (reçu : 0)"),
    (lambda d: pack([[5]], 2.5, eos_id=1), "block_size doit être un entier"),
    (lambda d: split(["seul"]), "Il faut au moins deux documents"),
    (lambda d: split(["a", "b"], 0), "val_fraction est entre 0 et 1, exclus (reçu : 0)"),
    (lambda d: split(["a", "b"], 1.5), "val_fraction est entre 0 et 1"),
    (lambda d: near_duplicates(["a"], threshold=0), "threshold (0) est dans ]0, 1]"),
    (lambda d: near_duplicates(["a"], n=0), "n (0) au moins 1"),
    (lambda d: Examples(*(torch.zeros(2) for _ in range(3))), "ids ((2,), torch.float32) doit être int64"),
    (lambda d: Examples(*(torch.zeros(2, n).long() for n in (3, 4, 3))), "labels ((2, 4), torch.int64)"),
])
def test_bad_calls(tmp_path, call, error):
    with pytest.raises(LlamaError, match=re.escape(error)) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("pairs", "error"), [
    ([], "Corpus vide : aucune question"),
    ([("Une longue question " * 20, "Non.")], "Aucune question ne laisse de place à sa réponse en 16 jetons"),
])
def test_unusable_questions(tokenizer, pairs, error):
    with pytest.raises(LlamaError, match=re.escape(error)):
        question_examples(pairs, tokenizer, 16)


def test_unknown_characters_in_questions_are_named():
    with pytest.raises(LlamaError, match="Caractère inconnu 'ù'"):
        question_examples([("Où ?", "Ici")], SimpleCharTokenizer.train(["O ?Ici"]), 16)


# Du nom au tenseur.


def test_sources_give_blocks_and_questions(tokenizer):
    train, val = load_and_prepare_french_data("atelier", tokenizer, 64)
    assert train.ids.shape[1] == 64 and len(val.ids) < len(train.ids)
    assert train.ids[0, 0] == tokenizer.bos_id and train.mask.max() > 1
    assert tokenizer.decode(train.ids[0][1:]).startswith(sources.documents("atelier")[0].title[:20])
    options = {"questions": True, "val_fraction": 0.2}
    asked, held_out = load_and_prepare_french_data("atelier", tokenizer, 256, **options)
    assert (asked.mask == 0).any() and abs(len(held_out.ids) / len(asked.ids) - 0.25) < 0.02
    again, _ = load_and_prepare_french_data("atelier", tokenizer, 256, **options)
    assert again.ids.equal(asked.ids)
    check_vocabulary(asked, Config(vocab_size=tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=1))


def test_files_give_the_same_with_transformers_tokenizer(tokenizer, tmp_path):
    rows = [{"question": f"Question numéro {i} ?", "answer": f"Réponse {i * i}."} for i in range(20)]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    ours = load_and_prepare_french_data(path, tokenizer, 48)
    theirs = load_and_prepare_french_data(str(path), tokenizer.to_transformers(), 48)
    assert [len(part.ids) for part in ours] == [18, 2]
    assert all(a.equal(b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_what_resembles_the_evaluation_leaves_the_training(tokenizer, tmp_path):
    generator = random.Random(0)
    words = [word for document in sources.documents("atelier")[:40] for word in document.text.split()]
    texts = [" ".join(generator.choices(words, k=60)) for _ in range(10)]
    rows = [{"text": text} for text in texts] + [{"text": text + " Fin."} for text in texts]
    path = write(tmp_path, "a.json", json.dumps(rows))
    train, val = load_and_prepare_french_data(path, tokenizer, 32, val_fraction=0.25)
    heads = [{text[:30] for text in texts if tokenizer.decode(part.ids.flatten()).count(text[:30])}
             for part in (train, val)]
    assert heads[0] and heads[1] and not heads[0] & heads[1]


def test_a_single_text_is_cut_in_two(tokenizer, tmp_path):
    text = " ".join(f"mot{i}" for i in range(300))
    train, val = load_and_prepare_french_data(write(tmp_path, "a.txt", text), tokenizer, 16, val_fraction=0.2)
    assert tokenizer.decode(train.ids[0][1:]).startswith("mot0 mot1")
    assert tokenizer.decode(val.ids[0][1:]).startswith("mot2") and len(val.ids) < len(train.ids)


def test_faulty_lines_are_said(tokenizer, tmp_path, capsys):
    path = write(tmp_path, "a.csv", CSV + "Quand ?,\n")
    assert len(corpus(str(path))) == 2
    assert capsys.readouterr().err == f"« {path} », ligne 4 : réponse vide.\n"


class Hub:
    """Ce que rend `datasets.load_dataset`."""

    def __init__(self, rows):
        self.rows = rows

    def to_pandas(self):
        return pd.DataFrame(self.rows)


def test_hub_data(monkeypatch, tokenizer, capsys):
    inputs = ["vite", ""] * 6
    rows = [{"instruction": f"Calcule {i}.", "input": inputs[i], "output": str(i)} for i in range(12)]
    rows.append({"instruction": "Rien.", "input": "", "output": ""})
    def refused(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 403, "refusé", None, None)

    monkeypatch.setattr("llama.corpus.urllib.request.urlopen", refused)  # le Hub répond : on lit
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Hub(rows))
    pairs = corpus(ALPACA)
    assert pairs[:2] == [("Calcule 0.\n\nvite", "0"), ("Calcule 1.", "1")] and len(pairs) == 12
    assert "ligne 13 : réponse vide" in capsys.readouterr().err
    train, val = load_and_prepare_french_data(ALPACA, tokenizer, 32)
    assert len(train.ids) + len(val.ids) == 12
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Hub([{"a": "x", "b": "y"}]))
    with pytest.raises(LlamaError, match="ses colonnes : « a », « b »"):
        corpus("auteur/autre")


def test_without_the_hub_labour_law_replaces_it(monkeypatch, capsys):
    def offline(*_, **__):
        raise ConnectionError("pas de réseau")

    asked = sources.questions("atelier")
    monkeypatch.setattr("llama.corpus.urllib.request.urlopen", offline)
    known = {"contributions": asked[:3], "fiches-travail": asked[3:10]}
    monkeypatch.setattr(sources, "questions", known.get)
    assert corpus(ALPACA) == [(row["question"], row["réponse"]) for row in asked[:10]]
    said = capsys.readouterr().err
    assert "10 questions le remplacent (sources : contributions, fiches-travail)" in said
    assert said.count("\n") == 1

    def absent(name):
        if name != "atelier":
            raise LlamaError("npm introuvable")
        return asked

    monkeypatch.setattr(sources, "questions", absent)
    assert len(corpus(ALPACA)) == len(asked)
    assert "(sources : atelier)" in capsys.readouterr().err
    with pytest.raises(LlamaError, match="« auteur/autre » est hors d’atteinte sur le Hub .ConnectionError."):
        corpus("auteur/autre")


@pytest.mark.parametrize(("name", "options", "error"), [
    ("nulle-part", {}, "« nulle-part » introuvable : ce n’est ni un fichier, ni une source (cours, atelier,"),
    ("dossier/absent.csv", {}, "« dossier/absent.csv » introuvable"),
    ("atelier", {"val_fraction": 0}, "val_fraction est entre 0 et 1"),
    ("legi-data", {"questions": True}, "n’a pas de questions"),
])
def test_unknown_corpora(tokenizer, name, options, error):
    with pytest.raises(LlamaError, match=re.escape(error)):
        load_and_prepare_french_data(name, tokenizer, 64, **options)


@pytest.mark.parametrize(("rows", "error"), [
    (["Un texte court."], "part d’entraînement. Texte trop court"),
    (["Un texte assez long pour un bloc, lui. " * 3, "Court."], "Texte trop court"),
])
def test_corpora_shorter_than_a_block(tokenizer, tmp_path, rows, error):
    path = write(tmp_path, "a.json", json.dumps([{"text": text} for text in rows]))
    with pytest.raises(LlamaError, match=error) as caught:
        load_and_prepare_french_data(path, tokenizer, 32)
    assert "réduisez block_size" in str(caught.value) and "\n" not in str(caught.value)


# De vrais textes, en nombre.


@pytest.mark.reseau
def test_duplicates_of_the_public_sheets_in_a_minute():
    texts = [document.text for document in sources.documents("fiches-service-public")]
    start = time.process_time()
    found = near_duplicates(texts)
    assert time.process_time() - start < 60
    assert len(texts) > 5_000 and len(found) > 100
    sample = sorted(random.Random(0).sample(range(len(texts)), 200))
    place = {i: k for k, i in enumerate(sample)}
    kept = [(place[i], place[j], jaccard) for i, j, jaccard in found if i in place and j in place]
    assert kept == by_brute_force([texts[i] for i in sample], 5, 0.5)


@pytest.mark.reseau
def test_labour_law_questions_of_the_ministry():
    tokenizer = BPETokenizer.train(["a"], 262)
    examples, _ = load_and_prepare_french_data("fiches-travail", tokenizer, 1024, questions=True)
    assert len(examples.ids) > 100
