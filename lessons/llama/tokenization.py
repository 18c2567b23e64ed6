"""Les tokenizers : un texte devient une suite d’entiers, et inversement.

`SimpleCharTokenizer` compte un jeton par caractère ; `BPETokenizer` apprend les siens (l’algorithme est dans
`bpe`). Tous deux s’écrivent dans un `tokenizer.json` que transformers lit aussi (`vocabulary`). Aucune
normalisation : décoder rend exactement le texte encodé. Un texte ne produit jamais de jeton spécial ; les
conversations s’encodent segment par segment (`chat`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import regex

from .bpe import PATTERN, apply_merges, byte_alphabet, isolated, learn_merges
from .chat import SPECIAL_TOKENS, Message, conventions, encode_messages
from .config import LlamaError
from .progress import progress_bar
from .vocabulary import CHARACTER, Vocabulary

ALPHABET = byte_alphabet()
BYTES = {character: byte for byte, character in ALPHABET.items()}
CACHED_PIECES = 100_000


class Tokenizer:
    """Ce que nos tokenizers partagent : jetons spéciaux, décodage, conversation, fichiers.

    Attributes:
        vocabulary: ce qui le définit, et qu’il écrit.
        vocab_size: nombre d’identifiants, jetons spéciaux compris.
        special_tokens: jeton spécial → identifiant.
        bos_id, eos_id, pad_id: début de texte, fin de texte ou de message, remplissage ; None s’il n’y en a
            pas.
    """

    def __init__(self, vocabulary: Vocabulary, token_bytes: dict[int, bytes]) -> None:
        self.vocabulary, self.special_tokens = vocabulary, vocabulary.special_tokens
        self._token_bytes = token_bytes | {i: token.encode() for token, i in self.special_tokens.items()}
        self.vocab_size = max(self._token_bytes) + 1
        roles = (vocabulary.roles.get(role, "") for role in ("bos", "eos", "pad"))
        self.bos_id, self.eos_id, self.pad_id = (self.special_tokens.get(token) for token in roles)

    def encode(self, text: str) -> list[int]:
        """Texte → identifiants, sans aucun jeton spécial."""
        raise NotImplementedError

    def encode_document(self, text: str) -> list[int]:
        """Texte → identifiants précédés du début de texte, comme nos modèles lisent un document."""
        return self.encode(text) if self.bos_id is None else [self.bos_id, *self.encode(text)]

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Conversation → identifiants et masque.

        Args:
            messages: voir `chat`.
            add_generation_prompt: ouvrir une réponse de l’assistant, que le modèle écrira.

        Returns:
            Les identifiants, et un masque de même longueur : 1 pour ce que dit l’assistant, fin de message
            comprise (ce qu’un affinage apprend), 0 ailleurs.

        Raises:
            LlamaError: conversation mal formée, ou tokenizer sans les jetons de notre gabarit.
        """
        return encode_messages(self, messages, add_generation_prompt)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Identifiants → texte ; un caractère dont il manque des octets donne U+FFFD."""
        skipped = set(self.special_tokens.values()) if skip_special_tokens else set()
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            tokens = [self._token_bytes[i] for i in ids if i not in skipped]
        except KeyError as error:
            raise LlamaError(
                f"Identifiant {error} inconnu de ce tokenizer, qui en a {self.vocab_size} : il vient d’un "
                "autre tokenizer."
            ) from None
        return b"".join(tokens).decode("utf-8", errors="replace")

    def to_transformers(self) -> Any:
        """Le même tokenizer pour transformers (`PreTrainedTokenizerFast`), avec le gabarit de conversation.

        Les identifiants sont les mêmes pour tout texte sans jeton spécial. Un jeton spécial écrit dans un
        texte y est reconnu, sauf `split_special_tokens=True` ; par `encode`, jamais : seul `encode_chat`
        protège de l’injection.
        """
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = tokenizers.Tokenizer.from_str(json.dumps(self.vocabulary.to_dict()))
        return PreTrainedTokenizerFast(tokenizer_object=inner, **self.vocabulary.settings())

    def save(self, path: str | Path, force: bool = False) -> None:
        """Écrit `tokenizer.json` et `tokenizer_config.json` dans le dossier `path`.

        Args:
            path: un dossier, créé s’il manque ; ou un nom en `.json`, et le premier fichier seul y est écrit.
            force: remplacer un fichier qui existe.

        Raises:
            LlamaError: un fichier existe déjà, ou ne peut pas être écrit.
        """
        self.vocabulary.save(path, force)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Relit un dossier ou un `tokenizer.json` : le nôtre, ou celui d’un autre BPE au niveau de l’octet.

        `Tokenizer.load` rend la classe qui convient ; `BPETokenizer.load` refuse un fichier de caractères.

        Raises:
            LlamaError: fichier absent, tronqué ou d’une autre sorte ; le message dit ce qui ne va pas.
        """
        vocabulary = Vocabulary.load(path)
        kind = BPETokenizer if vocabulary.kind == "BPE" else SimpleCharTokenizer
        if not issubclass(kind, cls):
            raise LlamaError(f"« {path} » est un {kind.__name__} : chargez-le par {kind.__name__}.load.")
        return kind(vocabulary)


class SimpleCharTokenizer(Tokenizer):
    """Un jeton par caractère vu à l’entraînement."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary, {i: character.encode() for character, i in vocabulary.tokens.items()})

    @classmethod
    def train(
        cls, texts: Iterable[str], special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> SimpleCharTokenizer:
        """Les jetons spéciaux, puis les caractères de `texts`, triés."""
        characters = sorted({character for text in _listed(texts) for character in _checked(text)})
        if not characters:
            raise LlamaError("Corpus vide : il faut au moins un caractère pour entraîner un tokenizer.")
        tokens = {character: i for i, character in enumerate(characters, start=len(special_tokens))}
        return cls(_vocabulary("WordLevel", tokens, special_tokens, CHARACTER))

    def encode(self, text: str) -> list[int]:
        """Texte → identifiants.

        Raises:
            LlamaError: un caractère inconnu, que le message nomme avec sa position (le premier est en 0).
        """
        try:
            return [self.vocabulary.tokens[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise LlamaError(
                f"Caractère inconnu {character!r} (U+{ord(character):04X}) à la position "
                f"{text.index(character)} : entraînez le tokenizer sur un texte qui le contient, ou prenez "
                "BPETokenizer, qui encode tout."
            ) from None


class BPETokenizer(Tokenizer):
    """Byte-pair encoding sur des octets.

    Tout texte s’encode, et se décode exactement ; seul un vocabulaire venu d’ailleurs peut manquer d’octets.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        ids = vocabulary.tokens
        token_bytes = {i: bytes(BYTES[character] for character in token) for token, i in ids.items()}
        super().__init__(vocabulary, token_bytes)
        self._regexes = [regex.compile(pattern) for pattern in vocabulary.patterns]
        self._byte_ids = {byte: ids[character] for byte, character in ALPHABET.items() if character in ids}
        self._ranks = {
            (ids[left], ids[right]): (rank, ids[left + right])
            for rank, (left, right) in enumerate(vocabulary.merges)
        }
        self._whole = {token: i for i, token in token_bytes.items()} if vocabulary.ignore_merges else {}
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> BPETokenizer:
        """Apprend un vocabulaire : les jetons spéciaux, les 256 octets, puis une fusion par jeton.

        Args:
            texts: les documents ; la mémoire suit le nombre de morceaux distincts, non leur longueur.
            vocab_size: taille voulue ; un petit corpus, dont toutes les paires s’épuisent, en donne moins.
            special_tokens: les premiers identifiants.

        Raises:
            LlamaError: corpus vide, `vocab_size` trop petit pour les octets, ou texte mal formé.
        """
        first = len(special_tokens) + len(ALPHABET)
        if vocab_size < first:
            raise LlamaError(
                f"vocab_size ({vocab_size}) doit être d’au moins {first} : 256 octets et "
                f"{len(special_tokens)} jetons spéciaux."
            )
        pattern, pieces = regex.compile(PATTERN), Counter()
        for text in progress_bar(_listed(texts), desc="Prédécoupage", unit="texte", delay=2):
            pieces.update(isolated(pattern, _checked(text)))
        if not pieces:
            raise LlamaError("Corpus vide : il faut au moins un caractère pour entraîner un tokenizer.")
        ids = {byte: i for i, byte in enumerate(ALPHABET, start=len(special_tokens))}
        words = {tuple(ids[byte] for byte in piece.encode()): count for piece, count in pieces.items()}
        names, merges = {ids[byte]: character for byte, character in ALPHABET.items()}, []
        for i, (left, right) in enumerate(learn_merges(words, vocab_size - first, first), start=first):
            names[i] = names[left] + names[right]
            merges.append((names[left], names[right]))
        tokens = {name: i for i, name in names.items()}
        return cls(_vocabulary("BPE", tokens, special_tokens, PATTERN, merges))

    def pieces(self, text: str) -> list[str]:
        """Les morceaux du prédécoupage : `pieces("l’été arrive")` donne `["l’", "été", " arrive"]`."""
        found = [text]
        for pattern in self._regexes:
            found = [part for piece in found for part in isolated(pattern, piece)]
        return found

    def encode(self, text: str) -> list[int]:
        """Texte → identifiants.

        Raises:
            LlamaError: moitié de paire UTF-16 ; ou octet qui manque au vocabulaire d’un autre modèle.
        """
        if len(self._cache) > CACHED_PIECES:
            self._cache.clear()
        ids: list[int] = []
        for piece in self.pieces(_checked(text)):
            known = self._cache.get(piece)
            if known is None:
                known = self._cache[piece] = self._encode_piece(piece.encode())
            ids += known
        return ids

    def _encode_piece(self, piece: bytes) -> list[int]:
        if piece in self._whole:
            return [self._whole[piece]]
        try:
            return apply_merges([self._byte_ids[byte] for byte in piece], self._ranks)
        except KeyError as error:  # SmolLM2, par exemple, n’a pas les octets rares
            raise LlamaError(
                f"L’octet 0x{error.args[0]:02X} de {piece.decode()!r} n’a pas de jeton dans ce vocabulaire : "
                "ôtez ce caractère du texte."
            ) from None


def _vocabulary(
    kind: str, tokens: dict[str, int], special_tokens: Sequence[str], pattern: str,
    merges: Sequence[tuple[str, str]] = (),
) -> Vocabulary:
    """Un vocabulaire à notre façon : jetons spéciaux d’abord, nos rôles, notre gabarit."""
    if len(set(special_tokens)) != len(special_tokens) or not all(special_tokens):
        raise LlamaError(f"Jetons spéciaux vides ou répétés : {', '.join(map(repr, special_tokens))}.")
    if not tokens.keys().isdisjoint(special_tokens):
        raise LlamaError("Un jeton spécial est aussi un jeton ordinaire : nommez-le comme « <|nom|> ».")
    specials = {token: i for i, token in enumerate(special_tokens)}
    return Vocabulary(kind, tokens, specials, (pattern,), merges, **conventions(specials))


def _listed(texts: Iterable[str]) -> Iterable[str]:
    """Refuse un texte seul, dont le parcours donnerait les caractères."""
    if isinstance(texts, str):
        raise LlamaError("Un tokenizer s’entraîne sur une liste de textes : écrivez train([texte], …).")
    return texts


def _checked(text: str) -> str:
    """Refuse ce qui n’est pas un texte Unicode."""
    if not isinstance(text, str):
        raise LlamaError(f"Un texte (str) est attendu, non {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LlamaError(
            f"U+{ord(text[error.start]):04X} à la position {error.start} : une moitié de paire UTF-16, qui "
            "n’est pas un caractère ; relisez le fichier avec le bon encodage."
        ) from None
    return text
