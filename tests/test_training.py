"""`training` : la boucle ne dépend ni du découpage du lot, ni des interruptions."""

import math
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from llama import checkpoint
from llama.config import Config, LlamaError, TrainingConfig
from llama.data import Examples
from llama.lora import add_lora
from llama.model import LlamaModel
from llama.training import batch_indices, learning_rate, mean_loss, next_token_loss, train

CONFIG = Config(vocab_size=32, d_model=16, n_layers=2, n_heads=2, d_ff=32, block_size=16)
MOE = CONFIG.replace(num_local_experts=3, moe_layers=(1,))


def examples(n=24, seed=0, config=CONFIG) -> Examples:
    """Des suites apprenables : chaque jeton vaut le précédent plus un pas propre à la suite."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(config.vocab_size, (n, 1), generator=generator)
    stride = torch.randint(1, 4, (n, 1), generator=generator)
    tokens = (start + stride * torch.arange(config.block_size + 1)) % config.vocab_size
    labels = tokens[:, 1:].clone()
    labels[::3, :5] = -100  # des longueurs inégales, pour que la normalisation compte
    return Examples(tokens[:, :-1].clone(), labels, torch.ones(n, config.block_size, dtype=torch.int64))


def model(config=CONFIG, seed=0) -> LlamaModel:
    torch.manual_seed(seed)
    return LlamaModel(config)


def noisy_loss(network, batch):
    """Une perte qui tire au hasard : une reprise doit retrouver l’état du générateur."""
    return next_token_loss(network, batch) * (1 + 0.1 * torch.rand(()))


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_it_learns():
    network = model()
    history = train(network, examples(), TrainingConfig(steps=60, batch_size=8, learning_rate=1e-2), progress=False)
    assert history.losses[0] == pytest.approx(math.log(32) + 0.5, abs=0.3)  # logits de variance 1
    assert history.losses[-1] < history.losses[0] / 2
    assert len(history.steps) == 60 and history.tokens_per_second > 0


def test_schedule():
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_each_epoch_visits_every_example_once():
    config = TrainingConfig(steps=9, batch_size=4, seed=3)
    seen = [i for step in range(9) for i in batch_indices(step, 12, config)]
    epochs = [seen[start:start + 12] for start in range(0, 36, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    runs = []
    for micro in (8, 3, 1):
        network = model()
        config = TrainingConfig(steps=8, batch_size=8, micro_batch_size=micro)
        runs.append((train(network, examples(), config, progress=False).losses, weights(network)))
    for losses, final in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-5)
        for name, tensor in final.items():
            assert torch.allclose(tensor, runs[0][1][name], atol=1e-4), name


def test_bf16_follows_float32():
    losses = [
        train(model(), examples(), TrainingConfig(steps=20, precision=precision), progress=False).losses[-1]
        for precision in ("float32", "bf16")
    ]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_frozen_parameters_do_not_move():
    network = model()
    network.requires_grad_(False)
    with pytest.raises(LlamaError, match="Aucun paramètre à entraîner"):
        train(network, examples(), TrainingConfig(steps=1), progress=False)
    last = list(network.parameters())[-1]
    last.requires_grad_(True)
    before = weights(network)
    train(network, examples(), TrainingConfig(steps=3), progress=False)
    moved = [name for name, p in network.named_parameters() if not torch.equal(p, before[name])]
    assert [dict(network.named_parameters())[name] is last for name in moved] == [True]


def test_evaluation_is_the_mean_over_tokens():
    network, data = model(), examples(7)
    total = next_token_loss(network, data).item()
    assert mean_loss(network, data, batch_size=2) == pytest.approx(total / int((data.labels != -100).sum()), rel=1e-5)


def test_early_stopping_keeps_the_best_weights():
    config = TrainingConfig(steps=400, batch_size=8, learning_rate=2e-2, eval_every=5, patience=3)
    network, val = model(), examples(12, seed=9)
    history = train(network, examples(8), config, val=val, progress=False)
    losses = [record["val_loss"] for record in history.evaluations]
    assert len(history.steps) < 400 and len(losses) - 1 - losses.index(min(losses)) == 3
    assert mean_loss(network, val) == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_interrupted_then_resumed_equals_uninterrupted(tmp_path, config):
    settings = TrainingConfig(steps=12, batch_size=8, eval_every=4, checkpoint_every=5)
    reference = model(config)
    expected = train(reference, examples(), settings, val=examples(4, 1), loss=noisy_loss, progress=False)

    calls = []

    def interrupting_loss(network, batch):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return noisy_loss(network, batch)

    torch.manual_seed(99)
    resumed = model(config)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, examples(), settings, val=examples(4, 1), loss=interrupting_loss, out=tmp_path, progress=False)
    resumed = model(config, seed=5)  # d’autres poids de départ : tout doit venir du point de reprise
    history = train(resumed, examples(), settings, val=examples(4, 1), loss=noisy_loss, out=tmp_path, progress=False)
    assert_same(weights(resumed), weights(reference))
    assert history.losses == expected.losses
    assert history.evaluations == expected.evaluations


@pytest.mark.parametrize("change, cause", [
    ({"seed": 1}, "réglages.seed"), ({"steps": 9}, "réglages.steps"), ({"learning_rate": 0.5}, "learning_rate"),
])
def test_a_folder_of_another_run_is_refused(tmp_path, change, cause):
    settings = {"steps": 4, "batch_size": 4}
    train(model(), examples(), TrainingConfig(**settings), out=tmp_path, progress=False)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(LlamaError, match=cause):
        train(model(), examples(), TrainingConfig(**{**settings, **change}), out=tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_other_data_model_or_folder_is_refused(tmp_path):
    settings, run = TrainingConfig(steps=2, batch_size=4), tmp_path / "exécution"
    train(model(), examples(), settings, out=run, progress=False)
    with pytest.raises(LlamaError, match="données.sha256"):
        train(model(), examples(seed=7), settings, out=run, progress=False)
    with pytest.raises(LlamaError, match="modèle.d_ff"):
        train(model(CONFIG.replace(d_ff=64)), examples(), settings, out=run, progress=False)
    with pytest.raises(LlamaError, match="tient déjà une exécution"):
        train(model(), examples(), settings, out=run, resume=False, progress=False)
    (tmp_path / "autre").mkdir()
    (tmp_path / "autre" / "thèse.txt").write_text("à ne pas perdre")
    with pytest.raises(LlamaError, match="n’est pas vide"):
        train(model(), examples(), settings, out=tmp_path / "autre", progress=False)


def test_another_adapter_is_refused(tmp_path):
    settings = TrainingConfig(steps=1, batch_size=4)
    for rank in (2, 4):
        network = model()
        add_lora(network, rank, 4.0, ["q_proj"])
        if rank == 2:
            train(network, examples(), settings, out=tmp_path, progress=False)
    with pytest.raises(LlamaError, match="écrit pour un autre modèle .paramètre layers.0"):
        train(network, examples(), settings, out=tmp_path, progress=False)


def test_empty_data_divergence_and_missing_validation_are_named():
    data = examples()
    with pytest.raises(LlamaError, match="Rien à apprendre"):
        train(model(), Examples(*(t[:0] for t in data)), TrainingConfig(steps=1), progress=False)
    with pytest.raises(LlamaError, match="n’est pas au vocabulaire du modèle"):
        train(model(CONFIG.replace(vocab_size=20)), data, TrainingConfig(steps=1), progress=False)
    with pytest.raises(LlamaError, match="n’est plus un nombre au pas 1"):
        train(model(), data, TrainingConfig(steps=1), loss=lambda n, b: next_token_loss(n, b) * float("nan"),
              progress=False)
    with pytest.raises(LlamaError, match="demande des exemples d’évaluation"):
        train(model(), data, TrainingConfig(steps=9, eval_every=1, patience=1), progress=False)


KILLED = TrainingConfig(steps=150, batch_size=4, checkpoint_every=1)


def _train_until_killed(folder: str) -> None:
    torch.set_num_threads(1)
    train(model(MOE), examples(), KILLED, loss=noisy_loss, out=folder, progress=False)


def _writing(folder: Path) -> bool:
    return any(folder.glob(".*.partial"))


def _wait(condition, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline, "l’entraînement à tuer s’est arrêté seul"


def test_sigkill_at_twenty_instants_changes_nothing(tmp_path, monkeypatch):
    """Tué net vingt fois, dont au milieu de l’écriture d’un point de reprise, l’entraînement finit au même point."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reference, folder = model(MOE), tmp_path / "reprise"
    expected = train(reference, examples(), KILLED, loss=noisy_loss, progress=False)

    # Un serveur importe tout une fois, et chaque processus à tuer en est une copie : un vrai processus, vite né.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # que le premier pas importe
    rng, inside = random.Random(0), 0
    for kill in range(20):
        before = checkpoint.steps(folder)
        process = context.Process(target=_train_until_killed, args=(str(folder),))
        process.start()
        _wait(lambda before=before: checkpoint.steps(folder) != before, process)
        time.sleep(rng.random() * 0.02)
        if kill % 2:  # une fois sur deux, viser le milieu d’une écriture
            _wait(lambda: _writing(folder), process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        inside += _writing(folder)
    print(f"{inside} arrêts sur 20 au milieu d’une écriture ; reprise au pas {checkpoint.steps(folder)[-1]}")
    assert inside >= 3 and checkpoint.steps(folder)[-1] < KILLED.steps
    resumed = model(MOE, seed=5)
    history = train(resumed, examples(), KILLED, loss=noisy_loss, out=folder, progress=False)
    torch.set_num_threads(threads)
    assert history.losses == expected.losses
    assert_same(weights(resumed), weights(reference))
