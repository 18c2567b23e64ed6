"""`merge_parameters` : gradients, filtres, niveaux, et chaque écriture fausse refusée en une ligne."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.config import LlamaError
from llama.merge_parameters import METHODS, PER_MODEL, SHARED, SWITCHES, parse_parameters, value_at

Q, UP, NORM = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def parse(parameters, level="recette", method="ties"):
    return parse_parameters({"parameters": parameters}, level, method)


def test_every_parameter_has_a_kind():
    named = {key for method in METHODS.values() for key in method}
    assert named == {*PER_MODEL, *SHARED, *SWITCHES}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0, 1))
def test_gradients_are_interpolated(values, position):
    level = parse({"weight": values}, method="linear")
    expected = np.interp(position, np.linspace(0, 1, len(values)), values) if len(values) > 1 else values[0]
    assert value_at("weight", [level], Q, position) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("values, position, expected", [
    ([0, 1, 0], 0.25, 0.5), ([0, 0.5, 0.3, 0.7, 1], 0.5, 0.3), ([0, 0.5, 0.3, 0.7, 1], 1.0, 1.0), ([4], 0.7, 4.0),
])
def test_gradients_pass_through_their_points(values, position, expected):
    assert value_at("weight", [parse({"weight": values})], Q, position) == pytest.approx(expected)


def test_the_first_filter_that_matches_wins():
    level = parse({"weight": [
        {"filter": "up_proj", "value": 0.7}, {"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 0.5},
        {"filter": "self_attn", "value": 0.1},
    ]})
    assert value_at("weight", [level], UP, 0.5) == 0.7
    assert value_at("weight", [level], UP.replace("up", "down"), 0.25) == 0.25
    assert value_at("weight", [level], Q, 0.5) == 0.5, "un filtre après « * » ne sert plus"


def test_levels_answer_from_the_nearest_to_the_farthest():
    near = parse({"weight": {"filter": "mlp", "value": 0.7}})
    far = parse({"weight": 0.2, "density": 0.4})
    assert value_at("weight", [near, far], UP, 0) == 0.7
    assert value_at("weight", [near, far], NORM, 0) == 0.2, "aucun filtre du premier niveau ne répond"
    assert value_at("density", [near, far], UP, 0) == 0.4
    assert value_at("lambda", [near, far], UP, 0) is None


def test_scientific_notation_and_switches():
    level = parse({"weight": "1e-3", "normalize": False, "lambda": 2})
    assert [value_at(key, [level], Q, 0) for key in ("weight", "normalize", "lambda")] == [1e-3, False, 2.0]
    assert parse(None) == {}


REFUSED = {
    "pas un dictionnaire": (["weight"], "ties", "doit être un dictionnaire"),
    "paramètre inconnu": ({"poids": 1}, "ties", "« poids » n’existe pas pour ties .*run_mergekit"),
    "paramètre d’une autre méthode": ({"density": 0.5}, "linear", "« density » n’existe pas pour linear"),
    "texte": ({"weight": "beaucoup"}, "ties", "weight doit être un nombre .*'beaucoup'"),
    "booléen au lieu d’un nombre": ({"weight": True}, "ties", "weight doit être un nombre"),
    "rien": ({"weight": None}, "ties", "weight doit être un nombre"),
    "infini": ({"weight": float("inf")}, "ties", "weight doit être un nombre"),
    "NaN en texte": ({"weight": "nan"}, "ties", "weight doit être un nombre"),
    "texte dans un gradient": ({"weight": [0.1, "x"]}, "ties", "weight doit être un nombre"),
    "liste dans une liste": ({"weight": [[0.1], 0.2]}, "ties", "weight doit être un nombre"),
    "liste vide": ({"weight": []}, "ties", "weight : la liste est vide"),
    "t au-delà de 1": ({"t": 1.5}, "slerp", "t doit être entre 0 et 1 .*1.5"),
    "t négatif dans un gradient": ({"t": [0, -0.1]}, "slerp", "t doit être entre 0 et 1"),
    "densité en pour cent": ({"density": 50}, "ties", "density doit être entre 0 et 1"),
    "interrupteur en nombre": ({"normalize": 1}, "ties", "normalize doit être true ou false"),
    "interrupteur en texte": ({"normalize": "oui"}, "ties", "normalize doit être true ou false"),
    "filtre sans valeur": ({"weight": [{"filter": "mlp"}]}, "ties", "un filtre s’écrit"),
    "filtre mal orthographié": ({"weight": [{"filtre": "mlp", "value": 1}]}, "ties", "un filtre s’écrit"),
    "filtre qui n’est pas un texte": ({"weight": [{"filter": 3, "value": 1}]}, "ties", "filter doit être un morceau"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_parameters_are_refused(name):
    parameters, method, message = REFUSED[name]
    with pytest.raises(LlamaError, match=message):
        parse(parameters, method=method)


@pytest.mark.parametrize("level", ["models", "sources"])
def test_what_holds_for_all_is_refused_for_one(level):
    with pytest.raises(LlamaError, match=f"« t » vaut pour toute la fusion.*« {level} »"):
        parse({"t": 0.5}, level, "slerp")
    assert parse({"weight": 0.5}, level, "linear")
