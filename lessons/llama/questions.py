"""Les questions d’un affinage et leurs réponses : celles à apprendre, celles mises de côté pour évaluer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import LlamaError
from .data import leaks, split
from .readers import Pair, Reading, read_pairs, table_pairs

if TYPE_CHECKING:
    import pandas as pd

MAX_HELD_OUT = 100
"""Questions mises de côté, au plus : évaluer doit rester court."""


class QuestionSet:
    """Des paires (question, réponse), chargées en une fois ou plusieurs.

    Args:
        val_fraction: part des questions mises de côté, `MAX_HELD_OUT` au plus.
        seed: graine de cette mise de côté.

    Attributes:
        pairs: les paires chargées.
        frozen: une fois vrai, ce qui est mis de côté le reste, et ce qu’on charge s’apprend entier.
    """

    def __init__(self, val_fraction: float = 0.1, seed: int = 0) -> None:
        self.val_fraction, self.seed, self.frozen = val_fraction, seed, False
        self.pairs: list[Pair] = []
        self._held_out: list[Pair] = []

    def load_data(
        self, data: Sequence[dict[str, Any]], input_key: str | None = None, output_key: str | None = None
    ) -> None:
        """Charge des questions et leurs réponses, en plus de celles déjà chargées.

        Args:
            data: des dictionnaires.
            input_key: clé des questions.
            output_key: clé des réponses ; sans ces deux noms, des clés usuelles (`readers.PAIR_KEYS`).

        Raises:
            LlamaError: ce n’est pas une liste de dictionnaires, clé absente, aucune paire.
        """
        import pandas as pd

        if not isinstance(data, (list, tuple)) or not data or not all(isinstance(row, dict) for row in data):
            raise LlamaError('load_data demande une liste de dictionnaires, [{"question": …, "answer": …}, …].')
        self.load_data_from_dataframe(pd.DataFrame(list(data), dtype=object), input_key, output_key)

    def load_data_from_dataframe(
        self, table: pd.DataFrame, input_key: str | None = None, output_key: str | None = None
    ) -> None:
        """Comme `load_data`, d’un tableau de pandas."""
        rows = table.set_axis(range(1, len(table) + 1)).rename_axis("élément")
        self._add(table_pairs(rows, "données", input_key, output_key), "données")

    def load_data_from_jsonlines(
        self, path: str | Path, input_key: str | None = None, output_key: str | None = None
    ) -> None:
        """Comme `load_data`, d’un fichier JSONL, JSON ou CSV."""
        self._add(read_pairs(path, input_key, output_key), path)

    load_data_from_csv = load_data_from_jsonlines

    def _add(self, reading: Reading, name: str | Path) -> None:
        for line in reading.report:
            print(f"« {name} », {line}.", file=sys.stderr)
        self.add_pairs(reading.pairs)

    def add_pairs(self, pairs: Sequence[Pair]) -> None:
        """Charge des paires (question, réponse) ; celles qui le sont déjà sont ignorées."""
        self.pairs = list(dict.fromkeys([*self.pairs, *pairs]))
        if not self.frozen:
            self._held_out = []

    def parts(self) -> tuple[list[Pair], list[Pair]]:
        """Les questions à apprendre, et celles mises de côté ; les premières sans ce qui ressemble aux secondes.

        Raises:
            LlamaError: moins de deux questions chargées.
        """
        if len(self.pairs) < 2:
            raise LlamaError(
                f"Il faut au moins deux questions, dont une pour évaluer ({len(self.pairs)} chargée) : donnez-en par "
                "load_data ou load_data_from_jsonlines."
            )
        if not self._held_out:
            fraction = min(self.val_fraction, MAX_HELD_OUT / len(self.pairs))
            self._held_out = split(self.pairs, fraction, self.seed)[1]
        held_out = set(self._held_out)
        training = [pair for pair in self.pairs if pair not in held_out]
        leaked = {i for i, _, _ in leaks(*(["\n".join(pair) for pair in part] for part in (training, self._held_out)))}
        return [pair for i, pair in enumerate(training) if i not in leaked], self._held_out
