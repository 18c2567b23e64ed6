"""`distributed` : à deux processus, répartis ou non, l’entraînement est celui d’un processus seul.

Ce fichier est aussi le programme que torchrun lance : `python test_distributed.py scénario dossier`. Un seul
lancement joue la plupart des scénarios, et chaque rang écrit ce qu’il a vu ; les essais le comparent à ce que
calcule un processus seul. Les 50 pas de « dense » sont la mesure ; les autres scénarios, plus courts, sont des pièges.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from llama import checkpoint, distributed
from llama.cli import app
from llama.config import Config, LlamaError, TrainingConfig
from llama.data import Examples
from llama.history import History
from llama.lora import add_lora
from llama.model import LlamaModel
from llama.training import next_token_loss, train

CONFIG = Config(vocab_size=32, d_model=16, n_layers=2, n_heads=2, d_ff=32, block_size=16)
MOE = CONFIG.replace(num_local_experts=6, moe_layers=(1,))
SETTINGS = TrainingConfig(steps=50, batch_size=7, micro_batch_size=2, learning_rate=1e-2, eval_every=10)
SCENARIOS = {
    "dense": (CONFIG, SETTINGS),  # 7 exemples pour 2 processus, par passages de 2
    "moe": (MOE, dataclasses.replace(SETTINGS, steps=15, batch_size=3, micro_batch_size=1)),
    "rang sans exemple": (CONFIG, dataclasses.replace(SETTINGS, steps=15, batch_size=1)),
    "lora": (CONFIG, dataclasses.replace(SETTINGS, steps=15)),
    "arrêt anticipé": (CONFIG, dataclasses.replace(SETTINGS, steps=200, eval_every=4, patience=2)),
}
RESUMED = dataclasses.replace(SETTINGS, steps=10, eval_every=4, checkpoint_every=3)
ENDLESS = dataclasses.replace(SETTINGS, steps=10**5)
WAYS = {"copies": False, "réparti": True}
every_way = pytest.mark.parametrize("way", WAYS)


def examples(n: int = 24, seed: int = 0) -> Examples:
    """Des suites apprenables, de réponses inégales ; un exemple sur quatre n’a rien à apprendre."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(CONFIG.vocab_size, (n, 1), generator=generator)
    stride = torch.randint(1, 4, (n, 1), generator=generator)
    tokens = (start + stride * torch.arange(CONFIG.block_size + 1)) % CONFIG.vocab_size
    labels = tokens[:, 1:].clone()
    for row, length in enumerate(torch.randint(CONFIG.block_size, (n,), generator=generator).tolist()):
        labels[row, :length if row % 4 else CONFIG.block_size] = -100
    return Examples(tokens[:, :-1].clone(), labels, torch.ones(n, CONFIG.block_size, dtype=torch.int64))


def make(name: str = "dense", seed: int = 0) -> LlamaModel:
    torch.manual_seed(seed)
    network = LlamaModel(SCENARIOS[name][0])
    if name == "lora":
        add_lora(network, rank=2, alpha=4.0, targets=["q_proj", "down_proj"], seed=seed)
    return network


def run(network: nn.Module, settings: TrainingConfig, **options: Any) -> History:
    data = options.pop("data", None) or examples()
    return train(network, data, settings, val=examples(5, 1), progress=False, **options)


def losses(history: History) -> dict[str, list[float]]:
    return {"train": history.losses, "val": [record["val_loss"] for record in history.evaluations]}


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def noisy_loss(network: nn.Module, batch: Examples) -> Tensor:
    return next_token_loss(network, batch) * (1 + 0.1 * torch.rand(()))


def failing_loss(network: nn.Module, batch: Examples) -> Tensor:
    if distributed.rank() == 1:
        raise LlamaError("Rien ne va plus.")
    return next_token_loss(network, batch)


class Interrupting:
    """Une perte pendant laquelle arrive Ctrl-C, au n-ième appel, si ce processus est visé."""

    def __init__(self, call: int, target: int, loss=next_token_loss, process: int | None = None) -> None:
        self.calls, self.call, self.target, self.loss, self.process = 0, call, target, loss, process

    def __call__(self, network: nn.Module, batch: Examples) -> Tensor:
        self.calls += 1
        if self.calls == self.call and distributed.rank() == self.target:
            os.kill(self.process or os.getpid(), signal.SIGINT)
        return self.loss(network, batch)


def interrupted(folder: Path, settings: TrainingConfig, loss: Interrupting) -> bool:
    try:
        run(make(), settings, loss=loss, out=folder)
    except KeyboardInterrupt:
        return True
    return False


def refusal(action: Any) -> str:
    try:
        action()
    except LlamaError as error:
        return str(error)
    return ""


# --- Ce que torchrun lance ------------------------------------------------------------------------------------------


def scenarios(folder: Path) -> None:
    """Tous les scénarios où les processus finissent ensemble, puis celui où l’un s’arrête sur une erreur."""
    rank, report = distributed.rank(), {}
    for way, sharded in WAYS.items():
        for name, (_, settings) in SCENARIOS.items():
            network, loads = make(name, seed=rank), []  # d’autres poids au départ : ceux du rang 0 l’emportent

            def loss(model: nn.Module, batch: Examples, loads=loads) -> Tensor:
                value = next_token_loss(model, batch)
                loads.append(model.expert_load().tolist())
                return value

            history = run(network, dataclasses.replace(settings, sharded=sharded), loss=loss)
            report[f"{name} {way}"] = losses(history) | {"loads": loads}
            save_file(weights(network), folder / f"{name} {way} {rank}.safetensors")
        report[f"reprise {way}"] = resumptions(folder, way, dataclasses.replace(RESUMED, sharded=sharded))
    report["refus"] = refusals(folder)
    report["gradients"] = [gradients(bucket) for bucket in (1, 7, 2**20)]
    report["petits"] = {
        "anywhere": [distributed.anywhere(condition) for condition in (rank == 1, False)],
        "total": distributed.total(rank + 0.5),
        "share": [distributed.share(examples(n)).ids.tolist() for n in (5, 1)],
    }
    (folder / f"rapport {rank}.json").write_text(json.dumps(report))
    run(make(), ENDLESS, loss=failing_loss)


def resumptions(folder: Path, way: str, settings: TrainingConfig) -> dict[str, Any]:
    """Reprises d’un à deux et de deux à deux processus ; le point que reprendra un processus seul."""
    rank, report, saves, save = distributed.rank(), {}, [], checkpoint.save
    checkpoint.save = lambda *arguments: (saves.append(1), save(*arguments))
    resumed = make(seed=5)
    report["1 vers 2"] = losses(run(resumed, settings, out=folder / f"un {way}"))
    saves.clear()
    report["interrompus"] = interrupted(folder / f"deux {way}", settings, Interrupting(7, 1))
    report["écritures"] = len(saves)
    checkpoint.save = save

    torch.manual_seed(0)
    reference = make()
    expected = run(reference, settings, loss=noisy_loss)
    interrupted(folder / f"bruit {way}", settings, Interrupting(7, 0, noisy_loss))
    resumed = make(seed=5)
    history = run(resumed, settings, loss=noisy_loss, out=folder / f"bruit {way}")
    same = all(torch.equal(a, b) for a, b in zip(weights(reference).values(), weights(resumed).values(), strict=True))
    report["au bit près"] = same and losses(history) == losses(expected)
    report["hasard"] = torch.rand(3).tolist()
    save_file(checkpoint.load(folder / f"bruit {way}").tensors["model"], folder / f"sauvé {way} {rank}.safetensors")
    return report


def refusals(folder: Path) -> dict[str, str]:
    """Ce qui va mal chez un seul, et que tous doivent dire."""
    rank = distributed.rank()

    def full(*arguments: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    found = {"données": refusal(lambda: run(make(), RESUMED, data=examples(seed=rank)))}
    found["dossier"] = refusal(lambda: run(make(), RESUMED, out=folder / "seul" if rank == 0 else None))
    found["nan"] = refusal(lambda: run(
        make(), RESUMED, loss=lambda model, batch: next_token_loss(model, batch) * (float("nan") if rank else 1)))
    checkpoint.save_file, kept = full, checkpoint.save_file
    found["disque"] = refusal(lambda: run(make(), RESUMED, out=folder / "plein"))
    checkpoint.save_file = kept
    return found


def gradients(bucket: int) -> list[Any]:
    """Les gradients additionnés : présent partout, chez un seul, nulle part, gelé, et une matrice."""
    distributed.BUCKET, kept = bucket, distributed.BUCKET
    rank, sizes = distributed.rank(), [(3,), (4,), (2,), (2,), (2, 3)]
    parameters = [nn.Parameter(torch.zeros(size), requires_grad=i != 3) for i, size in enumerate(sizes)]
    for i, parameter in enumerate(parameters):
        if i in (0, 4) or (i == 1 and rank == 1):
            parameter.grad = torch.arange(parameter.numel()).view_as(parameter) + 10.0 * rank
    distributed.sum_gradients(parameters)
    distributed.BUCKET = kept
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def control_c(folder: Path) -> None:
    """Ctrl-C dans le terminal de torchrun, qui le passe à chacun, mais pas au même instant."""
    interrupted(folder, ENDLESS, Interrupting(7, 1, process=os.getppid()))


def main(scenario: str, folder: str) -> None:
    dist.init_process_group("gloo")
    try:
        {"scenarios": scenarios, "control_c": control_c}[scenario](Path(folder))
    except LlamaError as error:
        print(f"rang {distributed.rank()} : {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        dist.destroy_process_group()


# --- Les essais -----------------------------------------------------------------------------------------------------


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun arrête les siens ; tué net, il les laisserait s’attendre
        pytest.fail(f"les processus s’attendent sans fin :\n{process.communicate()[1][-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@functools.cache
def alone(name: str) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Ce que calcule un processus seul."""
    network = make(name)
    return losses(run(network, SCENARIOS[name][1])), weights(network)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Le dossier des scénarios ; il tient déjà un apprentissage qu’un processus seul a commencé."""
    path = tmp_path_factory.mktemp("deux")
    assert interrupted(path / "un copies", RESUMED, Interrupting(11, 0))
    return shutil.copytree(path / "un copies", path / "un réparti").parent


@pytest.fixture(scope="module")
def played(folder) -> subprocess.CompletedProcess[str]:
    """Deux processus y ont joué tous les scénarios."""
    return torchrun(__file__, "scenarios", folder)


@pytest.fixture(scope="module")
def reports(folder, played) -> list[dict[str, Any]]:
    """Ce que chaque rang a vu."""
    paths = [folder / f"rapport {rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), played.stderr[-3000:]
    return [json.loads(path.read_text()) for path in paths]


def assert_close(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for part, values in expected.items():
        assert found[part] == pytest.approx(values, abs=1e-5), part


@every_way
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_learn_as_one(folder, reports, name, way):
    expected, final = alone(name)
    for rank in range(2):
        assert_close(reports[rank][f"{name} {way}"], expected)
        found = load_file(folder / f"{name} {way} {rank}.safetensors")
        assert found.keys() == final.keys()
        for key, tensor in final.items():
            assert torch.allclose(found[key], tensor, atol=1e-4), key


def test_the_scenarios_are_those_that_break(reports):
    """Des experts sans jeton chez un seul rang, et un arrêt anticipé qui arrête."""
    first, second = (torch.tensor(report["moe copies"]["loads"]) for report in reports)
    assert ((first == 0) != (second == 0)).any()
    assert 0 < len(alone("arrêt anticipé")[0]["train"]) < 200


@every_way
def test_one_then_two(reports, way):
    expected = losses(run(make(), RESUMED))
    for report in reports:
        assert_close(report[f"reprise {way}"]["1 vers 2"], expected)


@every_way
def test_two_then_one(folder, reports, way):
    """Ctrl-C chez un seul : tous s’arrêtent au même pas, un seul écrit, et un processus seul reprend."""
    found = [report[f"reprise {way}"] for report in reports]
    assert [report["interrompus"] for report in found] == [True, True]
    assert [report["écritures"] for report in found] == [2, 0]
    path = folder / f"deux {way}"
    assert sorted(p.name for p in path.iterdir()) == ["000003", "000004"]
    history = run(make(seed=5), RESUMED, out=path)
    assert len(history.steps) == RESUMED.steps
    assert_close(losses(history), losses(run(make(), RESUMED)))


@every_way
@pytest.mark.usefixtures("reports")
def test_the_checkpoint_is_that_of_a_process_alone(folder, tmp_path, way):
    run(make(), RESUMED, out=tmp_path)
    ours, alone = checkpoint.load(folder / f"un {way}"), checkpoint.load(tmp_path)
    assert ours.step == alone.step == RESUMED.steps and ours.state["identity"] == alone.state["identity"]
    assert ours.tensors.keys() == alone.tensors.keys()
    for group in ("model", "optimizer"):
        assert ours.tensors[group].keys() == alone.tensors[group].keys()
        for name, tensor in alone.tensors[group].items():
            assert torch.allclose(ours.tensors[group][name], tensor, atol=1e-4), name


@every_way
def test_resumed_with_as_many_processes_is_the_same_bitwise(reports, way):
    found = [report[f"reprise {way}"] for report in reports]
    assert [report["au bit près"] for report in found] == [True, True]
    assert found[0]["hasard"] != found[1]["hasard"]


@pytest.mark.parametrize("cause, messages", [
    ("données", ["ne s’accordent pas"] * 2), ("dossier", ["ne s’accordent pas"] * 2),
    ("nan", ["n’est plus un nombre au pas 1"] * 2), ("disque", ["disque plein", "premier processus a échoué"]),
])
def test_what_goes_wrong_for_one_stops_all(reports, cause, messages):
    for report, message in zip(reports, messages, strict=True):
        assert message in report["refus"][cause] and "\n" not in report["refus"][cause]


def test_gradients_are_summed_whatever_the_bucket(reports):
    expected = [[10, 12, 14], [10, 11, 12, 13], None, None, [[10, 12, 14], [16, 18, 20]]]
    assert all(found == expected for report in reports for found in report["gradients"])


def test_small_exchanges(reports):
    small = [report["petits"] for report in reports]
    assert [one["anywhere"] for one in small] == [[True, False]] * 2
    assert [one["total"] for one in small] == [2.0, 2.0]
    ids = examples(5).ids.tolist()
    assert [one["share"][0] for one in small] == [ids[0::2], [ids[1], ids[3], ids[0]]]
    assert [one["share"][1] for one in small] == [examples(1).ids.tolist()] * 2


def test_alone_nothing_is_exchanged():
    data = examples(3)
    part = distributed.share(data)
    assert all(torch.equal(a, b) for a, b in zip(part, data, strict=True))
    assert distributed.rank() == 0 and distributed.world_size() == 1
    assert distributed.total(1.5) == 1.5 and distributed.anywhere(True) and not distributed.anywhere(False)
    network = make()
    with distributed.sharded(network, enabled=True) as same:
        assert same is network
    states = checkpoint.random_tensors()
    assert distributed.of_rank(distributed.by_rank(states)).keys() == states.keys()


def test_a_rank_that_joins_keeps_its_own_random_state():
    """Repris sur plus de processus, un rang sans état sauvé garde le sien."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    checkpoint.restore_random(distributed.of_rank({"cpu/1": torch.get_rng_state().clone()}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("reports")
def test_an_error_on_one_rank_ends_all(played):
    """Celui qui s’arrête dit pourquoi, celui qui attendait n’ajoute pas de trace, et torchrun rend une erreur."""
    assert played.returncode != 0
    assert "rang 1 : Rien ne va plus." in played.stderr and "gloo" not in played.stderr


def test_control_c_under_torchrun(tmp_path):
    """Tous finissent le même pas, l’écrivent et s’arrêtent."""
    result = torchrun(__file__, "control_c", tmp_path / "deux")
    assert result.returncode != 0 and "SIGINT" in result.stderr
    found = checkpoint.load(tmp_path / "deux")
    assert checkpoint.steps(tmp_path / "deux") == [found.step]
    # Seul, un pas fait quatre passages.
    assert interrupted(tmp_path / "un", ENDLESS, Interrupting(4 * found.step, 0))
    expected = checkpoint.load(tmp_path / "un")
    assert_close(losses(History(**found.state["history"])), losses(History(**expected.state["history"])))


def test_the_command_under_torchrun_is_the_command(tmp_path):
    texts = tmp_path / "textes"
    texts.mkdir()
    for i in range(12):
        line = f"Le {i + 1} du mois, le facteur a porté {i + 3} lettres au village, puis {2 * i} cartes à la mairie. "
        (texts / f"{i}.txt").write_text(line * 12, encoding="utf-8")
    options = ["train", "--data", str(texts), "--vocab-size", "300", "--steps", "4", "--batch-size", "3"]
    assert CliRunner().invoke(app, [*options, "--out", str(tmp_path / "un")]).exit_code == 0
    result = torchrun("-m", "llama", *options, "--out", tmp_path / "deux")
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("un", "deux"))
    assert_close(losses(History(**two)), losses(History(**one)))
    assert sorted(p.name for p in (tmp_path / "un").iterdir()) == sorted(p.name for p in (tmp_path / "deux").iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
