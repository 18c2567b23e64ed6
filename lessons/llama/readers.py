"""Lire les textes et les questions d’un utilisateur : CSV, JSON, JSONL, TXT, et la ligne de chaque défaut.

Un fichier illisible ou mal formé est une `LlamaError` ; une ligne qui se lit mais ne vaut rien (réponse vide,
question déjà vue) est laissée de côté et nommée dans le compte rendu. Ce module ne télécharge rien et ne
découpe rien.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from .config import LlamaError, system_cause

Pair = tuple[str, str]

PAIR_KEYS = (
    ("question", "answer"), ("question", "réponse"), ("question", "reponse"), ("instruction", "output"),
    ("prompt", "completion"), ("prompt", "response"), ("input", "output"),
)
"""Les noms de colonnes reconnus quand on n’en donne pas ; avec « instruction », une colonne « input » s’y
ajoute."""
TEXT_KEYS = ("text", "texte", "content", "contenu")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")


class Reading(NamedTuple):
    """Les paires (question, réponse) lues, et le compte rendu : `ligne 17 : réponse vide`."""

    pairs: list[Pair]
    report: list[str]


def read_table(path: str | Path, encoding: str = "utf-8") -> pd.DataFrame:
    """Lit un CSV (séparé par « , », « ; » ou tabulation), un JSON (liste d’objets) ou un JSONL.

    Returns:
        Un tableau dont l’index dit d’où vient chaque ligne : son numéro dans le fichier (`ligne`), ou dans la
        liste d’un JSON (`élément`), comptés de 1.

    Raises:
        LlamaError: fichier absent, vide, mal encodé, mal formé (le message donne la ligne).
    """
    path = Path(path)
    text = _read(path, encoding)
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise LlamaError(f"« {path} » n’est pas un tableau : donnez un fichier {', '.join(readers)}.")
    try:
        numbered = list(readers[path.suffix.lower()](text))
    except LlamaError as error:
        raise LlamaError(f"« {path} », {error}.") from None
    if not numbered:
        raise LlamaError(f"« {path} » ne contient aucune donnée : ajoutez-y des lignes.")
    name = "élément" if path.suffix.lower() == ".json" else "ligne"
    index = pd.Index([number for number, _ in numbered], name=name)
    return pd.DataFrame([row for _, row in numbered], index=index, dtype=object)


def read_pairs(
    path: str | Path, input_key: str | None = None, output_key: str | None = None, *, encoding: str = "utf-8"
) -> Reading:
    """Lit des questions et leurs réponses.

    Args:
        path: fichier CSV, JSON ou JSONL.
        input_key: colonne des questions.
        output_key: colonne des réponses ; sans ces deux noms, les premiers de `PAIR_KEYS` que le fichier a.
        encoding: encodage du fichier.

    Raises:
        LlamaError: voir `read_table` ; colonne absente (le message dit celles du fichier) ; aucune paire.
    """
    return table_pairs(read_table(path, encoding), path, input_key, output_key)


def table_pairs(
    table: pd.DataFrame, name: str | Path, input_key: str | None = None, output_key: str | None = None
) -> Reading:
    """Les questions et réponses d’un tableau de `read_table`, que `name` désigne ; voir `read_pairs`."""
    if input_key is None and output_key is None:
        input_key, output_key = _known_keys(table, name)
    if input_key is None or output_key is None:
        raise LlamaError(f"Donnez input_key et output_key ; colonnes de « {name} » : {_columns(table)}.")
    for key in (input_key, output_key):
        if key not in table.columns:
            raise LlamaError(f"« {name} » n’a pas de colonne « {key} » ; ses colonnes : {_columns(table)}.")
    pairs: list[Pair] = []
    report: list[str] = []
    seen: dict[Pair, int] = {}
    context = "input" if input_key == "instruction" and "input" in table.columns else None
    for number, row in zip(table.index, table.to_dict("records"), strict=True):
        question, answer = row[input_key], row[output_key]
        fault = _fault("question", question) or _fault("réponse", answer)
        if not fault:
            extra = row[context] if context and isinstance(row[context], str) else ""
            pair = "\n\n".join(part.strip() for part in (question, extra) if part.strip()), answer.strip()
            if pair in seen:
                fault = f"déjà vue {table.index.name} {seen[pair]}"
            else:
                seen[pair] = number
                pairs.append(pair)
        if fault:
            report.append(f"{table.index.name} {number} : {fault}")
    if not pairs:
        raise LlamaError(f"« {name} » n’a aucune question avec sa réponse ({report[0]}) : corrigez-le.")
    return Reading(pairs, report)


def read_texts(path: str | Path, *, encoding: str = "utf-8") -> list[str]:
    """Lit des documents : un fichier TXT (un document), un tableau (une colonne de `TEXT_KEYS`), un dossier.

    Raises:
        LlamaError: voir `read_table` ; dossier sans texte, colonne de texte absente, aucun texte.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise LlamaError(f"« {path} » ne contient aucun fichier {', '.join(SUFFIXES)}.")
        return [text for file in files for text in read_texts(file, encoding=encoding)]
    if path.suffix.lower() == ".txt":
        texts = [_read(path, encoding)]
    else:
        table = read_table(path, encoding)
        key = next((key for key in TEXT_KEYS if key in table.columns), None)
        if key is None:
            raise LlamaError(
                f"« {path} » n’a pas de colonne de texte ({', '.join(TEXT_KEYS)}) ; ses colonnes : "
                f"{_columns(table)}."
            )
        texts = [text for text in table[key] if not _fault("texte", text)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise LlamaError(f"« {path} » ne contient aucun texte : ajoutez-en.")
    return texts


def has_pairs(path: str | Path, encoding: str = "utf-8") -> bool:
    """Ce fichier est-il un tableau dont des colonnes de `PAIR_KEYS` font des questions et des réponses ?"""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".txt":
        return False
    columns = set(read_table(path, encoding).columns)
    return any({question, answer} <= columns for question, answer in PAIR_KEYS)


def _read(path: Path, encoding: str) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LlamaError(f"« {path} » introuvable : vérifiez le chemin.") from None
    except IsADirectoryError:
        raise LlamaError(f"« {path} » est un dossier : donnez le chemin d’un fichier.") from None
    except OSError as error:
        raise LlamaError(f"« {path} » est illisible ({system_cause(error)}) : vérifiez ses droits.") from None
    try:
        text = data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise LlamaError(f"Encodage « {encoding} » inconnu : essayez utf-8, cp1252 ou utf-16.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise LlamaError(
            f"« {path} » n’est pas en {encoding} (ligne {line}), mais sans doute en {guess} : "
            f"enregistrez-le en UTF-8, ou donnez encoding={guess!r}."
        ) from None
    if "\0" in text:
        raise LlamaError(f"« {path} » contient des octets nuls : ce n’est pas un fichier texte.")
    if not text.strip():
        raise LlamaError(f"« {path} » est vide : donnez un fichier qui contient du texte.")
    return text


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    header_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            number, line = line, reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if not header:
                header = [field.strip() for field in fields]
                if len(set(header)) != len(header):
                    raise LlamaError(f"ligne {number} : deux colonnes ont le même nom")
                continue
            if len(fields) != len(header):
                raise LlamaError(
                    f"ligne {number} : {len(header)} champs attendus, {len(fields)} trouvés ; mettez entre "
                    f"guillemets droits un texte qui contient {delimiter!r}"
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        cause = "n’est pas refermé" if "end of data" in str(error) else "dans un texte n’est pas doublé"
        raise LlamaError(f"ligne {line} : un guillemet droit {cause}") from None


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError : syntaxe, ou un nombre démesuré
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        raise LlamaError(f"ligne {line} : JSON mal formé à la colonne {column}") from None
    if not isinstance(rows, list):
        raise LlamaError("ligne 1 : une liste d’objets est attendue, [{…}, {…}]")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise LlamaError(f"élément {number} : un objet {{…}} est attendu")
        yield number, row


def _jsonl_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = getattr(error, "colno", 1)
            raise LlamaError(f"ligne {number} : JSON mal formé à la colonne {column}") from None
        if not isinstance(row, dict):
            raise LlamaError(f"ligne {number} : un objet {{…}} est attendu")
        yield number, row


def _fault(name: str, value: Any) -> str:
    """Ce qui empêche de se servir d’un champ, ou rien."""
    if value is None or isinstance(value, float) and value != value:
        return f"{name} absente" if name != "texte" else "texte absent"
    if not isinstance(value, str):
        return f"{name} n’est pas un texte ({value!r})"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{name} avec une moitié de paire UTF-16, qui n’est pas un caractère"
    return "" if value.strip() else f"{name} vide"


def _known_keys(table: pd.DataFrame, name: str | Path) -> Pair:
    for keys in PAIR_KEYS:
        if set(keys) <= set(table.columns):
            return keys
    raise LlamaError(
        f"« {name} » : dites quelles colonnes sont les questions et les réponses (input_key, output_key) ; "
        f"ses colonnes : {_columns(table)}."
    )


def _columns(table: pd.DataFrame) -> str:
    return ", ".join(f"« {column} »" for column in table.columns)
