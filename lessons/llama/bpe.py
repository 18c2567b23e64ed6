"""L’algorithme BPE sur des octets : prédécouper un texte, apprendre des fusions, les appliquer à un mot.

Le vocabulaire part des 256 octets ; à chaque tour, la paire de jetons voisins la plus fréquente devient un
jeton (Sennrich et al. 2016, §3.2 ; sur des octets, Radford et al. 2019, §2.2). Ce module ne connaît ni
fichiers ni jetons spéciaux : voir `tokenization`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping

import regex

from .progress import progress_bar

Pair = tuple[int, int]

PATTERN = "|".join((
    # Les mots qui gardent leur apostrophe : aujourd’hui, prud’hommes.
    r"[ -]?(?i:aujourd|prud)['’][\p{L}\p{M}]++",
    # Un mot, avec l’apostrophe de son élision (l’, qu’, lorsqu’) ; un trait d’union commence un mot (-ce).
    r"[ -]?[\p{L}\p{M}]++['’]?",
    # Les chiffres, par trois au plus.
    r"\p{N}{1,3}",
    # La ponctuation, avec l’espace insécable de « : », « ; », « ! », « ? » et des guillemets.
    r"[ \u00A0\u202F]?[^\s\p{L}\p{M}\p{N}]++(?:(?<=«)[\u00A0\u202F])?[\r\n]*+",
    # Les fins de ligne ; les suites d’espaces, dont la dernière va au mot qui suit.
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))
"""Prédécoupage : aucune fusion ne franchit la frontière de deux morceaux.

C’est le motif de GPT-4 (`cl100k_base`) adapté au français : l’élision reste avec le mot qui élide, l’espace
insécable avec son signe, l’accent combinant (NFD) avec sa lettre. Les formes NFC et NFD d’un mot sont
d’autres octets, donc d’autres jetons : normaliser est l’affaire du nettoyage. Le motif vaut, tel quel, pour
le module `regex` et pour la bibliothèque `tokenizers` (Oniguruma) ; ils ne diffèrent que sur les caractères
qu’Unicode a reçus depuis peu.
"""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Le prédécoupage de GPT-2, que `ByteLevel` sous-entend dans un `tokenizer.json`."""


def byte_alphabet() -> dict[int, str]:
    """Le caractère visible qui représente chaque octet (Radford et al. 2019, `encoder.py`).

    Returns:
        Octet → caractère, dans l’ordre des caractères, qui est celui des 256 premiers jetons. Un octet
        imprimable en Latin-1 se représente lui-même ; les autres prennent les caractères à partir de U+0100
        (l’espace, « Ġ »).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def isolated(pattern: regex.Pattern, text: str) -> Iterator[str]:
    """Les correspondances de `pattern` et ce qui les sépare, comme `Split(…, "isolated")` de `tokenizers`."""
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()]
        if match.end() > match.start():
            yield match[0]
        end = match.end()
    if end < len(text):
        yield text[end:]


def merge(word: list[int], pair: Pair, new: int) -> list[int]:
    """Remplace, de gauche à droite, `pair` par `new` : `merge([5, 5, 5], (5, 5), 9) == [9, 5]`."""
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def apply_merges(word: list[int], ranks: Mapping[Pair, tuple[int, int]]) -> list[int]:
    """Encode un mot : la fusion apprise le plus tôt d’abord.

    Args:
        word: les jetons de ses octets.
        ranks: paire → (rang d’apprentissage, jeton fusionné).
    """
    never = (len(ranks), -1)
    while len(word) > 1:
        pair = min(zip(word, word[1:], strict=False), key=lambda pair: ranks.get(pair, never))
        if pair not in ranks:
            break
        word = merge(word, pair, ranks[pair][1])
    return word


def merges_by_recounting(words: Mapping[tuple[int, ...], int], n_merges: int, first: int) -> list[Pair]:
    """Apprend les fusions comme dans les manuels : à chaque tour, recompter toutes les paires.

    Mêmes arguments et même résultat que `learn_merges`, qui ne recompte que ce qui change.
    """
    tokens = {word: list(word) for word in words}
    merges: list[Pair] = []
    while len(merges) < n_merges:
        counts: defaultdict[Pair, int] = defaultdict(int)
        for word, occurrences in words.items():
            for pair in zip(tokens[word], tokens[word][1:], strict=False):
                counts[pair] += occurrences
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens = {word: merge(tokens[word], best, first + len(merges)) for word in words}
        merges.append(best)
    return merges


def learn_merges(words: Mapping[tuple[int, ...], int], n_merges: int, first: int) -> list[Pair]:
    """Apprend les fusions en ne recomptant, à chaque tour, que les mots où la paire figure.

    Un index donne les mots de chaque paire, un tas la paire la plus fréquente. Le tas est paresseux : un
    compte ne peut que baisser après y être entré, donc une paire qui en sort avec un compte périmé y retourne
    avec le bon. Départage et comptes sont ceux du `BpeTrainer` de la bibliothèque `tokenizers` : à fréquence
    égale, la plus petite paire d’identifiants ; deux paires qui se chevauchent comptent chacune (« aaa » en a
    deux).

    Args:
        words: mots prédécoupés, en suites de jetons de départ → nombre d’occurrences.
        n_merges: nombre de fusions voulues ; il y en a moins si toutes les paires s’épuisent.
        first: identifiant du premier jeton fusionné ; la fusion k donne le jeton `first + k`.

    Returns:
        Les paires fusionnées, dans l’ordre.
    """
    tokens, occurrences = [list(word) for word in words], list(words.values())
    counts: defaultdict[Pair, int] = defaultdict(int)
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(tokens):
        for pair in zip(word, word[1:], strict=False):
            counts[pair] += occurrences[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    with progress_bar(total=n_merges, desc="Fusions", unit="fusion", delay=2) as bar:
        while heap and len(merges) < n_merges:
            count, best = heapq.heappop(heap)
            if counts[best] != -count:
                if counts[best] > 0:
                    heapq.heappush(heap, (-counts[best], best))
                continue
            new = first + len(merges)
            merges.append(best)
            bar.update()
            born: set[Pair] = set()
            for i in where.pop(best):
                for pair in _merge_and_recount(tokens[i], best, new, occurrences[i], counts):
                    where[pair].add(i)
                    born.add(pair)
            for pair in born:
                if counts[pair] > 0:
                    heapq.heappush(heap, (-counts[pair], pair))
    return merges


def _merge_and_recount(word: list[int], best: Pair, new: int, n: int, counts: dict[Pair, int]) -> list[Pair]:
    """Fusionne `best` dans `word`, sur place ; recompte pour ses `n` occurrences ; rend les paires nées."""
    left, right = best
    born: list[Pair] = []
    i = 0
    while i < len(word) - 1:
        if word[i] == left and word[i + 1] == right:
            if i > 0:
                counts[word[i - 1], left] -= n
                counts[word[i - 1], new] += n
                born.append((word[i - 1], new))
            if i + 2 < len(word):
                counts[right, word[i + 2]] -= n
                counts[new, word[i + 2]] += n
                born.append((new, word[i + 2]))
            word[i : i + 2] = [new]
        i += 1
    return born
