"""La conversation : jetons spéciaux, gabarit, et encodage d’une liste de messages segment par segment.

Un message est un dictionnaire `{"role": "system" | "user" | "assistant", "content": texte}`. Nos modèles
lisent

    <|begin_of_text|><|user|>Bonjour.<|end_of_text|><|assistant|>Bonjour !<|end_of_text|>

Chaque contenu est encodé seul, puis posé entre des jetons spéciaux : un utilisateur qui écrit
« <|assistant|> » n’a écrit que du texte. `TransformersTokenizer` donne la même interface, et la même
garantie, aux tokenizers de transformers, quel que soit leur gabarit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from .config import LlamaError

Message = dict[str, str]

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
"""Rôle → jeton spécial qui ouvre ses messages."""
SPECIAL_TOKENS = (BOS, EOS, PAD, *ROLES.values())
"""Début d’un texte, fin d’un texte ou d’un message, remplissage, rôles."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Le même gabarit pour transformers (Jinja). Il écrit un texte que le tokenizer relit, et un jeton spécial
dans un message y redevient spécial : seul `encode_chat` protège de l’injection."""


def conventions(special_tokens: Collection[str]) -> dict[str, Any]:
    """Les champs `roles` et `chat_template` de `Vocabulary`, pour un tokenizer qui suit nos noms."""
    roles = {"bos": BOS, "eos": EOS, "pad": PAD}
    return {
        "roles": {role: token for role, token in roles.items() if token in special_tokens},
        "chat_template": CHAT_TEMPLATE if set(SPECIAL_TOKENS) <= set(special_tokens) else None,
    }


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse une conversation vide, un rôle inconnu, un contenu qui n’est pas du texte."""
    if not messages or not isinstance(messages, (list, tuple)):
        raise LlamaError('Une conversation est une liste non vide de messages {"role": …, "content": …}.')
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise LlamaError(f"Message {number} : rôle {role!r} inconnu ; les rôles sont {', '.join(ROLES)}.")
        if not isinstance(message.get("content"), str):
            raise LlamaError(f"Message {number} : « content » doit être un texte.")


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[list[int], list[int]]:
    """Notre gabarit, pour un tokenizer qui en a les jetons ; voir `Tokenizer.encode_chat`."""
    check_messages(messages)
    special = tokenizer.special_tokens
    missing = [token for token in (BOS, EOS, *ROLES.values()) if token not in special]
    if missing:
        raise LlamaError(
            f"Ce tokenizer n’a pas les jetons de conversation {', '.join(missing)} : entraînez-le avec eux, "
            "ou chargez-le par transformers s’il a un autre gabarit."
        )
    ids, mask = [special[BOS]], [0]
    for message in messages:
        content = tokenizer.encode(message["content"])
        learnt = int(message["role"] == "assistant")
        ids += [special[ROLES[message["role"]]], *content, special[EOS]]
        mask += [0] + [learnt] * (len(content) + 1)
    if add_generation_prompt:
        ids, mask = [*ids, special[ROLES["assistant"]]], [*mask, 0]
    return ids, mask


def as_tokenizer(tokenizer: Any) -> Any:
    """Rend `tokenizer` s’il a notre interface, sinon l’enveloppe : il vient de transformers."""
    return tokenizer if hasattr(tokenizer, "encode_chat") else TransformersTokenizer(tokenizer)


class TransformersTokenizer:
    """Un tokenizer de transformers sous l’interface des nôtres.

    Args:
        tokenizer: un `PreTrainedTokenizerFast` au niveau de l’octet ; `encode_chat` demande qu’il ait un
            gabarit.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int | None = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocab_size = len(tokenizer)
        names, ids = tokenizer.all_special_tokens, tokenizer.all_special_ids
        self.special_tokens: dict[str, int] = dict(zip(names, ids, strict=True))

    def to_transformers(self) -> Any:
        """Le tokenizer enveloppé."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Texte → identifiants ; n’ajoute et ne reconnaît aucun jeton spécial."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_document(self, text: str) -> list[int]:
        """Texte → identifiants, précédés de ce que ce tokenizer met de lui-même en tête (souvent rien)."""
        return [*self._tokenizer("").input_ids, *self.encode(text)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Identifiants → texte."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Conversation → identifiants et masque ; voir `Tokenizer.encode_chat`.

        Le gabarit est rendu avec des repères à la place des contenus ; ce qui les sépare est encodé avec les
        jetons spéciaux, les contenus sans.

        Raises:
            LlamaError: pas de gabarit, ou un gabarit qui refuse ces rôles ou perd un contenu.
        """
        check_messages(messages)
        if not self._tokenizer.chat_template:
            raise LlamaError(
                "Ce tokenizer n’a pas de gabarit de conversation (chat_template) : prenez celui d’un modèle "
                "« Instruct »."
            )
        marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
        try:
            rendered = self._tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # Jinja : la classe dépend de ce que fait le gabarit
            raise LlamaError(f"Le gabarit de conversation refuse ces messages : {error}.") from error
        first, *rest = re.split("\ue000(\\d+)\ue001", rendered)
        if rest[::2] != [str(i) for i in range(len(messages))]:
            raise LlamaError("Le gabarit de conversation n’insère pas chaque message une fois, dans l’ordre.")
        framing = {"add_special_tokens": False, "split_special_tokens": False}
        ids = self._tokenizer.encode(first, **framing)
        mask = [0] * len(ids)
        for message, following in zip(messages, rest[1::2], strict=True):
            content = self.encode(message["content"])
            frame = self._tokenizer.encode(following, **framing)
            end = frame.index(self.eos_id) + 1 if self.eos_id in frame else 0
            learnt = int(message["role"] == "assistant")
            ids += content + frame
            mask += [learnt] * (len(content) + end) + [0] * (len(frame) - end)
        return ids, mask
