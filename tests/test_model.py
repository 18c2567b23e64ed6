"""Le modèle, contre celui de transformers à poids égaux, et contre lui-même : cache, documents, équilibre."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from llama.config import Config, LlamaError
from llama.context import document_positions
from llama.model import ExpertMLP, KVCache, LlamaModel, MoE
from llama.transformers_format import published_tensors

TOLERANCE = 1e-4
VISIBLE = 100 * TOLERANCE
"""Ce qu’une option éteinte d’un seul côté doit au moins changer."""
STD = 0.2  # à 0,02, éteindre une option change moins que la tolérance
T = 40

DENSE = Config(vocab_size=97, d_model=48, n_layers=5, n_heads=6, n_kv_heads=2, d_ff=64, tie_word_embeddings=False)
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DENSE_VARIANTS = {
    "gqa": DENSE,
    "mha": replace(DENSE, n_kv_heads=6),
    "tied": replace(DENSE, tie_word_embeddings=True),
    "d_k": replace(DENSE, d_k=16),
    "theta": replace(DENSE, rope_theta=500.0),
    "scaling": replace(DENSE, rope_scaling=SCALING),
}
# Tout à la fois : couches denses et MoE, sans RoPE, tranches et paliers bien plus courts que l’entrée.
LLAMA4 = Config(
    vocab_size=97, d_model=48, n_layers=6, n_heads=6, n_kv_heads=2, d_k=16, d_ff=32, d_ff_dense=80,
    tie_word_embeddings=False, num_local_experts=4, num_experts_per_tok=2, moe_layers=(1, 3, 4), qk_norm=True,
    nope_layers=(2, 4), attention_chunk_size=8, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.5,
)
LLAMA4_VARIANTS = {
    "all": LLAMA4,
    "top1": replace(LLAMA4, num_experts_per_tok=1),
    "tied": replace(LLAMA4, tie_word_embeddings=True),
    "no_qk_norm": replace(LLAMA4, qk_norm=False),
    "no_temperature": replace(LLAMA4, attn_temperature_tuning=False),
    "no_nope": replace(LLAMA4, nope_layers=()),
    "other_nope": replace(LLAMA4, nope_layers=(0, 3, 5)),
    "no_chunks": replace(LLAMA4, attention_chunk_size=None),
    "all_moe": replace(LLAMA4, moe_layers=tuple(range(6))),
    "d_k": replace(LLAMA4, d_k=8),
    "plain": Config(
        vocab_size=97, d_model=48, n_layers=5, n_heads=6, d_ff=32, num_local_experts=4, tie_word_embeddings=False
    ),
}
VARIANTS = {f"llama-{k}": v for k, v in DENSE_VARIANTS.items()} | {f"llama4-{k}": v for k, v in LLAMA4_VARIANTS.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def reference(config: Config) -> LlamaForCausalLM | Llama4ForCausalLM:
    """Le modèle de transformers, réglé à la main, de poids au hasard."""
    common = dict(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.d_k,
        intermediate_size=config.d_ff, rms_norm_eps=config.rms_norm_eps, max_position_embeddings=128,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=(config.rope_scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta},
    )
    if config.rope_style == "halves":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        rope_layers = [int(i not in config.nope_layers) for i in range(config.n_layers)]
        model = Llama4ForCausalLM(Llama4TextConfig(
            **common, intermediate_size_mlp=config.d_ff_dense, num_local_experts=config.num_local_experts,
            num_experts_per_tok=config.num_experts_per_tok, moe_layers=list(config.moe_layers),
            use_qk_norm=config.qk_norm, no_rope_layers=rope_layers,
            attention_chunk_size=config.attention_chunk_size or 1000,
            attn_temperature_tuning=config.attn_temperature_tuning, floor_scale=config.floor_scale,
            attn_scale=config.attn_scale,
        ))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.0 if parameter.dim() > 1 else 1.0, std=STD)
    return model.eval()


def ours(config: Config, weights: dict[str, Tensor]) -> LlamaModel:
    """Notre modèle, aux poids de transformers."""
    model = LlamaModel(config)
    tensors = published_tensors(model.state_dict(), config)
    state = {name: w for published, tensor in tensors.items() for name, w in tensor.split(weights[published])}
    model.load_state_dict(state)
    return model.eval()


def random_model(config: Config) -> LlamaModel:
    model = LlamaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.0 if parameter.dim() > 1 else 1.0, std=STD)
    return model


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(config: Config) -> None:
    """Mêmes poids, mêmes logits, à l’inférence comme sur le chemin de l’entraînement."""
    theirs = reference(config)
    mine = ours(config, theirs.state_dict())
    ids = torch.randint(config.vocab_size, (3, T))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert difference(mine(ids), expected) < TOLERANCE
    assert difference(mine.train()(ids), expected) < TOLERANCE
    assert expected.std() > 1  # des logits trop petits seraient égaux pour rien


SWITCHES = {
    "qk_norm": {"qk_norm": False},
    "temperature": {"attn_temperature_tuning": False},
    "floor_scale": {"floor_scale": 8192},
    "nope": {"nope_layers": ()},
    "which_nope": {"nope_layers": (2, 5)},
    "chunks": {"attention_chunk_size": None},
    "chunk_size": {"attention_chunk_size": 9},
    "top2": {"num_experts_per_tok": 1},
    "rope_style": {"rope_style": "halves"},
    "theta": {"rope_theta": 500.0},
}


@pytest.mark.parametrize("change", SWITCHES.values(), ids=SWITCHES.keys())
def test_each_llama4_option_matters(change: dict) -> None:
    """Éteindre ou changer une option d’un seul côté se voit : aucune des égalités ci-dessus n’est vide."""
    theirs = reference(LLAMA4)
    weights, ids = theirs.state_dict(), torch.randint(97, (3, T))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert difference(ours(LLAMA4, weights)(ids), expected) < TOLERANCE
        kept = published_tensors(LlamaModel(LLAMA4).state_dict(), LLAMA4)
        changed = LlamaModel(replace(LLAMA4, **change)).eval()
        changed.load_state_dict({n: w for p, t in kept.items() for n, w in t.split(weights[p])})
        assert difference(changed(ids), expected) > VISIBLE


@pytest.mark.parametrize("change", [
    {"rope_style": "pairs"}, {"rope_theta": 500.0}, {"rope_scaling": SCALING}, {"rms_norm_eps": 0.1},
], ids=str)
def test_each_llama_option_matters(change: dict) -> None:
    theirs = reference(DENSE)
    ids = torch.randint(97, (3, T))
    changed = LlamaModel(replace(DENSE, **change))
    changed.load_state_dict(ours(DENSE, theirs.state_dict()).state_dict())
    with torch.no_grad():
        assert difference(changed(ids), theirs(ids).logits) > VISIBLE


@pytest.mark.parametrize("change", [
    {"n_kv_heads": 6}, {"d_k": 12}, {"moe_layers": (1, 3)}, {"d_ff_dense": 32}, {"num_local_experts": 3},
    {"tie_word_embeddings": True},
], ids=str)
def test_options_of_shape_refuse_other_weights(change: dict) -> None:
    """Ces options changent les formes ou les noms : les poids d’un autre modèle n’y entrent pas."""
    with pytest.raises(RuntimeError):
        LlamaModel(replace(LLAMA4, **change)).load_state_dict(LlamaModel(LLAMA4).state_dict())


def test_grouped_heads_share_the_right_keys() -> None:
    """La tête de clés g sert les têtes de requêtes qui se suivent, g·H/G… ; les répartir autrement se voit."""
    grouped = random_model(DENSE)
    ids = torch.randint(97, (2, T))

    def with_all_heads(order: list[int]) -> LlamaModel:
        model = LlamaModel(replace(DENSE, n_kv_heads=6))
        state = grouped.state_dict()
        for name in [n for n in state if n.endswith(("k_proj.weight", "v_proj.weight"))]:
            state[name] = state[name].unflatten(0, (2, -1))[order].flatten(0, 1)
        model.load_state_dict(state)
        return model

    with torch.no_grad():
        assert difference(with_all_heads([0, 0, 0, 1, 1, 1])(ids), grouped(ids)) < TOLERANCE
        assert difference(with_all_heads([0, 1, 0, 1, 0, 1])(ids), grouped(ids)) > VISIBLE


def test_shared_expert_matters() -> None:
    model = random_model(LLAMA4)
    ids = torch.randint(97, (2, T))
    with torch.no_grad():
        before = model(ids)
        model.layers[1].feed_forward.shared_expert.down_proj.weight.zero_()
        assert difference(model(ids), before) > VISIBLE


CACHED = {"llama": DENSE, "llama4": LLAMA4, "chunks": replace(LLAMA4, nope_layers=(), attention_chunk_size=5)}


@pytest.mark.parametrize("steps", [[1] * T, [T], [7, 1, 12, 1, 1, 18], [39, 1]], ids=str)
@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED.keys())
def test_cache_equals_recomputation(config: Config, steps: list[int]) -> None:
    model = random_model(config)
    ids = torch.randint(97, (2, T))
    cache = KVCache(config, 2, T)
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache) for part in ids.split(steps, dim=1)], dim=1)
        assert difference(logits, model(ids)) < TOLERANCE
    assert cache.length == T


@pytest.mark.parametrize("steps", [[1] * 10, [10], [4, 1, 5]], ids=str)
@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED.keys())
def test_cache_of_unequal_prompts(config: Config, steps: list[int]) -> None:
    """Des invites remplies à gauche, puis prolongées : chacune comme si elle était seule."""
    model = random_model(config)
    prompts = [torch.randint(97, (n,)) for n in (17, 30, 5)]
    following = torch.randint(97, (3, 10))
    ids = torch.stack([F.pad(p, (30 - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (30 - len(p), 0)) for p in prompts])
    for given in (True, False):  # le masque de la suite peut être omis
        cache = KVCache(config, 3, 40)
        with torch.no_grad():
            parts = [model(ids, mask=mask, cache=cache)]
            for part in following.split(steps, dim=1):
                parts.append(model(part, mask=torch.ones_like(part) if given else None, cache=cache))
            logits = torch.cat(parts, dim=1)
            for row, prompt in enumerate(prompts):
                alone = model(torch.cat([prompt, following[row]])[None])[0]
                assert difference(logits[row, 30 - len(prompt):], alone) < TOLERANCE


def test_full_cache_is_refused() -> None:
    model, cache = random_model(DENSE), KVCache(DENSE, 1, 8)
    with torch.no_grad():
        model(torch.zeros(1, 6, dtype=torch.int64), cache=cache)
        with pytest.raises(LlamaError, match="Cache plein : 9 jetons pour 8 places"):
            model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED.keys())
def test_packed_documents_ignore_each_other(config: Config, training: bool) -> None:
    """Des documents mis bout à bout donnent ce qu’ils donneraient seuls ; sans masque, non."""
    model = random_model(config)
    lengths = [[11, 20, 6, 3], [25, 1, 14, 0]]  # le dernier nombre est du remplissage, à droite
    mask = torch.stack([
        torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor(row)) for row in lengths
    ])
    ids = torch.randint(97, (2, T))
    with torch.set_grad_enabled(training):
        packed = model(ids, mask=mask)
        assert torch.isfinite(packed).all()
        for row in range(2):
            start = 0
            for length in lengths[row][:3]:
                alone = model(ids[row:row + 1, start:start + length])
                assert difference(packed[row:row + 1, start:start + length], alone) < TOLERANCE
                start += length
        assert difference(packed[0, 11:31], model(ids)[0, 11:31]) > VISIBLE


def test_mask_of_ones_changes_nothing() -> None:
    model, ids = random_model(LLAMA4), torch.randint(97, (2, T))
    with torch.no_grad():
        assert difference(model(ids, mask=torch.ones_like(ids)), model(ids)) < TOLERANCE


def test_document_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 2], [1, 1, 2, 2, 2, 0]])
    assert document_positions(mask).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 0]]


def test_causality() -> None:
    """Changer un jeton ne change rien avant lui."""
    model, ids = random_model(LLAMA4), torch.randint(97, (1, T))
    other = ids.clone()
    other[0, 25] = (ids[0, 25] + 1) % 97
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a[:, :25], b[:, :25])
    assert difference(a[:, 25:], b[:, 25:]) > VISIBLE


@pytest.mark.parametrize("config", [DENSE, DENSE_VARIANTS["tied"], LLAMA4], ids=["llama", "tied", "moe"])
def test_initial_loss(config: Config) -> None:
    """À la naissance, les logits ont pour variance 1 : la perte vaut ln V + ½."""
    config = replace(config, vocab_size=1000, d_model=96)
    torch.manual_seed(0)
    model, ids = LlamaModel(config), torch.randint(1000, (8, 101))
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert abs(loss - (math.log(1000) + 0.5)) < 0.15


def test_n_parameters() -> None:
    for config in (DENSE, replace(DENSE, tie_word_embeddings=True), LLAMA4):
        assert sum(p.numel() for p in LlamaModel(config).parameters()) == config.n_parameters()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, ids = random_model(LLAMA4).train(), torch.randint(97, (2, T))

    def gradients(checkpointing: bool) -> list[Tensor]:
        model.zero_grad()
        model.gradient_checkpointing = checkpointing
        (model(ids).logsumexp(-1).sum() + model.auxiliary_loss().sum()).backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_training_step_is_deterministic() -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model = LlamaModel(LLAMA4)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randint(97, (4, T))).float().logsumexp(-1).mean() + model.auxiliary_loss().mean()
        loss.backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("config", [DENSE, LLAMA4], ids=["llama", "llama4"])
def test_bf16_is_close(config: Config) -> None:
    """Autocast, ou des poids en bf16 : les mêmes probabilités, à la précision du bf16."""
    torch.manual_seed(0)
    model, ids = LlamaModel(config), torch.randint(97, (4, T))
    with torch.no_grad():
        expected = model(ids).softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            assert difference(model(ids).float().softmax(-1), expected) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model(ids).float().softmax(-1), expected) < 0.02
    with torch.no_grad():
        assert difference(model.to(torch.bfloat16)(ids).float().softmax(-1), expected) < 0.02


def test_experts_compute_only_what_they_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    moe, seen = MoE(replace(LLAMA4, num_experts_per_tok=1)), []
    forward = ExpertMLP.forward
    monkeypatch.setattr(ExpertMLP, "forward", lambda self, x: seen.append((self, len(x))) or forward(self, x))
    moe(torch.randn(2, 30, 48))
    computed = [n for expert, n in seen if expert is not moe.shared_expert]
    assert sum(computed) == 60 and computed == moe.load().tolist()
    assert moe.load(torch.arange(60) < 10).sum() == 10


def test_expert_load_excludes_padding() -> None:
    model, mask = random_model(LLAMA4), torch.ones(2, T, dtype=torch.int64)
    mask[0, :15] = 0
    with torch.no_grad():
        model(torch.randint(97, (2, T)), mask=mask)
    load = model.expert_load()
    assert load.shape == (3, 4) and (load.sum(1) == 2 * (2 * T - 15)).all()
    assert LlamaModel(DENSE).expert_load().shape == (0, 0) and LlamaModel(DENSE).auxiliary_loss() == 0


def test_balance_loss_is_least_when_uniform() -> None:
    """1 à charges égales, E quand un expert reçoit tout, entre les deux sinon (Fedus et al. 2021, §2.2)."""
    moe = MoE(replace(LLAMA4, num_experts_per_tok=1))

    def loss(experts: list[int]) -> float:
        moe.chosen = torch.tensor(experts)[:, None]
        moe.scores = F.one_hot(moe.chosen[:, 0], 4) * 40.0 - 20.0
        return moe.balance_loss(torch.ones(1, len(experts), dtype=torch.bool)).item()

    uniform, skewed, all_to_one = loss([0, 1, 2, 3] * 5), loss([0] * 8 + [1, 2, 3] * 4), loss([2] * 20)
    assert uniform == pytest.approx(1) and all_to_one == pytest.approx(4)
    assert uniform < skewed < all_to_one


def test_balance_gradient_lowers_the_busiest_expert() -> None:
    moe = MoE(replace(LLAMA4, num_experts_per_tok=1))
    scores = (torch.randn(200, 4) + torch.tensor([1.0, 0.0, 0.0, 0.0])).requires_grad_()
    moe.scores, moe.chosen = scores, scores.topk(1).indices
    moe.balance_loss(torch.ones(1, 200, dtype=torch.bool)).backward()
    busiest = moe.load().argmax()
    # Descendre le gradient baisse le score de l’expert le plus chargé, et lui seul.
    assert scores.grad.mean(0)[busiest] > 0 and scores.grad.mean(0).argmax() == busiest
    assert scores.grad.mean(0).sum() < scores.grad.mean(0)[busiest]


def test_training_balances_a_skewed_router() -> None:
    """Un routeur qui envoie presque tout à un expert se rééquilibre, et reste bancal sans la perte d’équilibrage."""
    def shares(coefficient: float) -> list[float]:
        torch.manual_seed(0)
        config = Config(
            vocab_size=50, d_model=32, n_layers=1, n_heads=2, d_ff=32, num_local_experts=4,
            router_aux_loss_coef=coefficient,
        )
        model, direction, result = LlamaModel(config), torch.randn(32), []
        with torch.no_grad():
            model.embed_tokens.weight += direction  # tous les jetons penchent d’un côté, celui de l’expert 0
            model.layers[0].feed_forward.router.weight[0] += 0.05 * direction
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(150):
            ids = torch.randint(50, (8, 33))
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            load = model.expert_load()[0]
            result.append((load.max() / load.sum()).item())
            (loss + model.auxiliary_loss().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return result

    with_loss, without = shares(0.05), shares(0.0)
    assert with_loss[0] > 0.9
    assert sum(with_loss[-20:]) / 20 < 0.45 and sum(without[-20:]) / 20 > 0.8


def test_model_in_training_can_be_copied() -> None:
    model, ids = random_model(LLAMA4).train(), torch.randint(97, (2, T))
    logits = model(ids)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids), logits)
