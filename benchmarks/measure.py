"""Ce que les mesures partagent : faire courir deux programmes l’un après l’autre, comparer, et dire la limite.

Chaque concurrent vit dans son propre processus, qui attend son tour : A B A B… Les aléas de la machine touchent ainsi
les deux, et chacun garde ses réglages et sa mémoire. Un rapport vaut plus de 1 quand `llama` fait mieux ; on donne la
médiane des rapports de chaque tour, et leur étendue.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # le profileur annonce sinon chaque départ ; à dire avant torch

import torch  # noqa: E402

Setup = Callable[[], Callable[[], Any]]
"""Prépare un concurrent, et rend ce qu’il faut chronométrer."""
Run = Callable[[], tuple[float, float]]
"""Fait un tour : ses secondes, et la mémoire résidente la plus grande du processus."""


@dataclass
class Measure:
    """Une comparaison.

    Args:
        name: ce qui est mesuré.
        unit: l’unité des valeurs.
        ours: les nôtres, une par tour.
        peer: celles du concurrent, dans le même ordre.
        target: le rapport à atteindre, ou None.
        limit: ce que la machine permettrait, dans la même unité, ou None.
        smaller_is_better: l’unité est-elle un coût (secondes, octets) ?
    """

    name: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float]
    target: float | None = None
    limit: float | None = None
    smaller_is_better: bool = False

    @property
    def ratios(self) -> list[float]:
        """Un par tour, plus grand que 1 quand `llama` fait mieux."""
        pairs = zip(self.ours, self.peer, strict=True)
        return sorted(peer / own if self.smaller_is_better else own / peer for own, peer in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Prêt pour JSON."""
        ratio = statistics.median(self.ratios)
        own, peer = statistics.median(self.ours), statistics.median(self.peer)
        share = None if self.limit is None else self.limit / own if self.smaller_is_better else own / self.limit
        return {
            "name": self.name, "unit": self.unit, "ours": own, "peer": peer, "ratio": ratio,
            "ratios": self.ratios, "target": self.target, "limit": self.limit, "share_of_limit": share,
            "reached": None if self.target is None else ratio >= self.target,
        }


@dataclass
class Report:
    """Ce qu’une commande a mesuré, et les lignes qui l’expliquent."""

    title: str
    measures: list[Measure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Prêt pour JSON ; ni nom de machine, ni chemin."""
        return {
            "title": self.title, "machine": machine(), "measures": [m.to_dict() for m in self.measures],
            "notes": self.notes,
        }


def main(measure: Callable[[], Report]) -> None:
    """La ligne de commande d’une mesure : `[--json FICHIER]`."""
    parser = argparse.ArgumentParser(description=sys.modules[measure.__module__].__doc__)
    parser.add_argument("--json", type=Path, metavar="FICHIER", help="écrire aussi les résultats, en JSON")
    target = parser.parse_args().json
    report = measure().to_dict()
    print(table([report]))
    if target:
        write_json(target, report)


def write_json(path: Path, content: Any) -> None:
    """Écrit `content`, en créant le dossier s’il manque."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Le tableau des rapports ; chaque mesure sur une ligne, puis les notes."""
    heads = ["mesure", "llama", "pair", "rapport", "étendue", "visé", "limite"]
    lines = []
    for report in reports:
        rows = [heads, *(_row(measure) for measure in report["measures"])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        lines += ["", report["title"]]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  " + "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
        lines += [f"  {note}" for note in report["notes"]]
    return "\n".join(lines)


def _row(measure: Mapping[str, Any]) -> list[str]:
    number, ratios = french, measure["ratios"]
    target, share = measure["target"], measure["share_of_limit"]
    reached = "" if target is None else " ✓" if measure["reached"] else " ✗"
    return [
        f"{measure['name']} ({measure['unit']})", number(measure["ours"]), number(measure["peer"]),
        f"× {number(measure['ratio'])}{reached}", f"{number(ratios[0])} à {number(ratios[-1])}",
        "" if target is None else f"× {number(target)}",
        "" if share is None else f"{100 * share:.0f} % de {number(measure['limit'])}",
    ]


def french(value: float) -> str:
    """Trois chiffres significatifs, à la française : 1234.5 → « 1 230 », 0.0123 → « 0,0123 »."""
    rounded = float(f"{value:.3g}")
    text = f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"
    return text.replace(",", "\N{NARROW NO-BREAK SPACE}").replace(".", ",")


def machine() -> dict[str, Any]:
    """Ce qu’il faut savoir de la machine pour lire les nombres ; ni son nom, ni un chemin."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": platform.system(), "processor": processor, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "memory_gib": round(memory, 1), "python": platform.python_version(),
        "torch": torch.__version__,
    }


def race(
    contenders: Mapping[str, Setup], repeats: int = 5, *, processes: bool = True
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Fait courir les concurrents tour à tour ; le premier tour, d’échauffement, n’est pas compté.

    Args:
        contenders: nom → préparation, que `pickle` sait transmettre.
        repeats: tours comptés.
        processes: un processus par concurrent ; sinon, tous dans celui-ci (les essais).

    Returns:
        Les secondes de chaque tour, et la plus grande mémoire résidente de chacun, en octets.
    """
    with _runners(contenders, processes) as runners:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        peaks = dict.fromkeys(contenders, 0.0)
        for turn in range(repeats + 1):
            for name, run in runners.items():
                seconds, peaks[name] = run()
                if turn:
                    times[name].append(seconds)
    return times, peaks


@contextmanager
def _runners(contenders: Mapping[str, Setup], processes: bool) -> Iterator[dict[str, Run]]:
    if not processes:
        ready = {name: setup() for name, setup in contenders.items()}
        yield {name: (lambda run=run: _timed(run)) for name, run in ready.items()}
        return
    context = multiprocessing.get_context("spawn")
    pipes, children = {}, []
    for name, setup in contenders.items():
        pipes[name], end = context.Pipe()
        children.append(context.Process(target=_serve, args=(end, setup), daemon=True))
        children[-1].start()
        end.close()
        pipes[name].recv()  # prêt : les préparations ne se gênent pas

    def ask(pipe: Any) -> tuple[float, float]:
        pipe.send(True)
        return pipe.recv()

    try:
        yield {name: (lambda pipe=pipe: ask(pipe)) for name, pipe in pipes.items()}
    finally:
        for pipe in pipes.values():
            pipe.close()
        for child in children:
            child.join(10)


def _serve(pipe: Any, setup: Setup) -> None:
    run = setup()
    pipe.send(True)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(_timed(run))


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, peak_memory()


def peak_memory() -> float:
    """La plus grande mémoire résidente de ce processus, en octets."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def bandwidth(gigabytes: float = 0.5) -> float:
    """La vitesse de lecture de la mémoire, en octets par seconde : la somme d’un grand tenseur."""
    numbers = torch.ones(int(gigabytes * 2**30 / 4))
    return numbers.nbytes / min(_timed(numbers.sum)[0] for _ in range(5))


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Opérations par seconde du produit de deux grandes matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(_timed(lambda: a @ b)[0] for _ in range(5))


@dataclass
class Profile:
    """Où passe le temps d’un calcul.

    Attributes:
        flops: opérations de ses produits de matrices.
        share: part du temps que ces produits prennent.
        rate: opérations par seconde qu’ils atteignent.
    """

    flops: float
    share: float
    rate: float

    def note(self, peak: float) -> str:
        """La phrase qui l’explique, au regard du sommet mesuré `peak`."""
        return (
            f"Profil : {100 * self.share:.0f} % du temps dans les produits de matrices, à {french(self.rate / 1e9)} "
            f"GFLOP/s ; sommet mesuré : {french(peak / 1e9)}."
        )


def profile(run: Callable[[], Any]) -> Profile:
    """Le profil de `run`, par `torch.profiler`, après un passage d’échauffement."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profiler:
        run()
    events = profiler.key_averages()
    products = [e for e in events if e.key in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")]
    seconds = sum(e.self_cpu_time_total for e in products) / 1e6
    total = sum(e.self_cpu_time_total for e in events) / 1e6
    flops = sum(e.flops for e in products)
    return Profile(flops, seconds / total, flops / seconds)
