"""Le vocabulaire d’un tokenizer et son fichier, `tokenizer.json` : l’écrire, le lire, le vérifier.

Le format est celui de la bibliothèque `tokenizers`. Deux sortes : `WordLevel` sur des caractères, et `BPE` au
niveau de l’octet, le nôtre ou celui de GPT-2, de Llama 3, de SmolLM2… Ce que nous ne savons pas rendre à
l’identique (normalisation, autres prédécoupages) est refusé.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import regex

from .bpe import GPT2_PATTERN, byte_alphabet
from .chat import conventions
from .config import LlamaError, system_cause

CHARACTER = r"[\s\S]"
"""Le prédécoupage en caractères."""


class Vocabulary(NamedTuple):
    """Ce qui définit un tokenizer.

    Attributes:
        kind: `"BPE"` ou `"WordLevel"`.
        tokens: jeton → identifiant, sans les jetons spéciaux ; un BPE les écrit avec `bpe.byte_alphabet`.
        special_tokens: jeton spécial → identifiant.
        patterns: motifs de prédécoupage, appliqués l’un après l’autre.
        merges: paires de jetons, dans l’ordre où elles furent apprises.
        ignore_merges: un morceau présent au vocabulaire est-il pris entier (Llama 3) ?
        roles: `"bos"`, `"eos"`, `"pad"` → jeton spécial du début, de la fin, du remplissage.
        chat_template: gabarit de conversation, en Jinja.
    """

    kind: str
    tokens: dict[str, int]
    special_tokens: dict[str, int]
    patterns: tuple[str, ...]
    merges: Sequence[tuple[str, str]] = ()
    ignore_merges: bool = False
    roles: Mapping[str, str] = MappingProxyType({})
    chat_template: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Le contenu de `tokenizer.json`, que lisent `tokenizers` et transformers."""
        split = {"type": "Split", "behavior": "Isolated", "invert": False}
        steps: list[dict[str, Any]] = [split | {"pattern": {"Regex": pattern}} for pattern in self.patterns]
        decoder: dict[str, Any] = {"type": "Fuse"}
        model: dict[str, Any] = {"type": self.kind, "vocab": self.special_tokens | self.tokens}
        if self.kind == "BPE":
            byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            decoder = {"type": "ByteLevel"} | byte_level
            steps.append(decoder)
            model |= {"merges": [list(pair) for pair in self.merges], "ignore_merges": self.ignore_merges}
        else:
            model["unk_token"] = "<unk>"  # absent du vocabulaire : un caractère inconnu est une erreur
        flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": token} | flags for token, i in self.special_tokens.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        }

    def settings(self) -> dict[str, Any]:
        """Ce que transformers range à côté, dans `tokenizer_config.json`."""
        roles = {f"{role}_token": token for role, token in self.roles.items()}
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        return {"clean_up_tokenization_spaces": False} | roles | template

    def save(self, path: str | Path, force: bool) -> None:
        """Écrit les deux fichiers ; voir `Tokenizer.save`."""
        path = Path(path)
        files = {path: self.to_dict()}
        if path.suffix != ".json":
            settings = self.settings() | {"tokenizer_class": "PreTrainedTokenizerFast"}
            files = {path / "tokenizer.json": self.to_dict(), path / "tokenizer_config.json": settings}
        for file in files:
            if file.exists() and not force:
                raise LlamaError(f"« {file} » existe déjà : écrivez ailleurs, ou donnez force=True.")
        for file, content in files.items():
            write_json(file, content)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Relit ce que `save`, ou la bibliothèque `tokenizers`, a écrit ; voir `Tokenizer.load`."""
        path = Path(path)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        beside, template = file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")
        data, settings = read_json(file), read_json(beside) if path != file and beside.exists() else None
        try:
            vocabulary = _parse(data)
            if settings is None:
                return vocabulary._replace(**conventions(vocabulary.special_tokens))
            _require(isinstance(settings, dict), f"« {beside.name} » n’est pas un objet JSON")
            written = settings.get("chat_template")
            if template.exists():  # là où transformers 5 le range
                written = template.read_text(encoding="utf-8")
            roles = _roles(settings, vocabulary.special_tokens)
            written = written if isinstance(written, str) else None
            return vocabulary._replace(roles=roles, chat_template=written)
        except (LlamaError, UnicodeDecodeError) as error:
            raise LlamaError(f"« {file} » n’est pas un tokenizer que le cours sait lire : {error}.") from None


def _parse(data: Any) -> Vocabulary:
    """Le vocabulaire d’un `tokenizer.json`, vérifié."""
    _require(isinstance(data, dict), "ce n’est pas un objet JSON")
    _require(data.get("version") == "1.0", f"sa version est {data.get('version')!r} au lieu de « 1.0 »")
    model = data.get("model")
    _require(isinstance(model, dict), "sa partie « model » manque")
    kind = model.get("type")
    _require(kind in ("BPE", "WordLevel"), f"son modèle est de type {kind!r}, ni BPE ni WordLevel")
    _require(data.get("normalizer") is None, "il normalise les textes (« normalizer »)")
    for option in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(option), f"il demande l’option « {option} »")
    tokens = model.get("vocab")
    _require(isinstance(tokens, dict) and len(tokens) > 0, "son vocabulaire (« vocab ») manque")
    _require(all(_is_id(i) for i in tokens.values()), "un identifiant n’est pas un entier positif")
    _require(len(set(tokens.values())) == len(tokens), "deux jetons ont le même identifiant")
    special_tokens = _special_tokens(data.get("added_tokens", []), tokens)
    byte_level, patterns = _patterns(data.get("pre_tokenizer"))
    tokens = {token: i for token, i in tokens.items() if token not in special_tokens}
    merges = _merges(model.get("merges"), tokens) if kind == "BPE" else ()
    if kind == "BPE":
        alphabet = set(byte_alphabet().values())
        foreign = [token for token in tokens if not alphabet.issuperset(token)]
        _require(byte_level, "il n’est pas au niveau de l’octet (« ByteLevel »)")
        _require(not foreign, f"son jeton {foreign[:1]} n’est pas une suite d’octets")
    else:
        _require(patterns == (CHARACTER,), "ses mots ne sont pas des caractères")
        long = [token for token in tokens if len(token) != 1]
        _require(not long, f"son jeton {long[:1]} n’est pas un caractère")
    return Vocabulary(kind, tokens, special_tokens, patterns, merges, bool(model.get("ignore_merges")))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LlamaError(message)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _special_tokens(added: Any, tokens: dict[str, int]) -> dict[str, int]:
    _require(isinstance(added, list), "« added_tokens » n’est pas une liste")
    names = {i: token for token, i in tokens.items()}
    special_tokens: dict[str, int] = {}
    for item in added:
        valid = isinstance(item, dict) and isinstance(item.get("content"), str) and _is_id(item.get("id"))
        _require(valid, f"son jeton spécial {item!r} est mal formé")
        token, i = item["content"], item["id"]
        other = names.setdefault(i, token)
        _require(other == token, f"l’identifiant {i} est celui de {token!r} et de {other!r}")
        _require(tokens.get(token, i) == i, f"le jeton {token!r} a deux identifiants")
        special_tokens[token] = i
    return special_tokens


def _roles(settings: dict[str, Any], special_tokens: dict[str, int]) -> dict[str, str]:
    """Les jetons de début, de fin et de remplissage que nomme un `tokenizer_config.json`."""
    roles = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            known = isinstance(token, str) and token in special_tokens
            _require(known, f"son {role}_token {token!r} n’est pas un jeton spécial")
            roles[role] = token
    return roles


def _patterns(step: Any) -> tuple[bool, tuple[str, ...]]:
    """Le prédécoupage est-il au niveau de l’octet, et par quels motifs, appliqués l’un après l’autre ?"""
    _require(isinstance(step, dict), "son prédécoupage (« pre_tokenizer ») manque")
    kind = step.get("type")
    if kind == "Sequence" and isinstance(step.get("pretokenizers"), list):
        parts = [_patterns(part) for part in step["pretokenizers"]]
        return any(found for found, _ in parts), tuple(p for _, patterns in parts for p in patterns)
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return True, (GPT2_PATTERN,) if step.get("use_regex", True) else ()
    if kind == "Digits":
        return False, (r"\p{N}" if step.get("individual_digits") else r"\p{N}+",)
    pattern = step.get("pattern")
    known = kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    known = known and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str)
    _require(known, f"son prédécoupage {kind!r} n’est pas de ceux que nous faisons")
    try:
        regex.compile(pattern["Regex"])
    except regex.error as error:
        raise LlamaError(f"son motif de prédécoupage est invalide ({error})") from None
    return False, (pattern["Regex"],)


def _merges(merges: Any, tokens: dict[str, int]) -> list[tuple[str, str]]:
    _require(isinstance(merges, list), "la liste de ses fusions (« merges ») manque")
    pairs = []
    for rank, item in enumerate(merges):
        pair = item.split(" ") if isinstance(item, str) else item  # l’ancien format écrit « a b »
        valid = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        _require(valid, f"sa fusion {rank} est mal formée : {item!r}")
        for token in (*pair, "".join(pair)):
            _require(token in tokens, f"le jeton {token!r} de sa fusion {rank} manque au vocabulaire")
        pairs.append((pair[0], pair[1]))
    return pairs


def read_json(path: Path) -> Any:
    """Lit un fichier JSON ; dit en une ligne s’il est absent, tronqué, ou n’est pas en UTF-8."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LlamaError(f"« {path} » introuvable : vérifiez le chemin.") from None
    except UnicodeDecodeError as error:
        raise LlamaError(
            f"« {path} » n’est pas du JSON (l’octet {error.start} n’est pas de l’UTF-8) : vérifiez le chemin."
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError : syntaxe, ou un nombre démesuré
        raise LlamaError(
            f"« {path} » n’est pas du JSON complet (ligne {getattr(error, 'lineno', 1)}) : fichier tronqué "
            "ou étranger, retrouvez l’original."
        ) from None
    except OSError as error:
        raise LlamaError(f"« {path} » est illisible ({system_cause(error)}) : vérifiez le chemin.") from None


def write_json(path: Path, content: Any) -> None:
    """Écrit un fichier JSON d’un bloc : à tout instant, le fichier est l’ancien ou le nouveau, entier."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as stream:
            temporary = Path(stream.name)
            json.dump(content, stream, ensure_ascii=False, indent=1)
        temporary.chmod(0o644)  # un fichier temporaire naît privé
        os.replace(temporary, path)
    except OSError as error:
        raise LlamaError(
            f"« {path} » ne peut pas être écrit ({system_cause(error)}) : vérifiez la place et les droits."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
