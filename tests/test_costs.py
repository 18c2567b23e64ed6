"""`costs` : les comptes retrouvent ceux du modèle construit, ceux de PyTorch, et ceux que d’autres ont publiés."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llama import costs
from llama.config import Config, LlamaError
from llama.data import Examples
from llama.model import LlamaModel
from llama.training import next_token_loss

TINY = Config(vocab_size=64, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=80, block_size=128)


def activations(model: LlamaModel, sequences: int, length: int) -> int:
    """Les octets que garde vraiment la passe avant, poids non compris."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(model.config.vocab_size, (sequences, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(model, Examples(ids, ids, torch.ones_like(ids)))
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("tied", [True, False])
def test_forward_flops_are_those_torch_counts(tied):
    config, length = TINY.replace(tie_word_embeddings=tied), 16
    ids = torch.zeros(1, length, dtype=torch.int64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        LlamaModel(config)(ids)
    heads = 4 * config.n_layers * config.n_heads * config.d_k
    masked = heads * (length**2 - length * (length + 1) / 2)  # PyTorch compte aussi ce que le masque cache
    assert costs.forward_flops(config, length) == counter.get_total_flops() - masked


def test_training_flops_are_near_six_n_d():
    assert costs.training_flops(100, 10) == 6000
    config = costs.SHAPES["Llama-3.1-405B"]
    exact = costs.training_flops(config, 1e12)
    assert 1 < exact / costs.training_flops(config.n_parameters(), 1e12) < 1.1
    assert costs.training_flops(TINY, 256) == 2 * 3 * costs.forward_flops(TINY, 128)


@pytest.mark.parametrize("length", [64, 128])
def test_activations_are_those_kept(length):
    predicted = costs.activation_bytes(TINY, 4, length, "float32", keep_attention=True)
    assert activations(LlamaModel(TINY), 4, length) == pytest.approx(predicted, rel=0.03)


def test_recomputing_keeps_the_entries_of_the_layers():
    model = LlamaModel(TINY)
    model.gradient_checkpointing = True
    predicted = costs.activation_bytes(TINY, 4, 128, "float32", keep_attention=True, recompute=True)
    whole = costs.activation_bytes(TINY, 4, 128, "float32", keep_attention=True)
    assert activations(model, 4, 128) < predicted < whole / 2


@pytest.mark.parametrize("name, parameters", [
    ("petit", 11_015_040), ("SmolLM2-135M", 134_515_008), ("Llama-3.1-8B", 8_030_261_248),
    ("Llama-3.1-70B", 70_553_706_496), ("Llama-3.1-405B", 405_853_388_800),
])
def test_published_shapes_have_the_published_sizes(name, parameters):
    assert costs.SHAPES[name].n_parameters() == parameters


@pytest.mark.parametrize("precision", costs.TRAINING)
@pytest.mark.parametrize("stage, octets", [(0, 16), (1, 8), (2, 4), (3, 0)])
def test_training_bytes_by_stage(precision, stage, octets):
    """À degré croissant, ce qui n’est pas réparti diminue jusqu’à rien (Rajbhandari et al. 2020, fig. 1)."""
    found = sum(costs.training_bytes(1e9, precision, 10**9, stage).values()) / 1e9
    expected = {"float32": octets, "mixte": {16: 16, 8: 4, 4: 2, 0: 0}[octets]}[precision]
    assert found == pytest.approx(expected, abs=1e-6)


def test_alone_nothing_is_shared_nor_sent():
    for stage in range(4):
        assert sum(costs.training_bytes(10, processes=1, stage=stage).values()) == 160
    assert costs.sent_bytes(10, 1) == costs.sent_bytes(10, 1, sharded=True) == 0


def test_sent_bytes():
    assert costs.sent_bytes(1000, 2) == 4000
    assert costs.sent_bytes(1000, 4, precision="bf16") == 3000
    assert costs.sent_bytes(1000, 2, sharded=True) / costs.sent_bytes(1000, 2) == 1.5


def test_weights_and_cache():
    assert [costs.weight_bytes(8, precision) for precision in costs.BYTES] == [32, 16, 8, 4]
    assert costs.kv_cache_bytes(TINY, 2, 10, "float32") == 2 * 10 * 3 * 2 * 2 * 8 * 4


def test_step_hides_the_messages_behind_the_backward_pass():
    assert costs.step_seconds(3, 1, 4, 2) == 5
    assert costs.step_seconds(3, 1, 4, 2, overlapped=True) == 3
    assert costs.step_seconds(3, 1, 6, 2, overlapped=True) == 4


def test_bubble_and_amdahl():
    assert costs.bubble(1, 8) == 0 and costs.bubble(4, 1) == 0.75 and costs.bubble(4, 9) == 0.25
    assert costs.amdahl(0, 16) == 16 and costs.amdahl(1, 16) == 1
    assert costs.amdahl(0.1, 1e9) == pytest.approx(10)


def test_published_runs_are_found_again():
    """BLOOM : énergie et carbone de Luccioni et al. 2023, table 1. Llama 3.1 405B : heures de sa carte."""
    bloom = costs.bill(1_082_990, costs.HARDWARE["A100"].watts, pue=1, grid=57)
    assert bloom.kwh == pytest.approx(433_196) and bloom.kilograms == pytest.approx(24_690, rel=1e-3)
    flops = costs.training_flops(costs.SHAPES["Llama-3.1-405B"], 15.6e12)
    seconds = costs.training_seconds(flops, 16_384, costs.HARDWARE["H100"].peak, 0.4)
    assert 16_384 * seconds / 3600 == pytest.approx(30.84e6, rel=0.15)


def test_a_grid_is_a_name_or_grams():
    one = costs.bill(10, 100, pue=1, grid="France", price=3)
    assert (one.hours, one.kwh, one.euros) == (10, 1, 30) and one.kilograms == costs.GRIDS["France"] / 1000
    assert costs.bill(10, 100, pue=1, grid=500).kilograms == 0.5


@pytest.mark.parametrize("call", [
    lambda: costs.weight_bytes(1, "int3"), lambda: costs.training_bytes(1, "bf16"),
    lambda: costs.training_bytes(1, stage=4), lambda: costs.training_bytes(1, processes=0),
    lambda: costs.activation_bytes(TINY.replace(num_local_experts=2, moe_layers=(0,)), 1),
    lambda: costs.bill(1, 1, grid="Lune"),
    lambda: costs.bubble(0, 1), lambda: costs.training_seconds(1, 1, 1, 0), lambda: costs.sent_bytes(1, 0),
])
def test_user_errors_are_one_line(call):
    with pytest.raises(LlamaError) as error:
        call()
    assert "\n" not in str(error.value)
