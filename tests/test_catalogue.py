"""`llama fetch` : le catalogue, le cache, et ce que la commande refuse."""

import hashlib
import json

import pytest
from merge_models import snapshot
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


# Ce qu’elle refuse


FOLDER = "sources/smollm2-0.1.2"


def nothing(cache):
    pass


def manifest(**changes):
    """Un cache de SmolLM2 d’un fichier, dont le manifeste dit ce qu’il faut, à `changes` près."""
    def prepare(cache):
        (cache / FOLDER).mkdir(parents=True)
        file = cache / FOLDER / "m.gguf"
        file.write_bytes(b"GGUF")
        entry = [4, file.stat().st_mtime_ns, hashlib.sha256(b"GGUF").hexdigest()]
        content = {"archive": sources.CATALOGUE["smollm2"].sha256, "files": {"m.gguf": entry}} | changes
        (cache / FOLDER / "manifest.json").write_text(json.dumps(content))

    return prepare


def file(name, content):
    def prepare(cache):
        manifest()(cache)
        (cache / name).write_text(content)

    return prepare


def without(name):
    def prepare(cache):
        manifest()(cache)
        (cache / FOLDER / name).unlink()

    return prepare


BAD = [
    (("fetch",), nothing, "Quelle source"),
    (("fetsh",), nothing, "commande inconnue : 'fetsh'. Vouliez-vous dire 'fetch'"),
    (("fetch", "--forcer"), nothing, "option inconnue : --forcer (options proches : --force)"),
    (("--bidon",), nothing, "option inconnue : --bidon"),
    (("fetch", "--list=3"), nothing, "l’option '--list' ne prend pas de valeur"),
    (("fetch", "inconnue"), nothing, "Source inconnue : « inconnue ». Le catalogue a contributions, fiches-travail"),
    (("fetch", "smollm2", "../smollm2"), nothing, "Source inconnue : « ../smollm2 »"),
    (("fetch", "smollm2"), without("manifest.json"), "(DOSSIER/manifest.json) : réparez-le avec"),
    (("fetch", "smollm2"), file(f"{FOLDER}/manifest.json", "{"), "est abîmé (DOSSIER/manifest.json)"),
    (("fetch", "smollm2"), file(f"{FOLDER}/manifest.json", "[]"), "est abîmé (DOSSIER/manifest.json)"),
    (("fetch", "smollm2"), manifest(archive="autre"), "est abîmé (DOSSIER/manifest.json)"),
    (("fetch", "smollm2"), manifest(files={"m.gguf": [4]}), "est abîmé (DOSSIER/m.gguf)"),
    (("fetch", "smollm2"), manifest(files={"absent.gguf": [4, 0, ""]}), "est abîmé (DOSSIER/absent.gguf)"),
    (("fetch", "smollm2"), without("m.gguf"), "est abîmé (DOSSIER/m.gguf)"),
    (("fetch", "smollm2"), file(f"{FOLDER}/m.gguf", "GGU"), "est abîmé (DOSSIER/m.gguf)"),
    (("fetch", "smollm2"), file(f"{FOLDER}/m.gguf", "GGUf"), "est abîmé (DOSSIER/m.gguf)"),
    (("fetch", "smollm2"), lambda cache: (cache / "sources").write_text("un fichier"), "(existe déjà) : choisissez"),
]


@pytest.mark.parametrize("arguments, prepare, message", BAD)
def test_bad_input_is_one_french_line_and_touches_nothing(cache, monkeypatch, arguments, prepare, message):
    monkeypatch.setattr("llama.archive.download", lambda *_: pytest.fail("rien ne devait être téléchargé"))
    prepare(cache)
    before = snapshot(cache)
    result = run(*arguments)
    said = result.stderr.replace("\u00a0", " ").replace(str(cache / FOLDER), "DOSSIER")
    assert result.exit_code == 2 and message in said and result.stderr.count("\n") == 1, result.output
    assert result.stdout == "" and "Traceback" not in result.output and snapshot(cache) == before
    assert_french(result.stderr)
