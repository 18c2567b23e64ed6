"""Du nom d’un corpus à ses textes ou à ses questions : fichier, dossier, source ou jeu de données du Hub.

Ce que ces fichiers contiennent est l’affaire de `readers`, ce que contiennent les sources celle de `sheets`.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd

from . import holdout, sources
from .config import LlamaError
from .readers import Pair, Reading, has_pairs, read_pairs, read_texts, table_pairs
from .sheets import Question

ALPACA = "AIffl/Alpaca_french_mixtral"
"""48 400 instructions en français, aux colonnes instruction, input et output (Apache-2.0)."""
COURSE = "cours"
"""Tout ce que les modèles du cours apprennent, sans les fiches ni les questions réservées (`holdout`)."""


def corpus(
    name: str, input_key: str | None = None, output_key: str | None = None, questions: bool = False
) -> list[str] | list[Pair]:
    """Les textes, ou les paires (question, réponse), d’un corpus.

    Les lignes inutilisables sont nommées sur la sortie d’erreur. Sans accès à `ALPACA`, les questions de
    droit du travail le remplacent : celles du ministère si elles s’obtiennent, sinon celles de l’atelier.

    Args:
        name: un fichier ou un dossier ; un nom de `sources` ; un jeu de données du Hub.
        input_key: colonne des questions ; `output_key`, des réponses ; sinon les noms usuels.
        questions: d’un nom de `sources`, prendre les questions plutôt que les textes.

    Raises:
        LlamaError: corpus introuvable, illisible ou vide.
    """
    path = Path(name)
    if path.exists():
        if not (input_key or output_key or has_pairs(path)):
            return read_texts(path)
        return _reported(name, read_pairs(path, input_key, output_key))
    if name == COURSE:
        if questions:
            return _pairs(holdout.questions()[0])
        return [holdout.text_of(document) for document in holdout.partition().train]
    if name == "atelier" or name in sources.CATALOGUE:
        if questions:
            return _question_pairs(name)
        return [holdout.text_of(document) for document in sources.documents(name)]
    if path.suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise LlamaError(
            f"« {name} » introuvable : ce n’est ni un fichier, ni une source (cours, atelier, "
            f"{', '.join(sources.CATALOGUE)}), ni un jeu de données du Hub (auteur/nom)."
        )
    try:
        table = _hub_table(name)
    except Exception as error:  # réseau, droits, nom : trois bibliothèques ont chacune leurs erreurs
        cause = f"« {name} » est hors d’atteinte sur le Hub ({type(error).__name__})"
        if name != ALPACA:
            raise LlamaError(f"{cause} : vérifiez le nom et le réseau, ou donnez un fichier.") from None
        return _labour_law_pairs(cause)
    return _reported(name, table_pairs(table, name, input_key, output_key))


def _hub_table(name: str) -> pd.DataFrame:
    import datasets
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:  # sans réseau, datasets insisterait une demi-minute
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except urllib.error.HTTPError:
            pass  # le Hub répond, fût-ce pour refuser cette adresse
    table = datasets.load_dataset(name, split="train").to_pandas()
    return table.set_index(pd.RangeIndex(1, len(table) + 1, name="ligne"))


def _labour_law_pairs(cause: str) -> list[Pair]:
    names = ("contributions", "fiches-travail")
    try:
        pairs = [pair for name in names for pair in _question_pairs(name)]
    except LlamaError:
        names = ("atelier",)
        pairs = _question_pairs(*names)
    print(f"{cause} : {len(pairs)} questions le remplacent (sources : {', '.join(names)}).", file=sys.stderr)
    return pairs


def _question_pairs(name: str) -> list[Pair]:
    return _pairs(sources.questions(name))


def _pairs(rows: list[Question]) -> list[Pair]:
    return [(row["question"], row["réponse"]) for row in rows]


def _reported(name: str, reading: Reading) -> list[Pair]:
    for line in reading.report:
        print(f"« {name} », {line}.", file=sys.stderr)
    return reading.pairs
