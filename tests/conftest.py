"""Ce que plusieurs fichiers d’essais partagent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Sans ces options, Chromium cherche au démarrage des serveurs de son éditeur.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Un Chromium sans fenêtre ; l’essai est passé, avec sa raison, là où il n’y en a aucun."""
    found = chromium.find()
    if found is None:
        pytest.skip("aucun Chromium ici : lancez tools/chromium.py, ou installez Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(
            executable_path=found.path, args=["--no-sandbox", *QUIET], env={**os.environ, **found.env}
        )
        yield instance
        instance.close()
