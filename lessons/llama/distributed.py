"""Plusieurs processus, un seul modèle : chacun calcule sa part du lot global, ce module additionne les parts.

Sans `torchrun`, tout se lit comme un groupe d’un seul processus. Deux façons de faire : des copies entières du modèle,
dont on additionne les gradients (Li et al. 2020, §3) ; ou un modèle réparti, dont chacun ne garde qu’une tranche des
poids, des gradients et de l’état de l’optimiseur (`sharded` ; Zhao et al. 2023, §3). Ce module ne lance pas les
processus et n’ouvre pas leur groupe : c’est le rôle de torchrun et de `workbench.machine`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import LlamaError
from .data import Examples

BUCKET = 2**20
"""Nombres par message : 4 Mo de float32. Un message par tenseur paierait sa latence des centaines de fois."""


def rank() -> int:
    """Numéro de ce processus, compté de 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Nombre de processus."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(data: Examples) -> Examples:
    """La part de ce processus : les exemples `rang`, `rang + nombre`…, soit `⌈N / nombre⌉` chez chacun.

    Les communications d’un modèle réparti vont par passages : tous doivent en faire autant. Qui a un exemple de moins
    en répète donc un, sans rien à y apprendre (étiquettes -100).
    """
    n, world = len(data.ids), world_size()
    positions = torch.arange(-(-n // world) * world)[rank()::world]
    part = data.select(positions % n)
    part.labels[positions >= n] = -100
    return part


def total(value: float) -> float:
    """La somme des `value` de tous les processus, la même chez tous."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return tensor.item()


def anywhere(condition: bool) -> bool:
    """Vrai partout si c’est vrai quelque part : les processus s’arrêtent ensemble, ou ils s’attendraient sans fin."""
    return total(float(condition)) > 0


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Additionne sur place les gradients de tous les processus, `BUCKET` nombres à la fois.

    Un paramètre sans gradient ici en a peut-être un ailleurs, et y compte pour zéro ; sans gradient nulle part, il
    reste sans, comme dans un processus seul. Les tranches d’un modèle réparti (`sharded`) sont déjà additionnées.
    """
    parameters = [p for p in parameters if p.requires_grad and not _is_sharded(p)]
    if world_size() == 1 or not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=_device())
    dist.all_reduce(present)
    gradients = []
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if count:
            gradients.append(parameter.grad)
    starts = itertools.accumulate((g.numel() for g in gradients), initial=0)
    for _, group in itertools.groupby(zip(starts, gradients, strict=False), lambda pair: pair[0] // BUCKET):
        bucket = [gradient for _, gradient in group]
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def align(model: nn.Module, seed: int) -> None:
    """Donne à tous les poids du rang 0, et à chacun des autres son propre hasard : deux dropouts ne se copient pas."""
    if world_size() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, 0)
    if rank():
        torch.manual_seed(seed * 1_000_003 + rank())


def check_same(what: Any) -> None:
    """Refuse que les processus ne partent pas de la même chose (`what`, que JSON sait dire).

    Raises:
        LlamaError: partout, si l’un diffère.
    """
    digest = zlib.crc32(json.dumps(what, sort_keys=True).encode())
    if anywhere(total(digest) != world_size() * digest):
        raise LlamaError(
            "Les processus ne s’accordent pas : lancez-les avec les mêmes données et les mêmes réglages, "
            "et un dossier de points de reprise que tous voient."
        )


def on_first(action: Callable[[], Any]) -> None:
    """Le rang 0 agit, les autres l’attendent ; s’il échoue, tous échouent.

    Raises:
        LlamaError: l’action a échoué.
    """
    failure = None
    if rank() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    if anywhere(failure is not None):
        raise failure or LlamaError("Le premier processus a échoué : son message dit pourquoi.")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Un processus qui s’arrête coupe la parole aux autres : leur erreur ne dit que cela.

    Raises:
        LlamaError: un autre processus s’est arrêté.
    """
    try:
        yield
    except RuntimeError as error:
        if "by peer" not in str(error):  # gloo : « Connection closed by peer », ou « reset »
            raise
        raise LlamaError("Un autre processus s’est arrêté : son message dit pourquoi.") from error


@contextlib.contextmanager
def interruption(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Retient Ctrl-C jusqu’à la fin du pas, pour écrire un point de reprise cohérent ; le second coupe net.

    Rend la question à poser après chaque pas, par tous : l’un de nous a-t-il été interrompu ?
    """
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if not enabled:
        yield lambda: False
    elif threading.current_thread() is not threading.main_thread():
        yield lambda: anywhere(False)
    else:
        previous = signal.signal(signal.SIGINT, handler)
        try:
            yield lambda: anywhere(bool(received))
        finally:
            signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def sharded(model: nn.Module, enabled: bool) -> Iterator[nn.Module]:
    """Répartit `model` entre les processus (FSDP2), puis le rassemble.

    Chaque processus garde une tranche de chaque tenseur. Au moment de calculer une couche, il reçoit les tranches des
    autres, et les oublie ensuite ; au retour, la somme des gradients se fait tranche par tranche.

        poids d’une couche    ─ all-gather ──────→ couche entière ─ calcul ─→ oubliée
        gradient de la couche ─ reduce-scatter ──→ tranche de la somme ─→ AdamW sur la tranche

    Args:
        model: vidé de ses poids tant que dure le contexte ; à la fin, il a chez tous les poids entraînés. Une
            erreur le laisse vide.
        enabled: sans cela, ou pour un processus seul, rend `model` lui-même.

    Yields:
        Le modèle à entraîner, qui a les mêmes noms de paramètres.
    """
    if not enabled or world_size() == 1:
        yield model
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    parameters = dict(model.named_parameters())
    twin = copy.deepcopy(model, {id(p): p for p in parameters.values()})  # d’autres modules, les mêmes paramètres
    mesh = init_device_mesh(_device().type, (world_size(),))
    for part in (*getattr(twin, "layers", ()), twin):
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # la somme, et non la moyenne : la perte est déjà divisée
        part.set_gradient_divide_factor(1.0)
    if hasattr(twin, "hidden_states"):
        register_fsdp_forward_method(twin, "hidden_states")
    for parameter in parameters.values():
        parameter.data = parameter.data.new_empty(0)
    yield twin
    for name, parameter in twin.named_parameters():
        parameters[name].data = whole(parameter.detach())


def reshard(model: nn.Module) -> None:
    """Après un passage sans gradient, rend ses tranches à un modèle réparti : la racine attendait le retour."""
    if hasattr(model, "reshard"):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Le tenseur entier, chez tous, s’il est réparti ; sinon lui-même."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Les tenseurs entiers, chez le rang 0 ; rien chez les autres, qui n’écrivent pas."""
    everywhere = ((name, whole(tensor).cpu()) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in everywhere if rank() == 0}


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, entier, sur le périphérique de `like` ; si `like` est réparti, la tranche qui lui correspond."""
    tensor = tensor.to(like.device)
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def by_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Un exemplaire par processus, de mêmes formes : `cpu` → `cpu/0`, `cpu/1`…"""
    every = {}
    for name, tensor in tensors.items():
        parts = [tensor]
        if world_size() > 1:
            parts = [torch.empty_like(tensor, device=_device()) for _ in range(world_size())]
            dist.all_gather(parts, tensor.to(_device()))
        every |= {f"{name}/{i}": part.cpu() for i, part in enumerate(parts)}
    return every


def of_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """L’inverse de `by_rank`, pour ce processus ; vide s’il n’était pas du nombre."""
    return {name.split("/")[0]: tensor for name, tensor in tensors.items() if name.endswith(f"/{rank()}")}


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # un DTensor, sans importer son module quand il n’y en a pas


def _device() -> torch.device:
    nccl = dist.is_initialized() and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
