"""L’examen du cours : des questions de droit du travail qu’aucun modèle du cours n’a apprises, et leur correction.

Les questions viennent des fiches que `holdout` réserve ; leur réponse de référence est le début de celle de la fiche,
coupé à une ou deux phrases qui se comprennent seules. Le choix multiple en réunit quatre de fiches différentes, de
sujets proches et de réponses de même longueur : chacune a pour choix les quatre réponses, dans le même ordre. Qui ne
regarde pas la question choisit toujours la même, et a donc exactement une bonne réponse sur quatre.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from . import holdout
from .assembly import chat_template
from .config import LlamaError
from .evaluation import Estimate, MultipleChoice, choice_nats, choose, grouped_proportion, normalize, prompter, token_f1
from .generation import generate
from .readers import Pair
from .sheets import Question

GROUP = 4
"""Questions d’un groupe, et choix de chacune."""
SHORTEST, LONGEST, ENOUGH = 60, 300, 100
"""Caractères d’une réponse de référence, et ceux à partir desquels on n’y ajoute plus de phrase."""
LENGTHS = 1.6
"""Rapport permis de la plus longue à la plus courte réponse d’un groupe."""
TOO_CLOSE = 0.5
"""Ressemblance (cosinus) à partir de laquelle deux questions pourraient avoir la même réponse."""
QUOTED = 0.6
"""Part des mots de la question qu’une réponse peut reprendre ; au-delà, les compter suffirait à la reconnaître."""
TEMPLATE = "{question}\n"
"""L’invite d’un modèle qui continue des textes : ceux du cours sont un titre, souvent une question, puis sa réponse."""
_REFERS = re.compile(  # ce qui renvoie ailleurs, ou ne répond pas encore
    r"ci-(dessous|dessus|après|avant)|\bvoir\b|susvis|précité|en référence|présente fiche|se reporter|"
    r"doivent être distingu|concernée?s sont|\bsuivante?s?\b(?!\s*:)|"
    r"(vari|diffèr|dépend|différent)\w* (selon|en fonction|de |du |d[’'])",
    re.IGNORECASE,
)
_CONTINUES = re.compile(  # ce qui suppose une phrase d’avant
    r"(il(?! (est|existe|appartient|faut))|ils|elles?|ce|cet|cette|ces|cel(ui|le|les|a)|ceux|ceci|on|toutefois|"
    r"cependant|néanmoins|ainsi|mais|en outre|par ailleurs|en effet|de plus|attention|exemple|son|sa|ses|leurs?|enfin|"
    r"par conséquent|de même|important|cas particulier|une? tel(le)?|sauf|sous réserve|si (les|la date)|"
    r"(si )?c[’']est|à (noter|savoir))\b",
    re.IGNORECASE,
)
_ABBREVIATED = re.compile(r"(\b([A-Z]|art|cf|ex|al|tél|Mme)\.|\.\.\.)$")


class Report(NamedTuple):
    """Le résultat d’un examen.

    Attributes:
        accuracy: bonnes réponses au choix multiple, avec l’intervalle de `grouped_proportion` ; 0,25 au hasard.
        bits_per_byte: ce que coûtent les réponses de référence, sachant leur question.
        f1: mots communs aux réponses écrites et à celles de référence (`token_f1`), entre 0 et 1 ; None sans réponse.
        answers: les réponses écrites : (question, référence, réponse).
    """

    accuracy: Estimate
    bits_per_byte: float
    f1: float | None
    answers: list[tuple[str, str, str]]

    def metrics(self) -> dict[str, Any]:
        """Les mesures, à plat, pour un résumé en JSON."""
        return {
            "accuracy": self.accuracy.value, "accuracy_low": self.accuracy.low, "accuracy_high": self.accuracy.high,
            "bits_per_byte": self.bits_per_byte, **({} if self.f1 is None else {"f1": self.f1}),
            "n_questions": self.accuracy.n, "n_answers": len(self.answers),
        }


@functools.cache
def questions() -> list[Pair]:
    """Les questions de l’examen et leur réponse de référence : `[(question, réponse)]`.

    Raises:
        LlamaError: une source ne s’obtient pas (`sources.fetch`).
    """
    return [pair for pair, _ in _selected(holdout.questions()[1])]


def multiple_choice(limit: int | None = None) -> list[MultipleChoice]:
    """Le choix multiple, groupe après groupe ; les `GROUP` questions d’un groupe ont les mêmes choix.

    Args:
        limit: questions, au plus, par groupes entiers ; None les rend toutes.

    Raises:
        LlamaError: une source ne s’obtient pas (`sources.fetch`) ; `limit` ne laisse pas un groupe.
    """
    if limit is not None and limit < GROUP:
        raise LlamaError(f"Les questions de l’examen vont par groupes de {GROUP} : limit doit valoir au moins {GROUP}.")
    items = _examination()
    return items[: len(items) if limit is None else limit // GROUP * GROUP]


@functools.cache
def _examination() -> list[MultipleChoice]:
    return build(holdout.questions()[1])


def build(rows: Sequence[Question]) -> list[MultipleChoice]:
    """Le choix multiple que font ces questions ; il ne dépend que d’elles, et aucune n’y est deux fois."""
    selected = _selected(rows)
    pairs, sheets = [pair for pair, _ in selected], [sheet for _, sheet in selected]
    items = []
    for group in sorted(_groups(pairs, sheets), key=lambda group: _draw(pairs[group[0]][0])):
        choices = sorted((pairs[i][1] for i in group), key=_draw)
        items += [MultipleChoice(pairs[i][0], choices, choices.index(pairs[i][1])) for i in group]
    return items


def examine(
    model: nn.Module, tokenizer: Any, *, limit: int | None = None, n_answers: int = 16, max_new_tokens: int = 64,
    batch_size: int = 8, progress: bool = False,
) -> Report:
    """Fait passer l’examen à un modèle.

    Un modèle qui a un gabarit de conversation reçoit les questions par lui ; un autre continue `TEMPLATE`, et sa
    réponse s’arrête à la première fin de ligne.

    Args:
        model: un `LlamaModel`, ou ce qui en a l’interface.
        tokenizer: le sien.
        limit: questions du choix multiple, au plus, par groupes entiers ; None les pose toutes.
        n_answers: questions auxquelles il répond vraiment, réparties sur tout l’examen.
        max_new_tokens: jetons d’une réponse, au plus.
        batch_size: séquences à la fois ; sans effet sur le résultat.
        progress: montrer une barre.

    Raises:
        LlamaError: une source ne s’obtient pas ; `limit` ne laisse pas un groupe.
    """
    items = multiple_choice(limit)
    chat = chat_template(tokenizer) is not None
    ask = _conversation(tokenizer) if chat else prompter(tokenizer, TEMPLATE)
    options = {"batch_size": batch_size, "progress": progress}
    nats = choice_nats(model, tokenizer, items, ask=ask, **options)
    alone = choice_nats(model, tokenizer, items, ask=lambda _: ask(""), **options)
    right = [guess == item.answer for guess, item in zip(choose(items, nats, alone), items, strict=True)]
    n_bytes = sum(len(item.choices[item.answer].encode()) for item in items)
    bits = sum(own[item.answer] for own, item in zip(nats, items, strict=True)) / math.log(2) / n_bytes
    asked = [items[i * len(items) // n_answers] for i in range(min(n_answers, len(items)))]
    answers: list[tuple[str, str, str]] = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start:start + batch_size]
        written = generate(
            model, [ask(item.question) for item in batch], max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id,
            stop=() if chat else ("\n",), tokenizer=tokenizer,
        )
        texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written)
        answers += [(item.question, item.choices[item.answer], text) for item, text in zip(batch, texts, strict=True)]
    f1 = sum(token_f1(text, reference) for _, reference, text in answers) / len(answers) if answers else None
    return Report(grouped_proportion(right, GROUP), bits, f1, answers)


def overlap_choices(items: Sequence[MultipleChoice]) -> list[int]:
    """Le témoin sans modèle : le choix qui a le plus de mots de la question, un mot rare comptant davantage."""
    texts = [text for item in items for text in (item.question, *item.choices)]
    vectors = iter(_vectors(texts))
    chosen = []
    for item in items:
        question, *choices = (next(vectors) for _ in range(1 + len(item.choices)))
        chosen.append(int(np.argmax(np.round([question @ choice for choice in choices], 6))))
    return chosen


def reference(answer: str) -> str | None:
    """La réponse de référence : une ou deux phrases, du premier des deux premiers paragraphes où elles se suffisent.

    « Oui » et « Non », qui trahiraient la forme de la question, sont ôtés. Une liste courte tient en une phrase.
    """
    return next(filter(None, map(_beginning, itertools.islice(_paragraphs(answer), 2))), None)


def _beginning(paragraph: str) -> str | None:
    """Le début d’un paragraphe, s’il se comprend seul."""
    paragraph = re.sub(r"\s*\([^()]*(voir|ci-)[^()]*\)", "", paragraph)
    paragraph = re.sub(r"^(Oui|Non)\b[\s,.:]*", "", paragraph)
    if paragraph.startswith("si "):  # « Oui, si… » n’est plus une phrase
        return None
    text = ""
    for sentence in _sentences(paragraph[:1].upper() + paragraph[1:]):
        longer = f"{text} {sentence}".strip()
        if _REFERS.search(sentence) or len(longer) > LONGEST:
            break
        text = longer
        if len(text) >= ENOUGH:
            break
    whole = len(text) >= SHORTEST and text[-1] == "." and text.count("(") == text.count(")")
    return text if whole and not _CONTINUES.match(text) else None


def _selected(rows: Sequence[Question]) -> list[tuple[Pair, str]]:
    """((question, réponse de référence), fiche) de chaque question qui a une telle réponse, sans redite."""
    found: dict[str, tuple[Pair, str]] = {}
    for row in rows:
        answer = reference(row["réponse"])
        question = row["question"].removeprefix("Questions-réponses | ")
        if answer and answer not in found and len(_words(question) & _words(answer)) <= QUOTED * len(_words(question)):
            found[answer] = (question, answer), row["url"].split("#")[0] or question
    return list(found.values())


def _paragraphs(text: str) -> Iterator[str]:
    """Les paragraphes d’une réponse ; une liste se joint à la phrase qui l’annonce, les titres sont omis."""
    lines = [line.strip() for line in text.split("\n")]
    for i, line in enumerate(lines):
        if line.endswith(":"):
            items = []
            for item in lines[i + 1:]:
                if not item.startswith("- "):
                    break
                item = item[2:].strip().rstrip(" \u00a0,;.")
                items.append(item if item[1:2].isupper() else item[:1].lower() + item[1:])
            if items:
                yield f"{line} " + "\u00a0; ".join(items) + "."
        elif line.endswith((".", "!", "?")) and not line.startswith("- "):
            yield line


def _sentences(paragraph: str) -> Iterator[str]:
    sentence = ""
    for piece in re.split(r"(?<=[.!?])\s+(?=[A-ZÀÂÉÈÊÎÔÇ«(])", paragraph):
        sentence = f"{sentence} {piece}".strip()
        if not _ABBREVIATED.search(sentence):
            yield sentence
            sentence = ""
    if sentence:
        yield sentence


def _groups(pairs: Sequence[Pair], sheets: Sequence[str]) -> list[list[int]]:
    """Les groupes : deux questions libres dont chacune ressemble à la réponse de l’autre, puis deux qui les suivent."""
    texts = map("\n".join, pairs), (question for question, _ in pairs), (answer for _, answer in pairs)
    whole, asked, answered = np.split(_vectors([*itertools.chain(*texts)]), 3)
    close = asked @ answered.T + answered @ asked.T
    lengths = np.array([len(answer) for _, answer in pairs])
    longest, shortest = np.maximum.outer(lengths, lengths), np.minimum.outer(lengths, lengths)
    allowed = (longest <= LENGTHS * shortest) & (whole @ whole.T < TOO_CLOSE)
    allowed &= np.array([[a != b for a in sheets] for b in sheets])
    free, groups = np.ones(len(pairs), dtype=bool), []
    # L’arrondi rend l’ordre indépendant de la machine.
    ranked = np.argsort(-np.where(allowed, close, -1.0).round(6), axis=None, kind="stable")
    for i, j in zip(*np.unravel_index(ranked, close.shape), strict=True):
        group = [int(i), int(j)]
        while len(group) < GROUP and allowed[i, j] and free[group].all():
            candidates = free & allowed[group].all(0)
            if not candidates.any():
                break
            group.append(int(np.argmax(np.where(candidates, close[group].sum(0), -1.0).round(6))))
        if len(group) == GROUP:
            groups.append(group)
            free[group] = False
    return groups


def _vectors(texts: Sequence[str]) -> np.ndarray:
    """TF-IDF (Salton et Buckley 1988), de norme 1 : un mot pèse d’autant plus qu’il est rare. `(N, mots)`."""
    words = [_words(text) for text in texts]
    frequency = Counter(word for own in words for word in own)
    columns = {word: i for i, word in enumerate(sorted(frequency))}
    vectors = np.zeros((len(texts), len(columns)))
    for row, own in enumerate(words):
        for word in own:
            vectors[row, columns[word]] = math.log(len(texts) / frequency[word])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _words(text: str) -> set[str]:
    """Les mots d’un texte, sans les plus courts ni leurs terminaisons."""
    return {word.rstrip("s")[:7] for word in normalize(text) if len(word) > 3}


def _draw(text: str) -> bytes:
    """Un ordre sans rapport avec le sens, toujours le même."""
    return hashlib.sha256(text.encode()).digest()


def _conversation(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda question: tokenizer.encode_chat(
        [{"role": "user", "content": question}], add_generation_prompt=True)[0]
