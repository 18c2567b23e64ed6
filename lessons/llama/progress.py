"""La barre de progression du cours : celle de tqdm, qui se tait quand TQDM_DISABLE le demande, carnets compris."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """Une barre de tqdm sur `iterable`, ou à faire avancer à la main.

    Dans un carnet, tqdm ne lit pas TQDM_DISABLE : c’est donc ici qu’on le lit, pour que les sorties enregistrées
    ne contiennent pas de barres.

    Args:
        iterable: ce qu’on parcourt ; None pour une barre avancée par `update`.
        shown: faux pour une barre muette.
        **options: celles de tqdm.
    """
    muted = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(iterable, disable=muted or not shown, **options)
