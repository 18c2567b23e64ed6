"""`llama fetch` : le catalogue, le cache, et ce que la commande refuse."""

import json

import pytest
from test_console import assert_french
from typer.testing import CliRunner

from llama import cli, sources


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), prog_name="llama")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def fetched(monkeypatch):
    """Remplace `sources.fetch` ; rend les appels reçus."""
    calls = []

    def fetch(name, **options):
        folder = sources.folder_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        calls.append((name, options))
        return folder

    monkeypatch.setattr(sources, "fetch", fetch)
    return calls


def test_list(cache, fetched):
    (cache / "sources/smollm2-0.1.2").mkdir(parents=True)
    result = run("fetch", "--list")
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert result.exit_code == 0 and set(lines) == {"nom", *sources.CATALOGUE} and not fetched
    assert " oui " in lines["smollm2"] and " non " in lines["minilm"] and "92,9\u00a0Mo" in lines["smollm2"]


def test_list_as_json(fetched):
    rows = json.loads(run("fetch", "--list", "--json").stdout)
    assert [row["name"] for row in rows] == list(sources.CATALOGUE)
    assert rows[0]["sha256"] == sources.CATALOGUE["contributions"].sha256 and rows[0]["cached"] is False


def test_fetch_several(fetched):
    result = run("fetch", "smollm2", "minilm", "--verify", "--force")
    assert result.exit_code == 0 and len(result.output.splitlines()) == 2
    assert fetched == [(name, {"verify": True, "force": True}) for name in ("smollm2", "minilm")]


def test_fetch_as_json(fetched):
    (row,) = json.loads(run("fetch", "smollm2", "--json").stdout)
    assert row["name"] == "smollm2" and row["cached"] is True and row["seconds"] >= 0
    assert row["folder"] == str(sources.folder_of("smollm2"))


def test_unknown_name_stops_before_any_download(fetched):
    result = run("fetch", "smollm2", "inconnue")
    assert result.exit_code == 2 and not fetched and result.stderr.count("\n") == 1
    assert "« inconnue »".replace(" ", "\u00a0") in result.stderr and "fiches-travail" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("fetch",), "Quelle source"),
        (("fetsh",), "commande inconnue\u00a0: 'fetsh'. Vouliez-vous dire 'fetch'"),
        (("fetch", "--forcer"), "option inconnue\u00a0: --forcer (options proches\u00a0: --force)"),
        (("--bidon",), "option inconnue\u00a0: --bidon"),
        (("fetch", "--list=3"), "l’option '--list' ne prend pas de valeur"),
    ],
)
def test_usage_errors_are_one_french_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert_french(result.stderr)
