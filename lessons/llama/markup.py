"""D’un balisage (HTML, arbre XML mis en JSON, Markdown) au texte français nu.

Tout devient d’abord des lignes `(niveau, texte)` : niveau 0 pour un paragraphe ou un point de liste (`- …`),
1, 2, 3… pour un titre, -1 pour un point facultatif. `compose` en fait un texte : une ligne par paragraphe,
une ligne vide avant chaque titre, aucun passage redonné dans la même fiche, aucun titre vide, aucun balisage.
Les espaces insécables restent (U+00A0 ; les fines U+202F et U+2009 y sont ramenées), les apostrophes aussi,
droites ou courbes selon la source. Ce que contient chaque source est l’affaire de `sheets`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from html import unescape
from html.parser import HTMLParser

Line = tuple[int, str]

REPEATED_AT = 60  # caractères : un passage plus court (« Montant », « 1 mois ») peut revenir dans une fiche
_INVISIBLE = re.compile("[\u00ad\u200b\u200c\u200d\ufeff\ufffd]")
_SPACES = re.compile("[ \t\r\n\u2028]+")
_HARD_SPACES = re.compile(" ?[\u00a0\u2005\u2009\u202f][ \u00a0\u2005\u2009\u202f]*")
_STRAY_SPACE = re.compile(r" (?=[,.)](\s|$))")
_REFERENCES = re.compile(r"[\W_]*Sources?[\W_]*:|Pour consulter l'intégralité")
_NOTICE = re.compile(r"(À savoir|À noter|Attention|Rappel|Important|Bon à savoir|Exemple)[ \u00a0]*[!:]*")


def tidy(text: str) -> str:
    """Une ligne en NFC, aux espaces simples, sans caractère invisible : `"a \\n b , c"` donne `"a b, c"`."""
    text = unescape(text.replace("&nsbp;", "&nbsp;").replace("_@", "@"))
    text = _SPACES.sub(" ", _INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    return _STRAY_SPACE.sub("", _HARD_SPACES.sub("\u00a0", text)).strip(" \u00a0")


def compose(lines: Iterable[Line]) -> str:
    """Le texte de ces lignes, chaque passage une fois ; vide s’il n’y a que des titres."""
    text = ""
    for level, line in _pruned(_distinct(_kept(lines))):
        text += ("\n\n" if level else "\n") + line
    return text.strip("\n")


def _kept(lines: Iterable[Line]) -> Iterator[Line]:
    """Les lignes non vides ; un point facultatif reste si une ligne en deux-points l’annonce."""
    previous = ""
    for level, text in lines:
        text = tidy(text)
        if text.strip("- ") and (level >= 0 or previous.endswith(":") or previous.startswith("- ")):
            yield max(level, 0), text
            previous = text


def _distinct(lines: Iterable[Line]) -> Iterator[Line]:
    """Sans les passages (un paragraphe avec la liste qui le suit) déjà donnés."""
    groups: list[list[Line]] = []
    for line in lines:
        if groups and line[1].startswith("- ") and not groups[-1][0][0]:
            groups[-1].append(line)
        else:
            groups.append([line])
    seen = set()
    for group in groups:
        passage = tuple(text for _, text in group)
        repeated = passage in seen and sum(map(len, passage)) >= REPEATED_AT and not group[0][0]
        seen.add(passage)
        if not repeated:
            yield from group


def _pruned(lines: Iterable[Line]) -> list[Line]:
    """Sans les titres que rien ne suit, ni les phrases qui annoncent une liste absente."""
    kept: list[Line] = []
    for level, text in reversed(list(lines)):
        next_level = kept[-1][0] if kept else 1
        dangling = text.endswith(":") and not text.startswith("- ") if not level else next_level <= level
        if not (dangling and next_level):
            kept.append((level, text))
    return kept[::-1]


def _row(cells: list[str]) -> str:
    """Une rangée de tableau : `["6 mois", "8 jours", ""]` donne `"- 6 mois : 8 jours"`."""
    filled = [cell for cell in map(tidy, cells) if cell]
    return "- " + "\u00a0: ".join([filled[0], "\u00a0; ".join(filled[1:])] if filled[1:] else filled)


class _Html(HTMLParser):
    """Lignes d’un fragment HTML, sans cartes, vidéos ni blocs qui ne sont qu’un lien."""

    BREAKS = frozenset(
        "p li ul ol div section br hr table tr caption blockquote h2 h3 h4 h5 h6 button".split())
    VOID = frozenset("br hr img input".split())
    SKIPPED = re.compile(r"\b(fr-card|fr-tags-group|fr-link__detail|ondine-links-list|ondine-linked-pages|"
                         r"youtube_player|paragraph--type--insert-video|blocs_invisible)(\s|$)")

    def __init__(self, level: int) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.text, self.linked, self.links, self.skip = "", 0, 0, 0
        self.base, self.level, self.bullet, self.notice = level, 0, False, ""
        self.cells: list[str] | None = None

    def flush(self) -> None:
        text, linked, self.text, self.linked = tidy(self.text), self.linked, "", 0
        if not text:
            return
        if self.cells is not None:
            self.cells[-1:] = [f"{self.cells[-1]} {text}"] if self.cells else [text]
        elif self.level and _NOTICE.fullmatch(text):
            self.notice = text.rstrip("!:\u00a0 ")
        elif self.level:
            self.lines.append((self.level, text))
        elif linked < len(text.strip(" .;,")):  # sinon le bloc n’est qu’un lien
            notice = f"{self.notice}\u00a0: " if self.notice else ""
            self.lines.append((0, ("- " if self.bullet else "") + notice + text))
            self.bullet, self.notice = False, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skip or tag in ("figure", "script") or self.SKIPPED.search(dict(attrs).get("class") or ""):
            self.skip += tag not in self.VOID
            return
        if tag in self.BREAKS:
            self.flush()
        self.links += tag == "a"
        if tag == "li":
            self.bullet = True
        elif tag == "tr":
            self.cells = []
        elif tag in ("td", "th") and self.cells is not None:
            self.flush()
            self.cells.append("")
        elif re.fullmatch("h[2-6]", tag):
            self.level, self.bullet, self.notice = self.base + int(tag[1]) - 2, False, ""

    def handle_endtag(self, tag: str) -> None:
        if self.skip:
            self.skip -= tag not in self.VOID
            return
        if tag in self.BREAKS or tag in ("td", "th"):
            self.flush()
        self.links -= tag == "a"
        if tag == "li":
            self.bullet = False
        elif tag == "tr" and self.cells is not None:
            self.lines.append((0, _row(self.cells)))
            self.cells = None
        elif re.fullmatch("h[2-6]", tag):
            self.level = 0

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.text += data
            self.linked += len(tidy(data)) if self.links else 0


def html_lines(html: str, level: int = 1) -> list[Line]:
    """Lignes d’un fragment HTML ; un `h2` y est un titre de niveau `level`."""
    parser = _Html(level)
    parser.feed(html)
    parser.close()
    parser.flush()
    return parser.lines


def markdown_lines(markdown: str) -> Iterator[Line]:
    """Lignes du Markdown des contributions : onglets `<Tab>`, gras, liens ; sans les renvois « Sources »."""
    tab, source = 0, False
    for line in markdown.replace("\\*", "*").splitlines():
        opened = re.match(r'<Tab title="(.*)">', line)
        source = bool(line.strip()) and (source or _REFERENCES.match(line) is not None)
        line = re.sub(r"<[^>]*>|\*\*|(?<!\w)_|_(?!\w)", "", line)
        line = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)
        heading = re.match(r"#+\s*(.*)", line)
        if opened:
            tab = 2
            yield 2, opened[1]
        elif heading:
            yield (3 if tab else 1), heading[1]
        elif not source:
            yield 0, re.sub(r"^\s*- ?", "- ", line).removeprefix(">")


def _inline(node: dict) -> str:
    """Texte d’un paragraphe. La conversion depuis le XML a perdu les espaces entre deux éléments voisins."""
    text, previous = "", {}
    for child in node.get("children", []):
        if child.get("name") == "Image":
            continue
        piece = child["text"] if child["type"] == "text" else _inline(child)
        touching = text[-1:].strip() and piece[:1].strip() and child.get("name") not in ("Exposant", "Indice")
        glued = touching and text[-1].isalnum() and piece[0].isalnum() and (_whole(child) or _whole(previous))
        text += (" " if glued or touching and "name" in child and "name" in previous else "") + piece
        previous = child
    return text


def _whole(node: dict) -> bool:
    """Un montant ou un sigle ne se colle jamais au mot voisin."""
    return node.get("name") == "Valeur" or node.get("attributes", {}).get("type") == "Acronyme"


def _title(node: dict) -> str:
    return " ".join(_inline(child) if "name" in child else child["text"] for child in node["children"])


def tree_lines(node: dict, level: int = 1) -> Iterator[Line]:
    """Lignes d’une fiche de service-public.fr ; les éléments qui ne portent pas de texte sont ignorés."""
    name, children = node.get("name"), node.get("children", [])
    if name == "Paragraphe":
        text = tidy(_inline(node))
        bold = len(children) == 1 and children[0].get("name") == "MiseEnEvidence"
        yield (9 if bold and re.search(r"[^\W\d][)\u00a0?]*$", text) and 4 < len(text) < 80 else 0), text
    elif name in ("Chapitre", "SousChapitre", "Cas", "Situation"):
        for child in children:
            titled = child.get("name") == "Titre"
            yield from [(level, _title(child))] if titled else tree_lines(child, level + 1)
    elif name == "Liste":
        for item in children:
            bullet = "- "
            for kind, text in _inside(item):
                yield min(kind, 0), text if text.startswith("- ") else bullet + text
                bullet = ""
    elif name == "Tableau":
        for child in children:
            if child.get("name") == "Titre":
                yield 0, _title(child)
            elif child.get("name") == "Rangée":
                yield 0, _row([" ".join(text for _, text in _inside(cell)) for cell in child["children"]])
    elif name in ("ASavoir", "ANoter", "Attention", "Rappel"):
        notice = "".join(f"{_title(child)}\u00a0: " for child in children if child.get("name") == "Titre")
        for kind, text in _inside(node):
            yield min(kind, 0), notice + text
            notice = ""
    elif name in ("ServiceEnLigne", "OuSAdresser"):
        yield from ((-1, "- " + _title(child)) for child in children if child.get("name") == "Titre")
    elif name in ("Texte", "Introduction", "ListeSituations", "BlocCas", "FragmentConditionne", "Contenu",
                  "ContenuIllustre"):
        yield from (line for child in children for line in tree_lines(child, level))


def _inside(node: dict) -> Iterator[Line]:
    return (line for child in node.get("children", []) for line in tree_lines(child))
