"""Les figures du cours : un seul style, des couleurs sûres pour les daltoniens, une carte claire dans les deux thèmes.

Chaque fonction rend une `Figure` de matplotlib et n’affiche rien : c’est `llama.lesson.figure` qui l’affiche,
l’enregistre et lui donne son texte de remplacement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

if TYPE_CHECKING:
    from llama.history import History

# Palette d’Okabe et Ito (2008), les teintes sombres d’abord ; le jaune, illisible sur fond clair, est écarté.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#00805e", "#aa4499", "#b87700", "#3a8fc4"
INK, MUTED, GRID, PAPER = "#1f2733", "#5b6472", "#e3e6ea", "#fdfdfb"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
LINESTYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))  # la couleur n’est jamais seule à distinguer
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"

STYLE: dict[str, Any] = {
    "figure.figsize": (7.5, 4.2),
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.titlepad": 10,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINESTYLES),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "image.cmap": SEQUENTIAL,
}


class FrenchFormatter(ScalarFormatter):
    """Graduations à la française : virgule décimale, espace fine entre les milliers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        text = super().__call__(x, pos)
        whole, comma, decimals = text.replace(".", ",").partition(",")
        if len(whole) > 3 and whole.lstrip("−-").isdigit():
            whole = f"{int(whole.replace('−', '-')):,}".replace(",", "\u202f").replace("-", "−")
        return whole + comma + decimals


def style() -> None:
    """Donne à toutes les figures le style du cours ; `llama.lesson.setup` l’appelle."""
    matplotlib.rcParams.update(STYLE)


def subplots(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, Any]:
    """Comme `matplotlib.pyplot.subplots`, dans le style du cours et avec des graduations à la française.

    Args:
        rows: lignes de repères.
        columns: colonnes de repères.
        size: largeur et hauteur en pouces ; par défaut 7,5 × 4,2.
        **options: transmises à `matplotlib.pyplot.subplots`.

    Returns:
        La figure, et le repère (ou le tableau de repères s’il y en a plusieurs).
    """
    style()
    fig, axes = plt.subplots(rows, columns, figsize=size, **options)
    for axis in np.ravel(axes):
        axis.xaxis.set_major_formatter(FrenchFormatter(useOffset=False))
        axis.yaxis.set_major_formatter(FrenchFormatter(useOffset=False))
    return fig, axes


def training_curves(runs: dict[str, History]) -> Figure:
    """Pertes d’entraînement (traits) et d’évaluation (points) contre les jetons lus, une couleur par exécution.

    Args:
        runs: nom → historique, tel que le rend `llama.training.train`.
    """
    fig, axis = subplots()
    for (name, history), color in zip(runs.items(), COLORS, strict=False):
        tokens = np.cumsum([record["tokens"] for record in history.steps])
        axis.plot(tokens, history.losses, color=color, linestyle="-", linewidth=1.2, alpha=0.6, label=name)
        seen = [tokens[record["step"] - 1] for record in history.evaluations]
        losses = [record["val_loss"] for record in history.evaluations]
        label = "évaluation" if len(runs) == 1 else f"{name}, évaluation"
        axis.plot(seen, losses, "o--", color=color if len(runs) > 1 else VERMILION, label=label)
    axis.legend()
    axis.set(xlabel="jetons lus", ylabel="perte (nats par jeton)", title="La perte descend, vite puis lentement")
    return fig
