"""`progress` : une seule barre, que TQDM_DISABLE fait taire, dans un terminal comme dans un carnet."""

import pytest

from llama import progress


@pytest.mark.parametrize("variable, shown, muted", [
    ("1", True, True), ("0", True, False), ("", True, False), (None, True, False), (None, False, True),
])
def test_the_variable_or_the_caller_mutes(monkeypatch, variable, shown, muted):
    if variable is None:
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
    else:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    received = []
    monkeypatch.setattr(progress, "tqdm", lambda iterable, **options: received.append(options))
    progress.progress_bar(range(3), shown=shown, unit="pas")
    assert received == [{"disable": muted, "unit": "pas"}]


def test_a_muted_bar_still_gives_its_items(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress.progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_shown_bar_is_written_to_the_error_stream(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(progress.progress_bar(range(3), unit="pas")) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
