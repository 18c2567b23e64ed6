"""L’historique d’un entraînement : ce que la boucle note, pas à pas. Il se dessine et s’écrit ; il ne calcule rien."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import LlamaError
from .vocabulary import read_json


@dataclass
class History:
    """Ce qui s’est passé, pas à pas ; se dessine (`plot`) et s’écrit (`to_json`).

    Attributes:
        steps: un dictionnaire par pas : step, loss (nats par jeton), lr, grad_norm, tokens (à apprendre), seconds.
        evaluations: un dictionnaire par évaluation : step, val_loss (nats par jeton).
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Les pertes d’entraînement, en nats par jeton."""
        return [record["loss"] for record in self.steps]

    @property
    def tokens_per_second(self) -> float:
        """Débit moyen, en jetons appris par seconde d’entraînement (évaluations non comprises)."""
        return sum(r["tokens"] for r in self.steps) / max(1e-9, sum(r["seconds"] for r in self.steps))

    def to_json(self, path: Path) -> None:
        """Écrit l’historique dans `path`."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def from_json(cls, path: Path) -> History:
        """L’inverse de `to_json`.

        Raises:
            LlamaError: fichier absent ou illisible.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict) or set(content) != {"steps", "evaluations"}:
            raise LlamaError(f"« {path} » n’est pas l’historique d’un entraînement.")
        return cls(**content)

    def plot(self) -> Any:
        """La figure des courbes de perte et du taux d’apprentissage (voir `llama.plots.training_curves`)."""
        from .plots import training_curves

        return training_curves({"entraînement": self})
