"""`mergekit_yaml` : les recettes que l’on comprend, et chaque recette fausse refusée sans rien écrire."""

import copy
from pathlib import Path

import pytest
import yaml
from merge_models import assert_refused, make_model

from llama.config import LlamaError
from llama.mergekit_yaml import SUPPORTED_KEYS, read_recipe
from llama.recipe import merge


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("modeles")
    return {name: make_model(root / name, seed) for seed, name in enumerate("abc")}


def slices(*ranges: list[tuple[str, int, int]]) -> list[dict]:
    return [
        {"sources": [{"model": model, "layer_range": [start, stop]} for model, start, stop in part]} for part in ranges
    ]


SLERP = {
    "merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.5},
}
LINEAR = {"merge_method": "linear", "models": [
    {"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 2}},
]}
TIES = {
    "merge_method": "ties", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}], "parameters": {"weight": 1},
}
STACK = {"merge_method": "passthrough", "slices": slices([("a", 0, 3)], [("b", 1, 4)])}


def placed(recipe, models: dict[str, str]):
    """La recette, où `a`, `b` et `c` sont de vrais dossiers."""
    if isinstance(recipe, list):
        return [placed(item, models) for item in recipe]
    if isinstance(recipe, dict):
        return {key: placed(value, models) for key, value in recipe.items()}
    return models.get(recipe, recipe) if isinstance(recipe, str) else recipe


def changed(recipe: dict, **changes) -> dict:
    """La recette, à ces clés près ; `...` en retire une."""
    result = copy.deepcopy(recipe) | changes
    return {key: value for key, value in result.items() if value is not ...}


def test_a_recipe_reads_the_same_from_a_file_and_a_dictionary(models, tmp_path):
    recipe = placed(SLERP, models)
    path = tmp_path / "recette.yml"
    path.write_text(yaml.safe_dump(recipe))
    for source in (recipe, path, str(path)):
        plan = read_recipe(source)
        assert plan.method == "slerp" and plan.text == recipe
        assert [parent.name for parent in plan.parents] == [models["a"], models["b"]]
        assert [(source.start, source.stop) for source in plan.slices[0].sources] == [(0, 4), (0, 4)]


def test_the_base_model_comes_first_and_joins_the_models(models):
    recipe = changed(SLERP, base_model="b")
    assert [parent.name for parent in read_recipe(placed(recipe, models)).parents] == [models["b"], models["a"]]
    plan = read_recipe(placed(TIES, models))
    assert [source.parent.name for source in plan.slices[0].sources] == [models[name] for name in "abc"]


def test_slices_may_have_their_own_base_model(models):
    parts = slices([("a", 0, 2), ("b", 0, 2)], [("a", 2, 4), ("b", 2, 4)])
    parts[1]["base_model"] = "b"
    plan = read_recipe(placed(changed(SLERP, models=..., slices=parts), models))
    heads = [part.sources[0].parent.name for part in plan.slices]
    assert heads == [models["a"], models["b"]]


def test_the_supported_keys_are_the_documented_ones():
    assert set(SUPPORTED_KEYS) == {"recette", "models", "slices", "sources"}
    assert {"merge_method", "models", "base_model", "dtype", "tokenizer_source"} <= set(SUPPORTED_KEYS["recette"])


def with_model(**entry) -> dict:
    return changed(LINEAR, models=[*LINEAR["models"], entry])


def with_source(**entry) -> dict:
    return changed(STACK, slices=[{"sources": [entry]}])


REFUSED = {
    "recette vide": ({}, "merge_method : None n’est pas pris en charge"),
    "méthode inconnue": (changed(LINEAR, merge_method="moyenne"), "merge_method : 'moyenne' .*linear, slerp"),
    "méthode de mergekit que l’on n’a pas": (
        changed(LINEAR, merge_method="karcher"),
        "'karcher' .*run_mergekit",
    ),
    "méthode en liste": (changed(LINEAR, merge_method=["linear"]), "merge_method"),
    "clé inconnue": (changed(LINEAR, methode="x"), "La clé « methode » .*run_mergekit"),
    "clé de mergekit que l’on n’a pas": (
        changed(LINEAR, tokenizer={"source": "base"}),
        "La clé « tokenizer » .*run_mergekit",
    ),
    "chat_template": (changed(LINEAR, chat_template="auto"), "« chat_template »"),
    "clé inconnue d’un modèle": (
        with_model(model="c", weight=1),
        r"« weight » \(models\) n’est pas comprise",
    ),
    "clé inconnue d’une tranche": (
        changed(STACK, slices=[{"sources": [], "residual_weight": 1}]),
        r"« residual_weight » \(slices\)",
    ),
    "clé inconnue d’une source": (with_source(model="a", range=[0, 2]), r"« range » \(sources\)"),
    "ni modèles ni tranches": (changed(LINEAR, models=...), "« models » ou « slices »"),
    "modèles et tranches": (changed(LINEAR, slices=STACK["slices"]), "« models » ou « slices »"),
    "aucun modèle": (changed(LINEAR, models=[]), "« models » doit être une liste non vide"),
    "modèles sans tiret": (changed(LINEAR, models={"model": "a"}), "« models » doit être une liste"),
    "modèle sans accolades": (changed(LINEAR, models=["a", "b"]), "« models » doit être une liste"),
    "tranches sans tiret": (changed(STACK, slices={"sources": []}), "« slices » doit être une liste"),
    "tranche sans source": (changed(STACK, slices=[{}]), "« sources » doit être une liste"),
    "modèle sans nom": (with_model(parameters={"weight": 1}), "models : un modèle est un dossier"),
    "modèle en nombre": (with_model(model=3), "un modèle est un dossier ou un nom du Hub .*3"),
    "modèle en dictionnaire": (with_model(model={"path": "a"}), "un modèle est un dossier ou un nom du Hub"),
    "base_model en nombre": (changed(SLERP, base_model=7), "base_model : un modèle est"),
    "base_model vide": (changed(SLERP, base_model=""), "base_model : un modèle est"),
    "base de tranche en liste": (
        changed(STACK, slices=[STACK["slices"][0] | {"base_model": ["a"]}]),
        "slices : un modèle est",
    ),
    "modèle cité deux fois": (changed(LINEAR, models=LINEAR["models"] * 2), "est cité deux fois"),
    "SLERP sans base": (changed(SLERP, base_model=...), "slerp demande un modèle de base"),
    "SLERP à trois": (
        changed(SLERP, models=[*SLERP["models"], {"model": "c"}]),
        "slerp demande 1 modèle, en plus .* en donne 2",
    ),
    "SLERP tout seul": (
        changed(SLERP, models=[{"model": "a"}]),
        "slerp demande 1 modèle, en plus .* en donne 0",
    ),
    "TIES sans base": (changed(TIES, base_model=...), "ties demande un modèle de base"),
    "TIES sans modèle": (changed(TIES, models=[{"model": "a"}]), "ties demande au moins 1 modèle"),
    "Model Stock à un seul": (
        {"merge_method": "model_stock", "base_model": "a", "models": [{"model": "b"}]},
        "model_stock demande au moins 2 modèles",
    ),
    "empilement de deux modèles à la fois": (
        changed(STACK, slices=slices([("a", 0, 2), ("b", 0, 2)])),
        "passthrough demande 1 modèle ; .* 2",
    ),
    "t manquant": (changed(SLERP, parameters={}), "Il manque « t » pour .* : slerp le demande"),
    "t qui ne filtre pas tout": (
        changed(SLERP, parameters={"t": [{"filter": "self_attn", "value": 0.5}]}), "Il manque « t »"
    ),
    "poids manquant": (with_model(model="c"), "Il manque « weight » à .*/c pour"),
    "paramètres en liste": (
        changed(SLERP, parameters=[0.5]),
        "parameters .recette. doit être un dictionnaire",
    ),
    "paramètre commun sous un modèle": (
        with_model(model="c", parameters={"weight": 1, "normalize": True}),
        "« normalize » vaut pour toute la fusion",
    ),
    "couches absentes": (with_source(model="a"), r"layer_range doit être \[début, fin\].*None"),
    "couches en texte": (with_source(model="a", layer_range="0-4"), "layer_range doit être"),
    "trois bornes": (with_source(model="a", layer_range=[0, 2, 4]), "layer_range doit être"),
    "bornes à virgule": (with_source(model="a", layer_range=[0, 2.5]), "layer_range doit être"),
    "bornes booléennes": (with_source(model="a", layer_range=[False, True]), "layer_range doit être"),
    "une recette pour 32 couches": (
        with_source(model="a", layer_range=[0, 32]),
        r"layer_range \[0, 32\] sort de .*/a, qui a 4 couches",
    ),
    "bornes négatives": (with_source(model="a", layer_range=[-2, 2]), r"layer_range \[-2, 2\] sort de"),
    "tranche vide": (with_source(model="a", layer_range=[2, 2]), r"layer_range \[2, 2\] sort de"),
    "bornes à l’envers": (with_source(model="a", layer_range=[3, 1]), r"layer_range \[3, 1\] sort de"),
    "tranches inégales": (
        changed(SLERP, models=..., slices=slices([("a", 0, 2), ("b", 0, 3)])),
        "autant de couches : 2 pour .* 3 pour",
    ),
    "tranche sans la base": (
        changed(SLERP, models=..., slices=slices([("b", 0, 2), ("c", 0, 2)])),
        "doit citer le modèle de base, .*/a",
    ),
    "dtype inconnu": (changed(LINEAR, dtype="bf16"), "dtype : 'bf16' n’est pas un type de poids .*bfloat16"),
    "dtype entier": (changed(LINEAR, dtype="int8"), "dtype : 'int8' n’est pas"),
    "out_dtype en liste": (changed(LINEAR, out_dtype=["float32"]), "out_dtype : .* n’est pas"),
    "tokenizer réuni": (
        changed(LINEAR, tokenizer_source="union"),
        "union n’est pas pris en charge ; run_mergekit",
    ),
    "tokenizer étranger": (
        changed(LINEAR, tokenizer_source="c"),
        "n’est ni « base » ni un modèle de la recette",
    ),
    "tokenizer en nombre": (changed(LINEAR, tokenizer_source=3), "tokenizer_source : 3 n’est ni"),
    "tokenizer absent": (changed(LINEAR, tokenizer_source="b"), r"/b n’a pas de tokenizer\.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_recipes_are_refused(name, models, tmp_path):
    recipe, message = REFUSED[name]
    assert_refused(placed(recipe, models), tmp_path, message)


UNREADABLE = {
    "YAML coupé": (b"merge_method: [linear", "ligne 1 n’est pas du YAML"),
    "tabulation": (b"merge_method: linear\nmodels:\n\t- model: a\n", "ligne 3 n’est pas du YAML"),
    "objet Python": (b"merge_method: !!python/object/apply:os.system ['true']\n", "n’est pas du YAML"),
    "date impossible": (b"merge_method: 2024-13-45", "n’est pas du YAML"),
    "crochets sans fin": (b"[" * 20_000, "n’est pas du YAML"),
    "octets": (b"\xff\xfe\x00", "n’est pas un fichier de texte en UTF-8"),
    "vide": (b"", "doit être un dictionnaire"),
    "liste": (b"- merge_method: linear\n", "doit être un dictionnaire"),
    "texte": (b"slerp", "doit être un dictionnaire"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_refused(name, tmp_path):
    content, message = UNREADABLE[name]
    path = tmp_path / "recette.yml"
    path.write_bytes(content)
    assert_refused(path, tmp_path, message)


def test_missing_files_are_refused(tmp_path):
    assert_refused(tmp_path / "absente.yml", tmp_path, r"Recette introuvable : .*absente\.yml")
    assert_refused(tmp_path, tmp_path, "Recette illisible")


def test_every_message_is_its_own(models, tmp_path):
    """Les causes sont distinctes : aucune recette n’est refusée pour la raison d’une autre."""
    messages = {}
    for name, (recipe, _) in REFUSED.items():
        with pytest.raises(LlamaError) as refusal:
            merge(placed(recipe, models), tmp_path / "sortie", progress=False)
        messages[name] = str(refusal.value).replace(str(Path(models["a"]).parent), "")
    assert len(set(messages.values())) >= 45
