"""`inference` et `native` : des poids rangés donnent les sorties du modèle d’origine, avec ou sans compilateur."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama import inference, native
from llama.config import Config, LlamaError, TrainingConfig
from llama.evaluation import perplexity
from llama.generation import generate
from llama.inference import Bands, prepare
from llama.lora import add_lora, fold
from llama.model import KVCache, LlamaModel
from llama.training import make_optimizer

DENSE = Config(vocab_size=97, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=80, block_size=64)
CONFIGS = {
    "dense": DENSE,
    "tête à part": replace(DENSE, tie_word_embeddings=False),
    "MoE": replace(
        DENSE, d_k=16, num_local_experts=4, num_experts_per_tok=2, moe_layers=(1, 2), rope_style="pairs", qk_norm=True,
        nope_layers=(1,), attention_chunk_size=5, attn_temperature_tuning=True, floor_scale=3,
    ),
}
# Écart permis, rapporté à la norme des logits : float32 n’a changé que l’ordre des additions.
TOLERANCES = {"float32": 2e-6, "bf16": 0.03, "int8": 0.06}
DTYPES = list(inference.PRECISIONS.values())
needs_compiler = pytest.mark.skipif(not native.products(), reason="aucun compilateur C ici")


@pytest.fixture(params=["compilé", "sans compilateur"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param == "compilé" and not native.products():
        pytest.skip("aucun compilateur C ici")
    if request.param == "sans compilateur":
        monkeypatch.setattr(native, "products", dict)
    yield request.param == "compilé"


def model(config: Config) -> LlamaModel:
    torch.manual_seed(0)
    made = LlamaModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(mean=0.0 if parameter.dim() > 1 else 1.0, std=0.2)
    return made


def gap(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_same_logits(config: Config, precision: str, compiler: bool) -> None:
    """D’un coup, et jeton par jeton sur un cache, à plusieurs séquences."""
    original = model(config)
    prepared, ids = prepare(original, precision), torch.randint(97, (3, 12))
    with torch.no_grad():
        expected = original(ids)
        assert gap(prepared(ids), expected) < TOLERANCES[precision]
        cache = KVCache(config, 3, 12)
        steps = [prepared(ids[:, i:i + 1], cache=cache) for i in range(12)]
    assert gap(torch.cat(steps, 1), expected) < TOLERANCES[precision]


def test_same_tokens(compiler: bool) -> None:
    original, prompts = model(DENSE), [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert generate(prepare(original), prompts, max_new_tokens=30) == generate(original, prompts, max_new_tokens=30)
    for prompt in prompts:
        alone = generate(original, [prompt], max_new_tokens=30)
        assert generate(prepare(original), [prompt], max_new_tokens=30) == alone


@pytest.mark.parametrize("shape", [(64, 16), (65, 7), (130, 33), (1, 1), (576, 576)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, inference.FEW_ROWS + 1])
def test_bands_are_the_matrix(shape: tuple[int, int], dtype: torch.dtype, rows: int, compiler: bool) -> None:
    """Toutes les tailles, y compris celles que les bandes ne divisent pas."""
    weight, x = torch.randn(shape), torch.randn(2, rows, shape[1])[1:]
    bands = Bands(weight, dtype)
    restored = bands.rows(torch.arange(shape[0]))
    assert (restored - weight).abs().max() < {torch.float32: 1e-9, torch.bfloat16: 0.02, torch.int8: 0.02}[dtype]
    found, expected = bands(x), x @ restored.T
    # Au-delà de quelques lignes, ou sans compilateur, des poids en bf16 ou d’un octet arrondissent x en bf16.
    exact = dtype == torch.float32 or (compiler and rows <= inference.FEW_ROWS)
    assert found.shape == (1, rows, shape[0])
    assert (found - expected).norm() <= (1e-5 if exact else 2e-2) * expected.norm()


def test_int8_error_is_half_a_step() -> None:
    """Chaque poids est à au plus s/2 du sien, où s = max|W|/127, ligne par ligne ; une ligne nulle le reste."""
    weight = torch.randn(70, 40) * torch.logspace(-3, 3, 70)[:, None]
    weight[11] = 0
    error = (Bands(weight, torch.int8).rows(torch.arange(70)) - weight).abs().amax(1)
    assert (error <= weight.abs().amax(1) / 127 / 2 * (1 + 1e-5)).all() and error[11] == 0


def test_size_counts_each_weight_once() -> None:
    config = Config(vocab_size=128, d_model=64, n_layers=3, n_heads=4, d_ff=128)
    original = model(config)
    assert inference.size(original) == 4 * config.n_parameters()
    norms = (2 * config.n_layers + 1) * config.d_model
    matrices = config.n_parameters() - norms
    assert inference.size(prepare(original, "bf16")) == 2 * matrices + 4 * norms
    scales = config.n_layers * (3 * 64 + 64 + 2 * 128 + 64) + 128
    assert inference.size(prepare(original, "int8")) == matrices + 4 * (norms + scales)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_original_is_left_alone(precision: str) -> None:
    original = model(DENSE)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    prepared = prepare(original, precision)
    with torch.no_grad():
        first = prepared(torch.tensor([[1, 2, 3]]))
        assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
        for parameter in original.parameters():
            parameter.zero_()
        assert torch.equal(prepared(torch.tensor([[1, 2, 3]])), first)


def test_quantized_model_is_evaluated(compiler: bool) -> None:
    original, documents = model(DENSE), [torch.randint(97, (40,)).tolist() for _ in range(3)]
    expected = perplexity(original, documents, block_size=32)
    for precision, tolerance in TOLERANCES.items():
        prepared = prepare(original, precision)
        assert perplexity(prepared, documents, block_size=32) == pytest.approx(expected, rel=tolerance)
        assert perplexity(prepared, documents, block_size=32, batch_size=1) == pytest.approx(
            perplexity(prepared, documents, block_size=32), rel=tolerance / 10)


def test_folded_adapter_is_prepared() -> None:
    original, ids = model(DENSE), torch.tensor([[1, 2, 3]])
    add_lora(original, 2, 4, ["q_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.2)
    with pytest.raises(LlamaError, match="adaptateur est actif"):
        prepare(original)
    fold(original)
    with torch.no_grad():
        assert gap(prepare(original)(ids), original(ids)) < TOLERANCES["float32"]


@pytest.mark.parametrize("call, cause", [
    (lambda m: prepare(m, "int4"), "precision vaut float32, bf16, int8 (reçu : 'int4')"),
    (lambda m: prepare(prepare(m)), "déjà préparé"),
    (lambda m: prepare(m.to("meta")), "sur le processeur"),
    (lambda m: make_optimizer(prepare(m), TrainingConfig(steps=1)), "tous sont gelés"),
])
def test_misuse_is_named(call, cause: str) -> None:
    with pytest.raises(LlamaError) as error:
        call(model(DENSE))
    assert cause.replace("\u00a0", " ") in str(error.value).replace("\u00a0", " ") and "\n" not in str(error.value)


def test_prepared_model_is_not_saved(tmp_path) -> None:
    with pytest.raises(LlamaError, match="préparé à décoder"):
        prepare(model(DENSE)).save_pretrained(tmp_path / "modèle")
    assert not (tmp_path / "modèle").exists()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    """Un cache vide, et rien de compilé encore."""
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    native.products.cache_clear()
    yield
    native.products.cache_clear()


@needs_compiler
def test_compiled_once(fresh: None, tmp_path) -> None:
    assert set(native.products()) == set(DTYPES)
    (library,) = (tmp_path / "cache" / "noyaux").iterdir()
    written = library.stat().st_mtime_ns
    native.products.cache_clear()
    assert native.products() and library.stat().st_mtime_ns == written


@needs_compiler
def test_compiler_without_openmp_will_do(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", (("-option-inconnue",), ()))
    weight, x = torch.randn(64, 8), torch.randn(1, 8)
    assert native.products() and torch.allclose(Bands(weight, torch.float32)(x), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("compiler", ["compilateur-absent", "false"])
def test_no_compiler_or_a_broken_one(fresh: None, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    if compiler == "false" and not shutil.which("false"):
        pytest.skip("pas de commande « false » ici")
    assert native.products() == {}
