"""`runner` : la même interface que le service du même nom, sur cette machine, et des mesures qui disent vrai."""

import copy
import math
import sys

import pytest
import torch
from tiny_models import PAIRS, make_model, snapshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama import BasicModelRunner, LlamaError
from llama.data import question_examples
from llama.evaluation import token_f1
from llama.lora import adapter_names
from llama.training import mean_loss

QUICK = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("modèles") / "petit")


@pytest.fixture
def runner(folder):
    return BasicModelRunner(folder)


@pytest.fixture(scope="module")
def trained(folder):
    """Un modèle affiné sur toutes les questions ; les essais ne le changent pas."""
    runner = BasicModelRunner(folder)
    runner.add_pairs(PAIRS)
    runner.train(steps=60, batch_size=8, learning_rate=2e-2, patience=0, progress=False)
    return runner


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Répondre


def test_a_question_a_list_and_a_call(runner):
    questions = ["Combien font 2 et 3 ?", "Combien font 7 et 6, si l’on compte bien sur ses doigts ?", "Bonjour."]
    alone = [runner.predict(question, max_new_tokens=12) for question in questions]
    assert all(isinstance(answer, str) and answer for answer in alone)
    assert runner.predict(questions, max_new_tokens=12) == alone  # le lot ne change rien
    assert runner.predict(questions, max_new_tokens=12, batch_size=1) == alone
    assert runner(questions, max_new_tokens=12) == alone and runner(questions[0], max_new_tokens=12) == alone[0]


def test_sampling_does_not_depend_on_the_batch(runner):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    texts = ["un", "deux", "trois"]
    assert runner.predict(texts, **options) == runner.predict(texts, batch_size=2, **options)
    assert runner.predict(texts, **options) != runner.predict(texts, **options | {"seed": 4})


def test_stream_is_predict_in_pieces(runner):
    pieces = list(runner.stream("Combien font 1 et 1 ?", max_new_tokens=20))
    assert len(pieces) > 1 and "".join(pieces) == runner.predict("Combien font 1 et 1 ?", max_new_tokens=20)


def test_a_conversation_goes_through_the_template(runner):
    messages = [{"role": "user", "content": "Bonjour."}, {"role": "assistant", "content": "Bonjour !"},
                {"role": "user", "content": "Combien font 1 et 1 ?"}]
    text = runner.tokenizer.decode(runner.prompt(messages))
    assert text.endswith("<|user|>Combien font 1 et 1 ?<|end_of_text|><|assistant|>") and text.count("<|user|>") == 2
    assert runner.tokenizer.decode(runner.prompt("Bonjour.", raw=True)) == "<|begin_of_text|>Bonjour."


def test_a_base_model_continues_the_text(tmp_path):
    runner = BasicModelRunner(make_model(tmp_path / "base", template=False))
    assert not runner.chat
    assert runner.tokenizer.decode(runner.prompt("Le facteur")) == "<|begin_of_text|>Le facteur"


def test_the_answer_stops_where_the_model_does(runner):
    long = "Combien font 1 et 1 ? " * 2
    room = runner.model.config.block_size - len(runner.prompt(long))
    answers = runner.predict([long, "Bonjour."], max_new_tokens=500)
    lengths = [len(runner.tokenizer.encode(answer)) for answer in answers]
    assert 0 < lengths[0] <= room < lengths[1]


def refusals(runner):
    return [
        (lambda: runner.predict("  "), "Le texte est vide"),
        (lambda: runner.predict("mot " * 200), "Texte trop long"),
        (lambda: runner.predict("Bonjour.", temperature=-1), "temperature = -1"),
        (lambda: runner.predict("Bonjour.", max_new_tokens=0), "max_new_tokens"),
        (lambda: runner.predict(["Bonjour.", 3]), "Une conversation est une liste"),
        (lambda: runner.load_data([]), "liste de dictionnaires"),
        (lambda: runner.load_data("question"), "liste de dictionnaires"),
        (lambda: runner.load_data([("question", "réponse")]), "liste de dictionnaires"),
        (lambda: runner.load_data([{"a": "1", "b": "2"}]), "ses colonnes"),
        (lambda: runner.load_data([{"a": "1", "b": "2"}], "a", "c"), "« c »".replace(" ", "\u00a0")),
        (lambda: runner.load_data([{"question": "", "answer": "x"}]), "question vide"),
        (lambda: runner.load_data_from_jsonlines("absent.jsonl"), "introuvable"),
        (lambda: runner.train(), "au moins deux questions"),
        (lambda: runner.evaluate(), "au moins deux questions"),
        (lambda: runner.train(patiance=3), "réglage inconnu"),
        (lambda: runner.train(steps=0), "steps doit être un entier"),
        (lambda: BasicModelRunner("absent"), "Modèle introuvable"),
        (lambda: BasicModelRunner("petit", device="cuda"), "Aucun GPU"),
    ]


@pytest.mark.parametrize("case", range(18))
def test_refusals_are_one_french_line(runner, case, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    action, message = refusals(runner)[case]
    with pytest.raises(LlamaError) as refusal:
        action()
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


# Apprendre et mesurer


def test_what_is_loaded_after_training_is_learnt_whole(folder):
    runner = BasicModelRunner(folder)
    runner.add_pairs(PAIRS[:20])
    runner.train(**QUICK | {"steps": 2})
    held_out = runner.parts()[1]
    runner.add_pairs(PAIRS[20:])
    assert runner.parts()[1] == held_out and {*PAIRS[20:]} <= {*runner.parts()[0]}


def test_training_improves_the_held_out_questions(trained):
    metrics = trained.evaluate()
    assert metrics["loss"] < 0.6 * metrics["loss_before"] and metrics["f1"] > metrics["f1_before"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["n_questions"] == len(trained.parts()[1]) and {"exact_match", "exact_match_before"} <= metrics.keys()
    assert len(trained.history.steps) == 60 and trained.history.losses[-1] < trained.history.losses[0]


def test_measures_are_those_of_evaluation(trained):
    pairs = trained.parts()[1]
    metrics = trained.measure(pairs, n_answers=2, max_new_tokens=16)
    examples = question_examples(pairs, trained.tokenizer, 96)
    assert metrics["loss"] == pytest.approx(mean_loss(trained.model, examples), abs=1e-5)
    answers = trained.predict([question for question, _ in pairs[:2]], max_new_tokens=16)
    expected = [token_f1(answer, pair[1]) for answer, pair in zip(answers, pairs, strict=False)]
    assert metrics["f1"] == pytest.approx(sum(expected) / 2) and metrics["n_answers"] == 2
    assert "f1" not in trained.measure(pairs, n_answers=0)
    assert trained.measure(pairs, batch_size=1) == pytest.approx(trained.measure(pairs, batch_size=8), abs=1e-5)


def test_evaluate_before_training_has_nothing_to_compare(runner):
    runner.add_pairs(PAIRS)
    before = runner.evaluate()
    assert not any(name.endswith("_before") for name in before)
    runner.train(**QUICK | {"steps": 2})
    assert runner.evaluate()["loss_before"] == before["loss"]


def test_lora_leaves_the_base_and_is_public_changes_nothing(folder):
    results = []
    for options in ({}, {"is_public": True}):
        runner = BasicModelRunner(folder)
        base = weights(runner.model)
        runner.add_pairs(PAIRS)
        runner.train(**QUICK, **options)
        assert adapter_names(runner.model) == ["default"] and not runner.model.training
        after = weights(runner.model)
        assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
        results.append(after)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_full_training_moves_every_weight(folder):
    runner = BasicModelRunner(folder)
    base = weights(runner.model)
    runner.add_pairs(PAIRS)
    runner.train(full=True, **QUICK | {"steps": 3})
    assert not adapter_names(runner.model)
    assert not any(torch.equal(tensor, base[name]) for name, tensor in weights(runner.model).items())


def test_full_training_starts_from_the_adapter(folder):
    runner = BasicModelRunner(folder)
    runner.add_pairs(PAIRS)
    runner.train(**QUICK)
    after_lora = runner.evaluate()["loss"]
    runner.train(full=True, **QUICK | {"steps": 1, "learning_rate": 1e-9})
    assert not adapter_names(runner.model) and runner.evaluate()["loss"] == pytest.approx(after_lora, abs=1e-4)


def test_training_stops_when_it_no_longer_improves(folder):
    runner = BasicModelRunner(folder)
    runner.add_pairs(PAIRS)
    settings = {"steps": 200, "eval_every": 2, "patience": 2, "learning_rate": 0.3, "batch_size": 4}
    history = runner.train(progress=False, **settings)
    assert len(history.steps) < 200
    best = min(record["val_loss"] for record in history.evaluations)
    assert runner.evaluate()["loss"] == pytest.approx(best, abs=1e-4)  # les meilleurs poids, non les derniers


def test_gradient_checkpointing_gives_the_same_losses(folder):
    losses = []
    for gradient_checkpointing in (False, True):
        runner = BasicModelRunner(folder)
        runner.add_pairs(PAIRS)
        history = runner.train(gradient_checkpointing=gradient_checkpointing, **QUICK | {"steps": 4})
        losses.append(history.losses)
        assert runner.model.gradient_checkpointing is gradient_checkpointing
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_resuming_wants_the_same_adapter(folder, tmp_path):
    def train(**changes):
        runner = BasicModelRunner(folder)
        runner.add_pairs(PAIRS)
        return runner.train(out=tmp_path / "points", **QUICK | {"steps": 2} | changes).losses

    losses = train()
    before = snapshot(tmp_path)
    for changes, message in (
        ({"rank": 8}, "réglages.lora.rank\u00a0: 16 ≠ 8"), ({"alpha": 16.0}, "réglages.lora.alpha\u00a0: 32.0 ≠ 16.0"),
        ({"targets": ["q_proj"]}, "réglages.lora.targets"), ({"full": True}, "réglages.lora"),
    ):
        with pytest.raises(LlamaError, match=message) as refusal:
            train(**changes)
        assert "\n" not in str(refusal.value) and snapshot(tmp_path) == before
    assert train() == losses


@pytest.mark.parametrize("chat", [True, False])
def test_a_base_model_learns_to_converse(tmp_path, chat):
    """Il reçoit notre gabarit s’il en a les jetons, sinon un gabarit de texte, et l’emporte."""
    runner = BasicModelRunner(make_model(tmp_path / "base", chat=chat, template=False))
    runner.add_pairs(PAIRS)
    runner.train(**QUICK | {"steps": 2})
    prompt = runner.tokenizer.decode(runner.prompt("Bonjour."))
    expected = "<|user|>Bonjour.<|end_of_text|><|assistant|>" if chat else "### Question\nBonjour.\n\n### Réponse\n"
    assert runner.chat and prompt == "<|begin_of_text|>" + expected
    runner.save(tmp_path / "appris")
    again = BasicModelRunner(tmp_path / "appris")
    assert again.chat and again.prompt("Bonjour.") == runner.prompt("Bonjour.")


# Enregistrer


def test_an_adapter_is_reloaded_from_anywhere(trained, tmp_path, monkeypatch):
    trained.save(tmp_path / "adaptateur")
    monkeypatch.chdir(tmp_path)
    again = BasicModelRunner("adaptateur")
    questions = [question for question, _ in PAIRS[:5]]
    assert again.predict(questions, max_new_tokens=12) == trained.predict(questions, max_new_tokens=12)
    with pytest.raises(LlamaError, match="existe déjà"):
        trained.save(tmp_path / "adaptateur")


def test_the_folders_are_those_of_peft_and_transformers(trained, folder, tmp_path):
    from peft import PeftModel

    trained.save(tmp_path / "adaptateur")
    trained.save(tmp_path / "entier", whole=True)
    assert adapter_names(trained.model) == ["default"]  # l’adaptateur reste à part dans le nôtre
    ids = torch.tensor([trained.prompt("Combien font 2 et 2 ?")])
    with torch.no_grad():
        ours = trained.model(ids)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "entier").eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(folder).eval()
        adapted = PeftModel.from_pretrained(base, tmp_path / "adaptateur")(ids).logits
    torch.testing.assert_close(whole, ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(adapted, ours, atol=1e-4, rtol=0)
    published = AutoTokenizer.from_pretrained(tmp_path / "entier")
    chat = published.apply_chat_template([{"role": "user", "content": "Combien font 2 et 2 ?"}],
                                         add_generation_prompt=True, return_dict=True)
    assert chat["input_ids"] == ids[0].tolist()


def test_saving_leaves_the_model_as_it_is(trained, tmp_path):
    before = copy.deepcopy(weights(trained.model))
    trained.save(tmp_path / "entier", whole=True)
    after = weights(trained.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_importing_the_runner_does_not_load_transformers():
    import subprocess

    program = "import sys, llama.runner; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
