"""`recipe` : les dossiers écrits sont ceux de mergekit, en flux, et une interruption n’en laisse aucun à demi."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from merge_models import (
    assert_refused,
    by_llama,
    by_mergekit,
    edit_config,
    make_model,
    read_model,
    shapes,
    snapshot,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama
from llama import merging
from llama.config import LlamaError
from llama.recipe import merge, run_mergekit
from llama.shards import Spec, write_shards

WORDS = ["<unk>", *(f"m{i}" for i in range(39))]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Trois modèles semblables, puis d’autres : plus profond, à poids liés, en demi-précision, à tokenizer."""
    root = tmp_path_factory.mktemp("modeles")
    result = {name: make_model(root / name, seed) for seed, name in enumerate("abc")}
    result["profond"] = make_model(root / "profond", 3, n_layers=6)
    result |= {name: make_model(root / name, seed, tied=True) for seed, name in ((4, "lié1"), (5, "lié2"))}
    result |= {name: make_model(root / name, seed, dtype=torch.bfloat16) for seed, name in ((6, "bf1"), (7, "bf2"))}
    result["fp16"] = make_model(root / "fp16", 8, dtype=torch.float16)
    result["mots1"] = make_model(root / "mots1", 9, tokens=WORDS[:38])
    result["mots2"] = make_model(root / "mots2", 10, tokens=[*WORDS[:20], *WORDS[25:]])
    result["mots3"] = make_model(root / "mots3", 11, tokens=["<unk>", *reversed(WORDS[10:])])
    return result


def slices(*parts: list[tuple], **extra) -> list[dict]:
    return [
        {"sources": [{"model": model, "layer_range": [start, stop], **(rest[0] if rest else {})}
                     for model, start, stop, *rest in part], **extra}
        for part in parts
    ]


def weighted(*models: tuple, **extra) -> list[dict]:
    return [{"model": model, "parameters": {"weight": weight, **extra}} for model, weight in models]


FILTERED_T = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
RECIPES = {
    "linéaire": {"merge_method": "linear", "models": weighted(("a", 0.3), ("b", 0.9), ("c", 0.5))},
    "linéaire à gradients": {
        "merge_method": "linear", "models": weighted(("a", [0, 1, 0.2]), ("b", 1)), "parameters": {"normalize": False},
    },
    "linéaire, trois niveaux de paramètres": {
        "merge_method": "linear", "parameters": {"weight": [{"filter": "layers.0", "value": 3}, {"value": 0.9}]},
        "slices": slices(
            [("a", 1, 3, {"parameters": {"weight": [{"filter": "layers.2", "value": [0.4, 0.6]}]}}), ("b", 2, 4)],
            [("a", 0, 1, {"parameters": {"weight": [0.1, 0.7]}}), ("b", 0, 1)],
        ),
    },
    "linéaire avec une base": {
        "merge_method": "linear", "base_model": "b", "models": weighted(("a", 1)), "parameters": {"weight": 2},
    },
    "SLERP": {
        "merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.3},
    },
    "SLERP à filtres et gradients": {
        "merge_method": "slerp", "base_model": "b", "dtype": "float32", "parameters": {"t": FILTERED_T},
        "slices": slices([("a", 0, 4), ("b", 0, 4)]),
    },
    "SLERP par tranches": {
        "merge_method": "slerp", "base_model": "a",
        "slices": [
            *slices(
                [("b", 2, 4), ("a", 1, 3)], parameters={"t": [{"filter": "layers.1", "value": 0.8}, {"value": 0.1}]}
            ),
            *slices([("a", 0, 3), ("profond", 3, 6)], base_model="profond", parameters={"t": [0.2, 0.4]}),
        ],
    },
    "arithmétique de tâches": {
        "merge_method": "task_arithmetic", "base_model": "a", "parameters": {"lambda": 0.9, "int8_mask": True},
        "models": [{"model": "a"}, *weighted(("b", 0.4), ("c", -0.3))],
    },
    "arithmétique de tâches normalisée": {
        "merge_method": "task_arithmetic", "base_model": "a", "parameters": {"normalize": True},
        "models": weighted(("b", [0.4, 0.1]), ("c", 0.3)),
    },
    "TIES": {
        "merge_method": "ties", "base_model": "a",
        "models": [*weighted(("b", 0.4), density=0.3), *weighted(("c", 0.3), density=[0.2, 0.8])],
    },
    "TIES sans normaliser": {
        "merge_method": "ties", "base_model": "a", "models": weighted(("b", 1), ("c", 0.5)),
        "parameters": {"density": 0.5, "normalize": False, "rescale": True, "lambda": 1.2, "int8_mask": True},
    },
    "DARE linéaire, rien d’annulé": {
        "merge_method": "dare_linear", "base_model": "a", "models": weighted(("b", 1), ("c", 0.5)),
    },
    "DARE TIES, rien d’annulé": {
        "merge_method": "dare_ties", "base_model": "a", "models": weighted(("b", 1), ("c", 0.5)),
        "parameters": {"normalize": True, "density": 1.0},
    },
    "Model Stock": {"merge_method": "model_stock", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}]},
    "Model Stock par ligne": {
        "merge_method": "model_stock", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}],
        "parameters": {"filter_wise": True},
    },
    "poids liés": {"merge_method": "linear", "models": weighted(("lié1", 0.3), ("lié2", 0.9))},
}
STACKS = {
    "copie": {"merge_method": "passthrough", "models": [{"model": "a"}]},
    "empilement": {"merge_method": "passthrough", "slices": slices([("a", 0, 3)], [("profond", 2, 6)], [("b", 1, 2)])},
    "la même couche deux fois": {"merge_method": "passthrough", "slices": slices([("a", 0, 3)], [("a", 1, 4)])},
    "empilement à l’échelle": {
        "merge_method": "passthrough", "slices": slices([("a", 0, 2)], [("b", 0, 4, {
            "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]},
        })]),
    },
}


def placed(recipe, models: dict[str, str]):
    """La recette, où chaque nom court est un vrai dossier."""
    if isinstance(recipe, list):
        return [placed(item, models) for item in recipe]
    if isinstance(recipe, dict):
        return {key: placed(value, models) for key, value in recipe.items()}
    return models.get(recipe, recipe) if isinstance(recipe, str) else recipe


def assert_same(ours: dict, theirs: dict, compare) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        compare(tensor, theirs[name])


close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_tensors_and_configuration_equal_mergekit(name, models, tmp_path):
    recipe = placed(RECIPES[name], models)
    (ours, our_config), (theirs, config) = by_llama(recipe, tmp_path / "n"), by_mergekit(recipe, tmp_path / "m")
    assert_same(ours, theirs, close)
    # mergekit récrit la configuration par transformers, qui y ajoute ses valeurs par défaut.
    assert our_config.items() <= config.items()


@pytest.mark.parametrize("name", STACKS)
def test_stacks_equal_mergekit_bitwise(name, models, tmp_path):
    recipe = placed(STACKS[name], models)
    (ours, our_config), (theirs, config) = by_llama(recipe, tmp_path / "n"), by_mergekit(recipe, tmp_path / "m")
    assert_same(ours, theirs, lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0))
    assert our_config["num_hidden_layers"] == config["num_hidden_layers"]


@pytest.mark.parametrize("pair", [("a", "b"), ("bf1", "bf2"), ("bf1", "fp16"), ("bf1", "a")], ids="-".join)
@pytest.mark.parametrize("types", [
    {}, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"out_dtype": "float32"},
    {"dtype": "float32", "out_dtype": "bfloat16"}, {"dtype": "float16", "out_dtype": "float32"},
], ids=lambda types: ", ".join(f"{key} {value}" for key, value in types.items()) or "sans type")
def test_types_equal_mergekit(pair, types, models, tmp_path):
    """Un arrondi au plus d’écart avec mergekit, à la précision la plus faible qui intervient."""
    recipe = placed({"merge_method": "linear", "models": weighted(*((name, 1) for name in pair)), **types}, models)
    (ours, config), (theirs, _) = by_llama(recipe, tmp_path / "n"), by_mergekit(recipe, tmp_path / "m")
    coarse = {"bfloat16": 2**-7, "float16": 2**-10}
    steps = [coarse.get(types.get(key), 0) for key in ("dtype", "out_dtype")]
    steps += [2**-7 if pair == ("bf1", "bf2") and "dtype" not in types else 0]
    compare = functools.partial(torch.testing.assert_close, rtol=max(steps), atol=1e-6)
    assert_same(ours, theirs, compare)
    assert config["dtype"] == str(ours["lm_head.weight"].dtype).removeprefix("torch.")


@pytest.mark.parametrize("source", ["base", "mots1", "mots2"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_tokenizer_source_equals_mergekit(source, method, models, tmp_path):
    """Trois vocabulaires différents ; les jetons inconnus d’un modèle y reçoivent la ligne d’un autre."""
    recipe = {"merge_method": method, "models": weighted(("mots2", 0.5), ("mots3", 0.8)), "tokenizer_source": source}
    recipe |= {"base_model": "mots1", "parameters": {"weight": 0.3}}
    recipe = placed(recipe, models)
    ours, config = by_llama(recipe, tmp_path / "n")
    theirs, _ = by_mergekit(recipe, tmp_path / "m", copy_tokenizer=True)
    assert_same(ours, theirs, close)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "n")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab()
    assert config["vocab_size"] == len(tokenizer) == len(ours["lm_head.weight"])


def test_padding_rows_go_when_a_tokenizer_is_chosen(models, tmp_path):
    recipe = placed({"merge_method": "linear", "models": weighted(("mots1", 1)), "tokenizer_source": "base"}, models)
    ours, config = by_llama(recipe, tmp_path / "n")
    theirs, _ = by_mergekit(recipe, tmp_path / "m", copy_tokenizer=True)
    assert_same(ours, theirs, close)
    assert config["vocab_size"] == 38 == len(ours["lm_head.weight"])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_draws_from_its_seed_and_keeps_the_norm(method, models, tmp_path):
    recipe = {"merge_method": method, "base_model": "a", "models": weighted(("b", 1), density=0.6)}
    recipe = placed(recipe, models)
    once, again, other = (by_llama(recipe, tmp_path / "n", seed=seed)[0] for seed in (0, 0, 1))
    theirs, _ = by_mergekit(recipe, tmp_path / "m")
    base, tuned = read_model(models["a"])[0], read_model(models["b"])[0]
    for name, tensor in once.items():
        assert tensor.equal(again[name])
        gap = (tuned[name] - base[name]).abs().sum()
        for result in (tensor, theirs[name]):
            torch.testing.assert_close((result - base[name]).abs().sum(), gap, rtol=1e-4, atol=1e-4)
    assert any(not once[name].equal(other[name]) for name in once)
    kept = torch.cat([(once[name] != base[name]).flatten() for name in once]).float().mean()
    assert float(kept) == pytest.approx(0.6, abs=0.02)


def test_transformers_loads_the_result(models, tmp_path):
    recipe = placed({"merge_method": "linear", "models": weighted(("mots1", 1))}, models)
    stack = placed({"merge_method": "passthrough", "slices": slices([("mots1", 0, 3)], [("mots1", 1, 4)])}, models)
    for number, content in enumerate((recipe, stack)):
        summary = merge(content, tmp_path / str(number), progress=False)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert model.config.num_hidden_layers == summary["n_layers"] == len(model.model.layers)
        assert summary["n_parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
        assert AutoTokenizer.from_pretrained(tmp_path / str(number))("m3 m4").input_ids == [4, 5]
        assert yaml.safe_load((tmp_path / str(number) / "mergekit_config.yml").read_text()) == content
    original = AutoModelForCausalLM.from_pretrained(models["mots1"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(merged(ids).logits, original(ids).logits)


def test_sharded_models_give_the_same(models, tmp_path):
    weights, _ = read_model(models["b"])
    sharded = tmp_path / "b"
    sharded.mkdir()
    (sharded / "config.json").write_text((Path(models["b"]) / "config.json").read_text())
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    write_shards(sharded, specs, iter(weights.values()), max_bytes=10_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected, _ = by_llama(placed(RECIPES["SLERP"], models), tmp_path / "un")
    result, _ = by_llama(placed(RECIPES["SLERP"], models | {"b": str(sharded)}), tmp_path / "plusieurs")
    assert_same(result, expected, close)


def test_what_a_configuration_says_layer_by_layer_follows_the_layers(tmp_path):
    a, b = (make_model(tmp_path / name, seed) for seed, name in enumerate("ab"))
    edit_config(a, layer_types=list("wxyz"), no_rope_layers=[1, 1, 0, 1], moe_layers=[1, 3])
    edit_config(b, layer_types=list("WXYZ"), no_rope_layers=[0, 0, 1, 0], moe_layers=[0])
    recipe = {"merge_method": "passthrough", "slices": slices([(a, 1, 4)], [(b, 0, 2)])}
    config = by_llama(recipe, tmp_path / "sortie")[1]
    assert config["layer_types"] == list("xyzWX") and config["no_rope_layers"] == [1, 0, 1, 0, 0]
    assert config["moe_layers"] == [0, 2, 3] and config["num_hidden_layers"] == 5


def test_nothing_is_overwritten_without_force(models, tmp_path):
    recipe, out = placed(RECIPES["linéaire"], models), tmp_path / "sortie"
    merge(recipe, out, progress=False)
    assert_refused(placed(RECIPES["SLERP"], models), tmp_path, "existe déjà.*--force")
    merge(placed(RECIPES["SLERP"], models), out, force=True, progress=False)
    assert load_file(out / "model.safetensors").keys() == shapes(4, 40, False).keys()


def test_a_full_disk_leaves_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert_refused(placed(RECIPES["linéaire"], models), tmp_path, r"Pas assez de place.*il faut 0\.0 Go")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(models, tmp_path, monkeypatch, error):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == 20:
            raise error
        return linear(*arguments, **options)

    linear = merging.linear
    monkeypatch.setattr(merging, "linear", interrupted)
    expected = LlamaError if isinstance(error, OSError) else error
    threads = torch.get_num_threads()
    with pytest.raises(expected):
        merge(placed(RECIPES["linéaire"], models), tmp_path / "sortie", progress=False)
    assert snapshot(tmp_path) == {} and not any(tmp_path.iterdir())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("force", [False, True], ids=["nouveau", "remplacement"])
def test_a_killed_merge_never_looks_whole(models, tmp_path, force):
    """SIGKILL à des instants tirés au hasard : la sortie est absente, ou l’ancienne, ou la nouvelle, entière."""
    recipe, out = placed(RECIPES["linéaire"], models), tmp_path / "sortie"
    linear, generator, seen = merging.linear, random.Random(0), set()

    def slow_merge():
        merging.linear = lambda *a, **k: (time.sleep(0.003), linear(*a, **k))[1]
        merge(recipe, out, force=force, progress=False)

    old = by_llama(placed(STACKS["copie"], models), tmp_path / "ancienne")[0]
    new = by_llama(recipe, tmp_path / "entière")[0]
    for i in range(12):
        shutil.rmtree(out, ignore_errors=True)
        if force:
            shutil.copytree(tmp_path / "ancienne", out)
        process = multiprocessing.get_context("fork").Process(target=slow_merge)
        process.start()
        time.sleep(0.02 * i + generator.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        seen |= {"pendant"} if (tmp_path / ".sortie.partial").exists() else set()
        if force or out.exists():
            weights = read_model(out)[0]
            assert weights.keys() == new.keys()
            assert any(all(weights[name].equal(model[name]) for name in new) for model in (old, new))
    assert "pendant" in seen, "aucun signal n’est tombé pendant l’écriture"
    merge(recipe, out, force=True, progress=False)
    assert not list(tmp_path.glob(".sortie*"))


def test_progress_is_shown_on_demand(models, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    merge(placed(RECIPES["linéaire"], models), tmp_path / "a", progress=False)
    assert capsys.readouterr().err == ""


def test_run_mergekit_runs_what_we_do_not(models, tmp_path, monkeypatch, capfd):
    """Une méthode que `merge` refuse ; des chemins relatifs, hors ligne : là où mergekit seul échoue."""
    root = Path(models["a"]).parent
    monkeypatch.chdir(root)
    recipe = {
        "merge_method": "nuslerp", "models": weighted(("./a", 0.4), ("./b", 0.6)),
        "parameters": {"nuslerp_flatten": True},
    }
    path = tmp_path / "recette.yml"
    path.write_text(yaml.safe_dump(recipe))
    assert_refused(path, tmp_path, "'nuslerp' n’est pas pris en charge.*run_mergekit")
    out = run_mergekit(path, tmp_path / "sortie", progress=True)
    slerp = RECIPES["SLERP"] | {"parameters": {"t": 0.6}}
    expected, _ = by_llama(placed(slerp, models), tmp_path / "attendu")
    assert_same(read_model(out)[0], expected, close)
    assert not list(tmp_path.glob(".sortie*")) and not (out / "README.md").exists()
    with pytest.raises(LlamaError, match="existe déjà"):
        run_mergekit(path, tmp_path / "sortie", progress=False)


def test_run_mergekit_reports_what_fails(models, tmp_path):
    recipe = {"merge_method": "fantaisie", "models": [{"model": models["a"]}]}
    with pytest.raises(LlamaError, match="mergekit a échoué : .*fantaisie") as refusal:
        run_mergekit(recipe, tmp_path / "sortie", progress=False)
    assert "\n" not in str(refusal.value) and not any(tmp_path.iterdir())


def test_run_mergekit_reads_no_pickle_and_says_when_it_is_absent(models, tmp_path, monkeypatch):
    (tmp_path / "ancien").mkdir()
    (tmp_path / "ancien" / "pytorch_model.bin").write_bytes(b"\x80")
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "ancien")}]}
    with pytest.raises(LlamaError, match="les formats à pickle ne sont pas lus"):
        run_mergekit(recipe, tmp_path / "sortie", progress=False)
    with pytest.raises(LlamaError, match="à lire entre-temps"):
        run_mergekit(placed(STACKS["copie"], models), models["a"], force=True, progress=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlamaError, match="mergekit n’est pas installé"):
        run_mergekit(placed(STACKS["copie"], models), tmp_path / "sortie", progress=False)


# La mémoire se mesure dans un autre processus : il relève son RssAnon toutes les deux millisecondes.
MEASURE = textwrap.dedent("""
    import json, sys, threading, time
    from llama.recipe import merge

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    def watch():
        while True:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    start, peak, peaks = anonymous(), [0], []
    threading.Thread(target=watch, daemon=True).start()
    for recipe in json.loads(sys.argv[1]):
        peak[0] = 0
        merge(recipe, sys.argv[2], force=True, progress=False)
        peaks.append(peak[0])
    print(json.dumps([start, peaks]))
""")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="mesure propre à Linux")
FULL = os.environ.get("LLAMA_PROFIL") == "complet"
CONSTANT = 64 * 2**20  # blocs, comptages, allocateur


def measure(recipes: list[dict], out: Path) -> tuple[int, list[int]]:
    """La mémoire anonyme d’un processus avant toute fusion, et son maximum pendant chacune, en octets."""
    path = str(Path(llama.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", MEASURE, json.dumps(recipes), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def big_model(folder: Path, seed: int, n_layers: int, d_model: int, d_ff: int, vocab: int, kv: int) -> tuple[str, int]:
    """Un modèle en bfloat16 découpé comme sur le Hub, et les octets de son plus gros tenseur."""
    folder.mkdir()
    sizes = {"model.embed_tokens.weight": (vocab, d_model)}
    for i in range(n_layers):
        layer = {
            "self_attn.q_proj": (d_model, d_model), "self_attn.k_proj": (kv, d_model),
            "self_attn.v_proj": (kv, d_model), "self_attn.o_proj": (d_model, d_model),
            "mlp.gate_proj": (d_ff, d_model), "mlp.up_proj": (d_ff, d_model),
            "mlp.down_proj": (d_model, d_ff), "input_layernorm": (d_model,), "post_attention_layernorm": (d_model,),
        }
        sizes |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
    sizes |= {"model.norm.weight": (d_model,), "lm_head.weight": (vocab, d_model)}
    specs = {name: Spec(torch.bfloat16, size) for name, size in sizes.items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).bfloat16()
    repeated = (noise.repeat(-(-spec.n_elements // len(noise)))[:spec.n_elements] for spec in specs.values())
    tensors = (flat.view(spec.shape) for flat, spec in zip(repeated, specs.values(), strict=True))
    total = sum(spec.n_bytes for spec in specs.values())
    write_shards(folder, specs, tensors, max_bytes=max(total // 3, 1))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": d_model,
        "intermediate_size": d_ff, "num_hidden_layers": n_layers, "vocab_size": vocab, "num_attention_heads": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder), max(spec.n_bytes for spec in specs.values())


def recipes_of(base: str, *tuned: str) -> dict[str, dict]:
    models = weighted(*((name, 0.5) for name in tuned))
    return {
        "linear": {"merge_method": "linear", "models": weighted((base, 0.6), (tuned[0], 0.4)), "dtype": "bfloat16"},
        "slerp": {
            "merge_method": "slerp", "base_model": base, "models": [{"model": tuned[0]}], "parameters": {"t": 0.3},
        },
        "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": base, "models": models[:1]},
        "ties": {"merge_method": "ties", "base_model": base, "models": models, "parameters": {"density": 0.5}},
        "dare_ties": {
            "merge_method": "dare_ties", "base_model": base, "models": models, "parameters": {"density": 0.5},
        },
    }


@needs_proc
def test_memory_is_a_small_multiple_of_the_largest_tensor(tmp_path):
    """Aux largeurs de TinyLlama : le résultat d’un tenseur, et pour TIES et DARE un octet par poids et par modèle.

    `LLAMA_PROFIL=complet` y met ses 22 couches, soit 1,1 milliard de paramètres.
    """
    made = [big_model(tmp_path / name, i, 22 if FULL else 1, 2048, 5632, 32000, 256) for i, name in enumerate("ab")]
    largest = made[0][1]
    recipes = recipes_of(*(name for name, _ in made))
    names = ["linear", "slerp", "task_arithmetic"]
    start, peaks = measure([recipes[name] for name in names], tmp_path / "n")
    assert max(peaks) < 10**9
    assert all(0.9 * largest < peak - start < largest + CONSTANT for peak in peaks), (largest, start, peaks)


@needs_proc
def test_memory_of_masks_is_a_byte_per_weight_and_model(tmp_path):
    """TIES et DARE de deux modèles en bfloat16 : deux fois le plus gros tenseur."""
    made = [big_model(tmp_path / name, i, 1, 1024, 256, 28_000, 64) for i, name in enumerate("abc")]
    largest = made[0][1]
    recipes = recipes_of(*(name for name, _ in made))
    names = ["ties", "dare_ties"]
    start, peaks = measure([recipes[name] for name in names], tmp_path / "n")
    assert all(1.8 * largest < peak - start < 2 * largest + CONSTANT for peak in peaks), (largest, start, peaks)


@needs_proc
def test_memory_does_not_grow_with_depth(tmp_path):
    peaks = []
    for n_layers in (2, 34):
        folders = [tmp_path / f"{name}{n_layers}" for name in "abc"]
        made = [big_model(folder, i, n_layers, 512, 1024, 2000, 64)[0] for i, folder in enumerate(folders)]
        recipes = [recipes_of(*made)[name] for name in ("linear", "slerp", "ties")]
        peaks.append(measure(recipes, tmp_path / f"n{n_layers}")[1])
    extra = 32 * 2 * (2 * 512 * 512 + 2 * 64 * 512 + 3 * 512 * 1024)  # les octets de trente-deux couches
    assert all(deep - shallow < 0.25 * extra for shallow, deep in zip(*peaks, strict=True)), peaks
