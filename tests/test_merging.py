"""`merging` : égal à mergekit, tenseur par tenseur, et aux propriétés que les articles promettent."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors

from llama import merging
from llama.config import LlamaError

SHAPES = [(7,), (24, 16), (3, 5, 8)]


def draw(n: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """`n` tenseurs, petites variations d’un même : des modèles affinés depuis la même base."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [(base + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(n)]


def reference(method: str, tensors: list[torch.Tensor], *, base: bool = True, **parameters) -> torch.Tensor:
    return merge_tensors(tensors, method, parameters=parameters, base_index=0 if base else None)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 0.7, 0.4], [1.5, -0.25, 0.0]])
def test_linear_equals_mergekit(shape, normalize, weights):
    tensors = draw(3, *shape)
    theirs = reference("linear", tensors, base=False, weight=weights, normalize=normalize)
    assert_equal(merging.linear(tensors, weights, normalize=normalize), theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.13, 0.5, 1.0])
def test_slerp_equals_mergekit(shape, t):
    first, second = draw(2, *shape)
    assert_equal(merging.slerp(first, second, t), reference("slerp", [first, second], t=t))


@pytest.mark.parametrize(
    "noise", [0.0, 0.02, 0.031, 0.0325, 0.05, 10.0], ids=lambda noise: f"bruit {noise}"
)
def test_slerp_near_the_line_equals_mergekit(noise):
    """De part et d’autre du cosinus où l’arc devient une corde (0,9995, soit un bruit d’environ 0,0316)."""
    first, other = draw(2, 40, 30)
    other = other - (other * first).sum() / (first * first).sum() * first
    second = first + noise * other / other.norm() * first.norm()
    assert_equal(merging.slerp(first, second, 0.3), reference("slerp", [first, second], t=0.3))


@pytest.mark.parametrize("factor", [0.0, 1e-12, -1.0])
def test_slerp_degenerate_equals_mergekit(factor):
    """Un tenseur nul, infime, ou l’opposé de l’autre."""
    (first,) = draw(1, 24, 16)
    assert_equal(merging.slerp(first, factor * first, 0.3), reference("slerp", [first, factor * first], t=0.3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[0.4, 0.6], [1.0, -0.5]])
@pytest.mark.parametrize("scaling, normalize", [(1.0, False), (0.7, False), (1.3, True)])
def test_task_arithmetic_equals_mergekit(shape, weights, scaling, normalize):
    base, *tensors = draw(3, *shape)
    ours = merging.task_arithmetic(base, tensors, weights, scaling=scaling, normalize=normalize)
    options = {"weight": weights, "lambda": scaling, "normalize": normalize}
    assert_equal(ours, reference("task_arithmetic", [base, *tensors], **options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[0.4, 0.6], [1.0, 1.0], [1.0, -0.5]])
@pytest.mark.parametrize("densities", [[1.0, 1.0], [0.5, 0.25], [0.37, 0.81], [0.001, 0.9], [0.0, 0.5]])
@pytest.mark.parametrize("normalize, rescale", [(True, False), (False, False), (True, True)])
def test_ties_equals_mergekit(shape, weights, densities, normalize, rescale):
    base, *tensors = draw(3, *shape)
    ours = merging.ties(base, tensors, weights, densities, normalize=normalize, rescale=rescale, scaling=0.8)
    options = {"normalize": normalize, "rescale": rescale, "lambda": 0.8}
    assert_equal(ours, reference("ties", [base, *tensors], weight=weights, density=densities, **options))


def test_ties_counts_equal_gaps_apart():
    """À égalité au seuil, le tri de mergekit et le nôtre gardent d’autres positions, mais autant."""
    base, tensor = torch.zeros(1000), torch.randint(-3, 4, (1000,), generator=torch.Generator().manual_seed(0)).float()
    ours = merging.ties(base, [tensor], [1.0], [0.4])
    theirs = reference("ties", [base, tensor], weight=[1.0], density=[0.4])
    assert ours.abs().sort().values.equal(theirs.abs().sort().values)
    above = tensor.abs() > ours[ours != 0].abs().min()
    assert ours[above].equal(theirs[above])


@pytest.mark.parametrize("method", [merging.dare_linear, merging.dare_ties])
@pytest.mark.parametrize("normalize", [True, False])
def test_dare_that_drops_nothing_equals_mergekit(method, normalize):
    base, *tensors = draw(3, 24, 16)
    ours = method(base, tensors, [0.4, 0.6], [1.0, 1.0], normalize=normalize)
    options = {"weight": [0.4, 0.6], "density": [1.0, 1.0], "normalize": normalize}
    assert_equal(ours, reference(method.__name__, [base, *tensors], **options))


@pytest.mark.parametrize("method", [merging.dare_linear, merging.dare_ties])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_follows_the_distribution_of_mergekit(method, rescale):
    """Sur 600 tirages, même moyenne et même écart type en chaque position, à l’erreur d’échantillonnage près."""
    base, *tensors = draw(3, 8, 6)
    torch.manual_seed(0)
    generator, n = torch.Generator().manual_seed(1), 600
    options = {"weight": [0.4, 0.6], "density": [0.5, 0.7], "rescale": rescale}
    theirs = torch.stack([reference(method.__name__, [base, *tensors], **options) for _ in range(n)])
    kind = "realised" if rescale else None
    ours = torch.stack([
        method(base, tensors, [0.4, 0.6], [0.5, 0.7], rescale=kind, generator=generator) for _ in range(n)
    ])
    error = 4.5 * (ours.var(0) + theirs.var(0)).div(n).sqrt() + 1e-6
    assert (ours.mean(0) - theirs.mean(0)).abs().le(error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.2, atol=0.02)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_names_its_two_rescalings(density):
    """`realised` (mergekit) garde la norme L1 exacte ; `expected` (l’article) divise par la densité."""
    base, tensor = draw(2, 200, 50)
    seeded = [torch.Generator().manual_seed(3) for _ in range(3)]
    realised, expected, raw = (
        merging.dare_linear(base, [tensor], [1.0], [density], rescale=kind, generator=generator) - base
        for kind, generator in zip(("realised", "expected", None), seeded, strict=True)
    )
    assert float(realised.abs().sum()) == pytest.approx(float((tensor - base).abs().sum()), rel=1e-4)
    torch.testing.assert_close(expected, raw / density, rtol=1e-4, atol=1e-5)
    theirs = reference("dare_linear", [base, tensor], weight=[1.0], density=[density]) - base
    assert float(theirs.abs().sum()) == pytest.approx(float((tensor - base).abs().sum()), rel=1e-4)
    assert float((raw != 0).float().mean()) == pytest.approx(density, abs=0.02)
    assert realised.ne(expected).any(), "le hasard ne tombe jamais juste : les deux facteurs diffèrent"


def test_dare_repeats_with_its_seed():
    base, tensor = draw(2, 24, 16)
    once, again, other = (
        merging.dare_ties(base, [tensor], [1.0], [0.5], generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert once.equal(again) and not once.equal(other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_equals_mergekit(shape, n, filter_wise):
    base, *tensors = draw(n + 1, *shape)
    ours = merging.model_stock(base, tensors, filter_wise=filter_wise)
    # Un t proche de l’infini (vecteurs presque opposés) grossit les arrondis : on les compte relativement.
    theirs = reference("model_stock", [base, *tensors], filter_wise=filter_wise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("second", [-2.0, 0.0, 1.0], ids=["opposés", "l’un nul", "égaux"])
def test_model_stock_degenerate_equals_mergekit(second):
    base, tensor = draw(2, 24, 16)
    other = base + second * (tensor - base)
    ours = merging.model_stock(base, [tensor, other])
    assert_equal(ours, reference("model_stock", [base, tensor, other]), tolerance=1e-4)
    assert_equal(ours, tensor if second == 1.0 else base, tolerance=1e-4)


@pytest.mark.parametrize("scale", [None, 1.0, 0.5, 0.0])
def test_passthrough_equals_mergekit_bitwise(scale):
    for dtype in (torch.float32, torch.bfloat16):
        (tensor,) = draw(1, 24, 16, dtype=dtype)
        assert merging.passthrough(tensor, scale).equal(reference("passthrough", [tensor], base=False, scale=[scale]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method, parameters", [("linear", {"weight": [0.3, 0.9]}), ("slerp", {"t": 0.3})])
def test_half_precision_rounds_once_like_mergekit(dtype, method, parameters):
    """Au plus un arrondi d’écart, et peu : les deux calculent en float32 et arrondissent à la fin."""
    tensors = draw(2, 200, 100, dtype=dtype)
    theirs = reference(method, tensors, base=method == "slerp", **parameters)
    arguments = (tensors, *parameters.values()) if method == "linear" else (*tensors, *parameters.values())
    ours = getattr(merging, method)(*arguments)
    assert ours.dtype == theirs.dtype == dtype
    different = ours != theirs
    assert float(different.float().mean()) < 0.05
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_task_vectors_in_half_precision_are_nearer_the_truth_than_mergekit(method):
    """mergekit calcule les écarts en bfloat16 ; nous en float32."""
    tensors = draw(3, 200, 100, dtype=torch.bfloat16)
    exact = [tensor.double() for tensor in tensors]
    arguments = ([0.4, 0.6],) if method == "task_arithmetic" else ([0.4, 0.6], [1.0, 1.0])
    function = getattr(merging, method)
    truth = function(exact[0], exact[1:], *arguments)
    ours = function(tensors[0], tensors[1:], *arguments)
    theirs = reference(method, tensors, weight=[0.4, 0.6])
    assert ours.dtype == theirs.dtype
    assert (ours - truth).abs().mean() < 0.9 * (theirs - truth).abs().mean()


def test_double_precision_is_kept():
    tensors = [tensor.double() for tensor in draw(2, 24, 16)]
    result = merging.slerp(*tensors, 0.5)
    cosine = torch.cosine_similarity(*(tensor.flatten() for tensor in tensors), dim=0)
    expected = (tensors[0] + tensors[1]) / (2 * torch.cos(torch.acos(cosine) / 2))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_dtype_is_the_type_of_the_result():
    tensors = draw(2, 24, 16, dtype=torch.bfloat16)
    assert merging.linear(tensors, [1, 1]).dtype == torch.bfloat16
    assert merging.linear([tensors[0], tensors[1].float()], [1, 1]).dtype == torch.float32
    assert merging.linear(tensors, [1, 1], dtype=torch.float32).dtype == torch.float32


METHODS = {
    "linear": lambda base, xs: merging.linear(xs, [0.3, 0.7]),
    "slerp": lambda base, xs: merging.slerp(*xs, 0.4),
    "task_arithmetic": lambda base, xs: merging.task_arithmetic(base, xs, [0.4, 0.6]),
    "ties": lambda base, xs: merging.ties(base, xs, [0.4, 0.6], [0.3, 0.6], rescale=True),
    "dare_ties": lambda base, xs: merging.dare_ties(base, xs, [0.4, 0.6], [1.0, 1.0]),
    "passthrough": lambda base, xs: merging.passthrough(xs[0], 0.5),
    "model_stock": lambda base, xs: merging.model_stock(base, xs),
    "model_stock, par ligne": lambda base, xs: merging.model_stock(base, xs, filter_wise=True),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("block", [7, 64])
def test_the_size_of_blocks_changes_nothing(name, block, monkeypatch):
    base, *tensors = draw(3, 37, 11)
    whole = METHODS[name](base, tensors)
    monkeypatch.setattr(merging, "BLOCK", block)
    monkeypatch.setattr(merging._combine, "__defaults__", (block,))
    monkeypatch.setattr(merging._blocks, "__defaults__", (block,))
    torch.testing.assert_close(METHODS[name](base, tensors), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_left_alone_and_any_layout_is_read(name):
    base, *tensors = draw(3, 12, 10)
    copies = [tensor.clone() for tensor in (base, *tensors)]
    result = METHODS[name](base, tensors)
    assert all(tensor.equal(copy) for tensor, copy in zip((base, *tensors), copies, strict=True))
    transposed = METHODS[name](base.T.contiguous().T, [tensor.T.contiguous().T for tensor in tensors])
    torch.testing.assert_close(transposed, result, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_empty_tensors_go_through(name):
    if name == "model_stock, par ligne":
        pytest.skip("une ligne vide n’a pas d’angle")
    assert METHODS[name](torch.empty(0, 4), [torch.empty(0, 4)] * 2).shape == (0, 4)


seeds = st.integers(0, 2**31 - 1)
reals = st.floats(0, 1)
weights = st.floats(0.05, 3)


@settings(max_examples=30, deadline=None)
@given(seeds, reals, weights, weights)
def test_merging_with_itself_changes_nothing(seed, t, a, b):
    base, tensor = draw(2, 9, 7, seed=seed)
    for result in (
        merging.linear([tensor, tensor], [a, b]),
        merging.slerp(tensor, tensor, t),
        merging.task_arithmetic(base, [tensor, tensor], [a, b], normalize=True),
        merging.ties(base, [tensor, tensor], [a, b], [1.0, 1.0]),
        merging.dare_linear(base, [tensor, tensor], [a, b], [1.0, 1.0], normalize=True),
        merging.model_stock(base, [tensor, tensor, tensor]),
        merging.passthrough(tensor),
    ):
        torch.testing.assert_close(result, tensor, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_ends_of_slerp_are_its_models(seed):
    first, second = draw(2, 9, 7, seed=seed)
    torch.testing.assert_close(merging.slerp(first, second, 0.0), first, rtol=0, atol=1e-6)
    torch.testing.assert_close(merging.slerp(first, second, 1.0), second, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, reals)
def test_slerp_of_equal_norms_stays_on_the_sphere(seed, t):
    first, second = draw(2, 9, 7, seed=seed)
    second = second / second.norm() * first.norm()
    assert float(merging.slerp(first, second, t).norm()) == pytest.approx(float(first.norm()), rel=1e-4)
    torch.testing.assert_close(merging.slerp(first, second, t), merging.slerp(second, first, 1 - t), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(weights, min_size=3, max_size=3), weights)
def test_normalised_weights_count_only_by_their_ratios(seed, given, factor):
    base, *tensors = draw(4, 9, 7, seed=seed)
    scaled = [factor * w for w in given]
    for method in (
        lambda w: merging.linear(tensors, w),
        lambda w: merging.ties(base, tensors, w, [0.5, 0.6, 0.7]),
        lambda w: merging.task_arithmetic(base, tensors, w, normalize=True),
    ):
        torch.testing.assert_close(method(scaled), method(given), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds, st.permutations(range(3)))
def test_the_order_of_models_does_not_count(seed, order):
    base, *tensors = draw(4, 9, 7, seed=seed)
    w, densities = [0.2, 0.5, 0.9], [0.3, 0.6, 0.8]
    shuffled = [[values[i] for i in order] for values in (tensors, w, densities)]
    for method in (
        lambda xs, w, d: merging.linear(xs, w),
        lambda xs, w, d: merging.task_arithmetic(base, xs, w),
        lambda xs, w, d: merging.ties(base, xs, w, d),
        lambda xs, w, d: merging.model_stock(base, xs),
    ):
        torch.testing.assert_close(method(*shuffled), method(tensors, w, densities), rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seeds, reals)
def test_what_weighs_nothing_leaves_the_base(seed, density):
    base, *tensors = draw(3, 9, 7, seed=seed)
    zero = [0.0, 0.0]
    assert merging.task_arithmetic(base, tensors, zero).equal(base)
    assert merging.ties(base, tensors, zero, [density, density]).equal(base)
    assert merging.dare_linear(base, tensors, zero, [density, density]).equal(base)
    assert merging.ties(base, tensors, [1.0, 1.0], zero).equal(base)
    assert merging.dare_ties(base, tensors, [1.0, 1.0], zero).equal(base)
    assert merging.task_arithmetic(base, tensors, [1.0, 1.0], scaling=0.0).equal(base)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_one_whole_task_vector_gives_its_model(seed):
    base, tensor = draw(2, 9, 7, seed=seed)
    for result in (
        merging.task_arithmetic(base, [tensor], [1.0]),
        merging.ties(base, [tensor], [1.0], [1.0]),
        merging.dare_linear(base, [tensor], [1.0], [1.0]),
        merging.dare_ties(base, [tensor], [1.0], [1.0]),
    ):
        torch.testing.assert_close(result, tensor, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seeds, reals, st.booleans())
def test_keep_largest_keeps_exactly_the_largest(seed, density, discrete):
    base, tensor = draw(2, 13, 11, seed=seed)
    if discrete:  # beaucoup d’écarts égaux
        base, tensor = base.round(), tensor.round()
    mask = merging.keep_largest(base, tensor, density)
    gaps, n = (tensor - base).abs(), tensor.numel()
    assert int(mask.sum()) == (max(1, int(density * n)) if density > 0 else 0)
    if 0 < int(mask.sum()) < n:
        assert gaps[mask].min() >= gaps[~mask].max()


@pytest.mark.parametrize("k", [1, 2, 137, 999, 1000])
def test_threshold_is_the_rank_that_sorting_gives(k):
    base, tensor = draw(2, 1000)
    expected = (tensor - base).abs().sort(descending=True).values[k - 1]
    assert merging._threshold(base, tensor, k) == (float(expected), 1)


def test_different_shapes_are_refused():
    for method in (merging.linear, merging.slerp, merging.task_arithmetic, merging.ties, merging.model_stock):
        a, b = torch.zeros(2, 3), torch.zeros(3, 2)
        arguments = {
            "linear": ([a, b], [1, 1]), "slerp": (a, b, 0.5), "task_arithmetic": (a, [b], [1]),
            "ties": (a, [b], [1], [0.5]), "model_stock": (a, [b, b]),
        }[method.__name__]
        with pytest.raises(LlamaError, match=r"même forme, ici \(2, 3\) et \(3, 2\)|même forme"):
            method(*arguments)


def test_weights_that_cancel_are_refused():
    with pytest.raises(LlamaError, match="somme des poids .* est nulle"):
        merging.linear(draw(2, 3), [1.0, -1.0])
    assert math.isclose(float(merging.linear([torch.ones(1)] * 2, [1.0, -1.0], normalize=False)), 0.0)
