"""`conversation` : la mémoire d’une conversation, ses commandes, et Ctrl-C qui n’arrête que la réponse."""

import pytest
from tiny_models import make_model

from llama.conversation import HELP, Conversation, converse
from llama.runner import BasicModelRunner


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return BasicModelRunner(make_model(tmp_path_factory.mktemp("modèles") / "petit"))


def typed(*lines):
    """Ce que l’utilisateur tape, puis la fin de l’entrée."""
    remaining = iter(lines)

    def read(prompt):
        line = next(remaining, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_the_model_reads_the_whole_conversation(runner):
    conversation = Conversation(runner, system="Soyez bref.", max_new_tokens=4)
    first = "".join(conversation.ask("Bonjour."))
    second = "".join(conversation.ask("Encore."))
    expected = [{"role": "system", "content": "Soyez bref."}, {"role": "user", "content": "Bonjour."},
                {"role": "assistant", "content": first}, {"role": "user", "content": "Encore."}]
    assert second == "".join(runner.stream(expected, max_new_tokens=4))
    assert conversation.head + conversation.messages == [*expected, {"role": "assistant", "content": second}]


def test_the_oldest_exchanges_are_forgotten(runner, capsys):
    conversation = Conversation(runner, system="Bref.", max_new_tokens=8)
    converse(conversation, typed(*(f"Question numéro {i} ?" for i in range(8))))
    assert conversation.forgotten > 0 and len(conversation.messages) == 2 * (8 - conversation.forgotten)
    assert len(runner.prompt(conversation.head + conversation.messages)) <= runner.model.config.block_size + 8
    assert conversation.messages[-2]["content"] == "Question numéro 7 ?"
    assert "le début de la conversation est oublié" in capsys.readouterr().err


def test_commands(runner, capsys):
    conversation = Conversation(runner, max_new_tokens=4)
    lines = ("Bonjour.", "/historique", "/aide", "/inconnue", "", "/oublier", "/historique", "/quitter", "Jamais lu.")
    converse(conversation, typed(*lines))
    printed = capsys.readouterr()
    assert conversation.messages == [] and printed.err.count(HELP) == 3
    assert printed.out.count("user\u00a0: Bonjour.") == 1


def test_ctrl_c_stops_the_answer_only(runner, capsys, monkeypatch):
    conversation = Conversation(runner, max_new_tokens=4)
    stream = runner.stream

    def interrupted(*arguments, **options):
        yield "Début"
        raise KeyboardInterrupt

    def silent(*arguments, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(runner, "stream", interrupted)
    converse(conversation, typed("Bonjour."))
    assert conversation.messages == [{"role": "user", "content": "Bonjour."}, {"role": "assistant", "content": "Début"}]
    assert "réponse interrompue" in capsys.readouterr().err
    monkeypatch.setattr(runner, "stream", silent)
    converse(conversation, typed("Encore."))
    assert len(conversation.messages) == 2  # une question sans réponse ne reste pas
    monkeypatch.setattr(runner, "stream", stream)
    converse(conversation, typed("Encore."))
    assert len(conversation.messages) == 4


def test_ctrl_c_while_typing_leaves(runner):
    with pytest.raises(KeyboardInterrupt):
        converse(Conversation(runner), typed(KeyboardInterrupt()))


def test_a_question_too_long_is_refused_and_the_conversation_goes_on(runner, capsys):
    conversation = Conversation(runner, max_new_tokens=4)
    converse(conversation, typed("mot " * 200, "Bonjour."))
    assert "Texte trop long" in capsys.readouterr().err
    assert [message["content"] for message in conversation.messages][:1] == ["Bonjour."]


def test_a_base_model_continues_without_memory(tmp_path, capsys):
    runner = BasicModelRunner(make_model(tmp_path / "base", template=False))
    conversation = Conversation(runner, max_new_tokens=4)
    converse(conversation, typed("Le facteur", "Le facteur"))
    lines = capsys.readouterr().out
    assert conversation.messages == [] and lines == 2 * (runner.predict("Le facteur", max_new_tokens=4) + "\n")
