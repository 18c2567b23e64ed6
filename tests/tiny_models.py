"""Ce que les essais du lanceur et des commandes partagent : un modèle minuscule, des questions, une empreinte."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # aucun essai ne sort ; à dire avant que huggingface_hub ne soit chargé

import torch
from merge_models import snapshot

from llama.chat import BOS, EOS, PAD, SPECIAL_TOKENS
from llama.config import Config
from llama.model import LlamaModel
from llama.tokenization import BPETokenizer

torch.set_num_threads(1)  # de si petits modèles n’ont rien à partager entre fils

__all__ = ["PAIRS", "TEXTS", "make_model", "snapshot", "tokenizer", "write_pairs"]

PAIRS = [(f"Combien font {i} et {j} ?", f"Cela fait {i + j}.") for i in range(1, 8) for j in range(1, 7)]
TEXTS = [f"Le {i} du mois, le facteur a porté {i + 3} lettres au village, puis {2 * i} cartes." for i in range(1, 60)]


@functools.cache
def tokenizer(chat: bool = True) -> BPETokenizer:
    """Un BPE de 330 jetons ; sans `chat`, il n’a pas les jetons de conversation."""
    texts = [*map("\n".join, PAIRS), *TEXTS]
    return BPETokenizer.train(texts, 330, SPECIAL_TOKENS if chat else (BOS, EOS, PAD))


def make_model(folder: Path, *, seed: int = 0, chat: bool = True, template: bool = True, **changes: int) -> Path:
    """Écrit un Llama minuscule tiré au hasard, avec son tokenizer, au format de transformers.

    Args:
        folder: à créer.
        seed: graine des poids.
        chat: le tokenizer a-t-il les jetons de conversation ?
        template: a-t-il un gabarit de conversation ?
        **changes: réglages de `Config`.
    """
    own = tokenizer(chat)
    if not template:
        own = BPETokenizer(own.vocabulary._replace(chat_template=None))
    settings = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "block_size": 96}
    torch.manual_seed(seed)
    model = LlamaModel(Config(vocab_size=own.vocab_size, **settings | changes))
    model.save_pretrained(folder, tokenizer=own)
    return folder


def write_pairs(path: Path, pairs: list[tuple[str, str]], keys: tuple[str, str] = ("question", "réponse")) -> Path:
    """Écrit des questions en JSONL."""
    lines = [json.dumps(dict(zip(keys, pair, strict=True)), ensure_ascii=False) for pair in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
