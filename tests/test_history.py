"""`history` et sa figure : ce qui est noté se relit, et se dessine avec ses axes."""

import pytest

from llama.config import LlamaError
from llama.history import History
from llama.plots import training_curves


@pytest.fixture
def history() -> History:
    steps = [{"step": i + 1, "loss": 5.0 - i, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "seconds": 0.5}
             for i in range(4)]
    return History(steps, [{"step": 2, "val_loss": 4.5}, {"step": 4, "val_loss": 2.5}])


def test_losses_and_speed(history):
    assert history.losses == [5.0, 4.0, 3.0, 2.0]
    assert history.tokens_per_second == pytest.approx(200)


def test_written_then_read_is_the_same(history, tmp_path):
    history.to_json(tmp_path / "historique.json")
    assert History.from_json(tmp_path / "historique.json") == history


@pytest.mark.parametrize("content", ["[1]", "{}", '{"steps": []}', "pas du JSON"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "autre.json"
    path.write_text(content)
    with pytest.raises(LlamaError, match="autre.json"):
        History.from_json(path)


def test_the_figure_shows_what_was_noted(history):
    (axis,) = history.plot().axes
    training, evaluation = axis.lines
    assert training.get_ydata().tolist() == history.losses
    assert training.get_xdata().tolist() == [100, 200, 300, 400]
    assert evaluation.get_xydata().tolist() == [[200, 4.5], [400, 2.5]]
    assert "jetons" in axis.get_xlabel() and "nats" in axis.get_ylabel()


def test_several_runs_share_the_axes(history):
    (axis,) = training_curves({"un": history, "deux": history}).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "un", "un, évaluation", "deux", "deux, évaluation",
    ]
