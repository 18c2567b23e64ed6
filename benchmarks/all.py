"""Toutes les mesures, chacune dans son processus : un tableau, et un JSON si l’on donne `--json FICHIER`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import table, write_json

COMMANDS = ("training_moe", "training_dense", "decoding", "merging", "lora", "tokenizer")


def main(argv: list[str] | None = None) -> int:
    """Lance les commandes ; rend le nombre de celles qui ont échoué."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=COMMANDS, metavar="MESURE", help=", ".join(COMMANDS))
    parser.add_argument("--json", type=Path, metavar="FICHIER", help="écrire aussi les résultats, en JSON")
    arguments = parser.parse_args(argv)
    reports, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            result = Path(folder, f"{name}.json")
            command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", str(result)]
            if subprocess.run(command).returncode:
                failed += 1
            else:
                reports.append({"name": name} | json.loads(result.read_text(encoding="utf-8")))
    print("\n\nRécapitulation", table(reports), sep="\n")
    if arguments.json:
        write_json(arguments.json, reports)
    return failed


if __name__ == "__main__":
    sys.exit(main())
