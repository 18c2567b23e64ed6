"""`llama.lesson` : ce qu’un carnet affiche est exactement ce qu’il enregistre."""

from __future__ import annotations

import base64
import io
import random

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt

from llama import lesson, plots
from llama.config import LlamaError

NBSP, NARROW = "\u00a0", "\u202f"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Chaque essai commence comme un carnet neuf, au profil rapide."""
    monkeypatch.setenv("LLAMA_PROFIL", "rapide")
    lesson._recorded.clear()
    yield
    plt.close("all")


@pytest.fixture
def shell():
    """Un vrai noyau IPython, dans ce processus."""
    shell = InteractiveShell.instance()
    yield shell
    vars(shell).pop("parent_header", None)
    InteractiveShell.clear_instance()


def outputs(action):
    """Les sorties riches que produit `action()`."""
    with capture_output() as captured:
        action()
    return [(output.data, output.metadata) for output in captured.outputs]


@pytest.mark.parametrize(("value", "digits", "text"), [
    (11034624, 2, f"11{NARROW}034{NARROW}624"),
    (2.3149, 2, "2,31"),
    (2.3149, 0, "2"),
    (-1234.5, 1, f"−1{NARROW}234,5"),
    (-0.001, 2, "0,00"),
    (0.0004, 4, "0,0004"),
    (True, 2, "oui"),
    (np.float32(2.5), 2, "2,50"),
    (torch.tensor(7), 2, "7"),
    ("Llama", 2, "Llama"),
])
def test_french(value, digits, text):
    assert lesson.french(value, digits) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, [1.0]])
def test_french_refuses(value):
    with pytest.raises(LlamaError, match="ne s’écrit pas"):
        lesson.french(value)


def test_record_shows_and_stores(shell):
    [(data, metadata)] = outputs(lambda: lesson.record("perte_finale", torch.tensor(2.3149), "nats"))
    assert data == {"text/plain": f"perte finale{NBSP}: 2,31{NBSP}nats"}
    assert metadata["scrapbook"] == {"name": "perte_finale", "value": 2.31, "text": "2,31", "unit": "nats"}


def test_record_without_notebook_prints(capsys):
    lesson.record("jetons_vus", 12_000)
    assert capsys.readouterr().out == f"jetons vus{NBSP}: 12{NARROW}000\n"


def test_same_name_twice_is_an_error():
    lesson.record("perte", 1.0)
    with pytest.raises(LlamaError, match="« perte »".replace(" ", NBSP)):
        lesson.record("perte", 2.0)


def test_refused_value_does_not_take_the_name():
    with pytest.raises(LlamaError):
        lesson.record("perte", float("nan"))
    lesson.record("perte", 1.0)


@pytest.mark.parametrize("metadata", [{"cellId": "a"}, {"colab": {"cell_id": "a"}}])
def test_running_a_cell_again_is_allowed(shell, metadata):
    shell.parent_header = {"metadata": metadata}
    lesson.record("perte", 1.0)
    lesson.record("perte", 1.0)
    shell.parent_header = {"metadata": {"cellId": "une autre"}}
    with pytest.raises(LlamaError):
        lesson.record("perte", 1.0)


def draw():
    fig, axis = plots.subplots(size=(4, 3))
    axis.plot([0, 1], [0.25, 2])
    return fig


def test_figure_is_shown_once_with_its_alt(shell):
    fig = draw()
    alt = "La perte\n    descend."
    [(data, metadata)] = outputs(lambda: lesson.figure("courbe", fig, alt=alt, data={"perte": [0.254, 2]}))
    png = data["image/png"]
    assert (png if isinstance(png, bytes) else base64.b64decode(png)).startswith(b"\x89PNG")
    assert metadata["scrapbook"] == {"name": "courbe", "alt": "La perte descend."}
    assert metadata["image/png"] == {"width": 384, "height": 288}
    assert data["text/plain"].startswith(f"Figure «{NBSP}courbe{NBSP}»{NBSP}: perte (2, de 0,25 à 2,00)")
    assert not plt.fignum_exists(fig.number)


def test_figure_is_an_opaque_light_card(shell):
    """Le fond accompagne la figure : elle reste lisible quand la page est sombre."""
    [(data, _)] = outputs(lambda: lesson.figure("courbe", draw(), alt="x", data=[1]))
    png = data["image/png"]
    pixels = plt.imread(io.BytesIO(png if isinstance(png, bytes) else base64.b64decode(png)))
    assert pixels[..., 3].min() == 1
    assert pixels[0, 0, :3].min() > 0.95


def test_figure_bytes_are_reproducible(shell):
    [(first, _)] = outputs(lambda: lesson.figure("a", draw(), alt="x", data=[1]))
    [(second, _)] = outputs(lambda: lesson.figure("b", draw(), alt="x", data=[1]))
    assert first["image/png"] == second["image/png"]


def test_figure_needs_an_alt():
    with pytest.raises(LlamaError, match="texte de remplacement"):
        lesson.figure("courbe", draw(), alt="  ", data=[1])


def test_digest_sees_what_is_rounded_and_nothing_below():
    reference = lesson.digest({"perte": [1.234, -0.0], "mots": ["a", "b"]})
    assert lesson.digest({"perte": torch.tensor([1.2341, 0.0]), "mots": ["a", "b"]}) == reference
    changed = [
        {"perte": [1.244, 0.0], "mots": ["a", "b"]},
        {"perte": [1.234, 0.0], "mots": ["a", "c"]},
        {"gain": [1.234, 0.0], "mots": ["a", "b"]},
        {"perte": [[1.234], [0.0]], "mots": ["a", "b"]},
    ]
    assert reference not in [lesson.digest(data) for data in changed]
    assert lesson.digest([1.26], digits=1) == lesson.digest([1.34], digits=1)


def test_show_source_is_the_library_s_own(shell):
    [(data, _)] = outputs(lambda: lesson.show_source(lesson.french))
    assert data["text/plain"].startswith("def french(value")
    assert data["text/markdown"] == f"```python\n{data['text/plain']}\n```"


def test_show_source_of_a_method_is_dedented(shell):
    [(data, _)] = outputs(lambda: lesson.show_source(plots.FrenchFormatter.__call__))
    assert data["text/plain"].startswith("def __call__")


def test_setup_fixes_seeds_and_says_so(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    draws = []
    for seed in (3, 3, 4):
        assert lesson.setup(seed) == "rapide"
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert capsys.readouterr().out == "Profil rapide, graine 3\n" * 2 + "Profil rapide, graine 4\n"
    assert draws[0] == draws[1] != draws[2]
    assert torch.get_num_threads() == 1


def test_setup_forgets_the_names_of_the_notebook():
    lesson.record("perte", 1.0)
    lesson.setup()
    lesson.record("perte", 1.0)


def test_profile(monkeypatch):
    assert lesson.profile() == "rapide"
    monkeypatch.setenv("LLAMA_PROFIL", "complet")
    assert lesson.profile() == "complet"
    monkeypatch.setenv("LLAMA_PROFIL", "lent")
    with pytest.raises(LlamaError, match="rapide.*complet"):
        lesson.profile()


@pytest.mark.parametrize(("gpu", "expected"), [(True, "complet"), (False, "rapide")])
def test_default_profile_follows_the_gpu(monkeypatch, gpu, expected):
    monkeypatch.delenv("LLAMA_PROFIL")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert lesson.profile() == expected


def test_axes_read_in_french():
    fig, axis = plots.subplots()
    axis.plot([-1500, 12000], [0, 1])
    fig.canvas.draw()
    labels = [label.get_text() for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    assert {f"10{NARROW}000", f"−2{NARROW}000", "0,2"} <= set(labels)


def test_long_results_say_where_they_come_from(tmp_path, capsys):
    path = tmp_path / "resultats" / "essai.json"
    lesson.save_results(path, {"perte": 1.5})
    assert lesson.load_results(path) == {"perte": 1.5}
    assert "Résultats de « python " in capsys.readouterr().out
    with pytest.raises(LlamaError, match="absent.json"):
        lesson.load_results(tmp_path / "absent.json")
