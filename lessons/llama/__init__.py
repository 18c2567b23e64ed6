"""L’atelier des LLM : construire, entraîner, affiner, distiller, fusionner et évaluer un Llama, en français.

Les noms publics se chargent à leur premier usage : `import llama` ne charge pas torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Config": "config",
    "TrainingConfig": "config",
    "LlamaError": "config",
    "SimpleCharTokenizer": "tokenization",
    "BPETokenizer": "tokenization",
    "load_and_prepare_french_data": "data",
    "RMSNorm": "model",
    "RotaryPositionalEmbedding": "model",
    "Attention": "model",
    "ExpertMLP": "model",
    "MoE": "model",
    "TransformerBlock": "model",
    "LlamaModel": "model",
    "BasicModelRunner": "runner",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from llama.config import Config as Config
    from llama.config import LlamaError as LlamaError
    from llama.config import TrainingConfig as TrainingConfig
    from llama.data import load_and_prepare_french_data as load_and_prepare_french_data
    from llama.model import Attention as Attention
    from llama.model import ExpertMLP as ExpertMLP
    from llama.model import LlamaModel as LlamaModel
    from llama.model import MoE as MoE
    from llama.model import RMSNorm as RMSNorm
    from llama.model import RotaryPositionalEmbedding as RotaryPositionalEmbedding
    from llama.model import TransformerBlock as TransformerBlock
    from llama.runner import BasicModelRunner as BasicModelRunner
    from llama.tokenization import BPETokenizer as BPETokenizer
    from llama.tokenization import SimpleCharTokenizer as SimpleCharTokenizer


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """La version écrite dans pyproject.toml, par ce que l’installation en a gardé."""
    from importlib import metadata  # plus long à charger que tout le reste

    try:
        return metadata.version("llama-library")
    except metadata.PackageNotFoundError:
        return "0+sources"  # bibliothèque lue sans être installée


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
