"""L’assemblage d’un modèle : son tokenizer, son adaptateur s’il en a un, un gabarit de conversation s’il en faut un.

Un modèle de base continue des textes ; affiné sur des questions, il lui faut une façon de les présenter, qui
voyage ensuite avec son tokenizer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from . import pretrained
from .chat import CHAT_TEMPLATE, SPECIAL_TOKENS, TransformersTokenizer
from .config import LlamaError
from .lora import adapter_names, fold, load_adapter, remove_lora
from .model import LlamaModel
from .peft_format import SETTINGS_FILE
from .vocabulary import read_json

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ {'system': '', 'user': '### Question\n', 'assistant': '### Réponse\n'}[message['role']]"
    " + message['content'] + (eos_token if message['role'] == 'assistant' else '\n\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Réponse\n' }}{% endif %}"
)
"""Du texte, sans jeton nouveau : le vocabulaire d’un modèle publié reste le sien."""


def chat_template(tokenizer: Any) -> str | None:
    """Le gabarit de conversation d’un tokenizer, le nôtre ou celui de transformers ; None s’il n’en a pas."""
    if hasattr(tokenizer, "vocabulary"):
        return tokenizer.vocabulary.chat_template
    return tokenizer.to_transformers().chat_template


def with_chat_template(tokenizer: Any) -> Any:
    """Le même tokenizer, capable de conversations ; lui-même, s’il l’est déjà."""
    if chat_template(tokenizer):
        return tokenizer
    if hasattr(tokenizer, "vocabulary") and set(SPECIAL_TOKENS) <= tokenizer.special_tokens.keys():
        return type(tokenizer)(tokenizer.vocabulary._replace(chat_template=CHAT_TEMPLATE))
    inner = copy.deepcopy(tokenizer.to_transformers())
    inner.chat_template = PLAIN_TEMPLATE
    return TransformersTokenizer(inner)


def without_chat_template(tokenizer: Any) -> Any:
    """Le même tokenizer, des nôtres, sans gabarit : celui d’un modèle qui ne sait que continuer un texte."""
    return type(tokenizer)(tokenizer.vocabulary._replace(chat_template=None))


def load(name: str | Path) -> tuple[LlamaModel, Any]:
    """Un modèle et son tokenizer ; le dossier d’un adaptateur donne le modèle qu’il adapte, adapté.

    Raises:
        LlamaError: modèle absent, protégé ou illisible ; tokenizer d’un autre modèle.
    """
    folder = Path(name).expanduser()
    if _is_adapter(folder):
        settings = read_json(folder / SETTINGS_FILE)
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        if not isinstance(base, str) or not base or _is_adapter(Path(base)):
            raise LlamaError(f"« {name} » ne dit pas quel modèle il adapte : écrivez-y base_model_name_or_path.")
        model, tokenizer = load(base)
        load_adapter(model, folder)
        own = (folder / "tokenizer.json").is_file()
        return model, pretrained.load_tokenizer(folder) if own else tokenizer
    # Le chemin entier : un adaptateur le retient, et se charge d’un autre dossier.
    source = folder.resolve() if folder.exists() else str(name)
    try:
        model, tokenizer = LlamaModel.from_pretrained(source), pretrained.load_tokenizer(source)
    except LlamaError as error:
        if folder.exists() or not pretrained.HUB_ID.fullmatch(str(name)):
            raise
        way_out = "Un modèle s’obtient sans compte ni Hub : « llama fetch smollm2 », puis smollm2."
        raise LlamaError(f"{error} {way_out}") from error
    known = _vocabulary_size(tokenizer)
    if known > model.config.vocab_size:
        raise LlamaError(
            f"Le tokenizer de « {name} » a {known} jetons et le modèle {model.config.vocab_size} : ce n’est pas "
            "le sien, retrouvez l’original."
        )
    return model, tokenizer


def _is_adapter(folder: Path) -> bool:
    return (folder / SETTINGS_FILE).is_file() and not (folder / "config.json").exists()


def _vocabulary_size(tokenizer: Any) -> int:
    """Le nombre de jetons ordinaires : des modèles publiés ont un jeton de remplissage hors de leurs poids."""
    if hasattr(tokenizer, "vocabulary"):
        return max(tokenizer.vocabulary.tokens.values()) + 1
    return tokenizer.to_transformers().vocab_size


def folded(model: LlamaModel) -> LlamaModel:
    """Replie pour de bon l’adaptateur de `model`, s’il en a un, et le rend."""
    if adapter_names(model):
        fold(model)
        remove_lora(model)
    return model
