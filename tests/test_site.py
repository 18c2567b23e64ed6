"""Le site construit (`make html`), tel qu’un lecteur le voit : mêmes pages, vrai navigateur, aucun tiers."""

from __future__ import annotations

import functools
import re
import threading
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build/html"
LESSONS = sorted(path.stem for path in (ROOT / "docs").glob("[01]*.rst"))
PAGES = [
    "index", *(f"docs/{stem}" for stem in LESSONS), *(f"lessons/{stem}" for stem in LESSONS),
    "docs/annexes/glossaire", "docs/annexes/bibliographie", "docs/annexes/mentions", "docs/api/config", "search",
]
QUIZ_PAGES = [f"docs/{path.stem}" for path in sorted((ROOT / "docs/quiz").glob("*.yaml"))]
ENGLISH = re.compile(
    r"\b(the|and|toggle|search|previous|next|skip|contents?|back|link|permalink|copy|click|show|hide|download|light|"
    r"dark|edit|collapse|expand|home|settings|exercise|not found|source code|table of)\b", re.IGNORECASE)

pytestmark = pytest.mark.navigateur


class Page(HTMLParser):
    """Ce qu’une page construite demande, désigne et nomme."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.ids, self.links, self.resources = path, set(), [], []
        self.images, self.labels, self.lang = [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        self.labels += [found[key] for key in ("title", "aria-label", "placeholder") if found.get(key)]
        if tag == "html":
            self.lang = found.get("lang")
        elif tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.resources.append(found["src"])
        elif tag == "link" and found.get("rel") not in ("canonical", "index", "search", "next", "prev", None):
            self.resources.append(found["href"])
        if tag == "img":
            self.images.append((found.get("src"), found.get("alt")))


@functools.cache
def parse(path: Path) -> Page:
    return Page(path)


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    if not (SITE / "index.html").is_file():
        pytest.fail("Le site n’est pas construit : lancez d’abord « make html ».")
    return [parse(path) for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts]


# --- Ce que disent les fichiers ------------------------------------------------------------------------------


def test_every_lesson_has_its_two_pages(pages):
    assert LESSONS
    names = {page.path.relative_to(SITE).with_suffix("").as_posix() for page in pages}
    assert set(PAGES) <= names


def test_internal_links_lead_somewhere(pages):
    broken = []
    for page in pages:
        for link in page.links + page.resources:
            address, anchor = urldefrag(link)
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            path = unquote(parts.path)
            base = SITE if path.startswith("/") else page.path.parent  # la page 404 a des adresses absolues
            target = (base / path.lstrip("/")).resolve() if path else page.path
            if not target.exists() or anchor and target.suffix == ".html" and unquote(anchor) not in parse(target).ids:
                broken.append(f"{page.path.relative_to(SITE)} → {link}")
    assert not broken


def test_pages_name_no_third_party_resource(pages):
    external = [(page.path.name, address) for page in pages for address in page.resources
                if urlsplit(address).netloc and not address.startswith("data:")]
    styles = [path for path in SITE.rglob("*.css") if re.search(r"url\(\W*(https?:)?//", path.read_text())]
    assert (external, styles) == ([], [])


def test_images_say_what_they_show(pages):
    silent = [(page.path.name, source) for page in pages for source, alt in page.images
              if alt is None or re.search(r"\.(png|svg)$", alt) or not alt and "logo" not in source]
    assert not silent


def test_pages_are_in_french(pages):
    assert {page.lang for page in pages} == {"fr"}
    labels = {label for page in pages for label in page.labels if not label.startswith("llama")}
    citations = {label for label in labels if re.search(r"[.,] \d{4}\.", label)}  # des titres anglais
    assert not {label for label in labels - citations if ENGLISH.search(label)}
    for page in pages:
        html = page.path.read_text(encoding="utf-8")
        frame = re.sub(r"<(article|script|style|title|code)\b.*?</\1>|<!--.*?-->", " ", html, flags=re.DOTALL)
        words = re.sub(r"<[^>]+>", " ", frame)
        leftovers = {match[0] for match in ENGLISH.finditer(words)}
        assert not leftovers, page.path


def test_every_page_says_it_gives_no_legal_advice(pages):
    for page in pages:
        assert "ne donne pas de conseil juridique" in page.path.read_text(encoding="utf-8"), page.path


def test_every_module_has_its_reference(pages):
    modules = {path.stem for path in (ROOT / "lessons/llama").glob("*.py") if not path.stem.startswith("__")}
    assert modules <= {page.path.stem for page in pages if page.path.parent.name == "api"}


@pytest.mark.parametrize("stem", LESSONS)
def test_lesson_links_to_its_notebook_and_back(pages, stem):
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    path = urlsplit(repository).path.strip("/")
    colab = f"https://colab.research.google.com/github/{path}/blob/main/lessons/{stem}.ipynb"
    chapter, notebook = parse(SITE / f"docs/{stem}.html"), parse(SITE / f"lessons/{stem}.html")
    for page, other in ((chapter, f"../lessons/{stem}.html"), (notebook, f"../docs/{stem}.html")):
        assert other in page.links
        assert colab in page.links
        [download] = {link for link in page.links if link.endswith(f"/{stem}.ipynb") and "://" not in link}
        copy = (page.path.parent / download).resolve()
        assert copy.read_bytes() == (ROOT / f"lessons/{stem}.ipynb").read_bytes()


# --- Ce que montre un navigateur -----------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Rien : les requêtes ne sont pas l’affaire du rapport d’essais."""


@pytest.fixture(scope="module")
def address(pages) -> Iterator[str]:
    """Le site, servi sur cette machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def visit(browser, address):
    """`visit(page, …)` ouvre une page et la rend ; à la fin, aucune requête n’est partie ailleurs."""
    contexts, requests, errors = [], [], []

    def open_page(name: str, *, origin: str = address, width: int = 1440, theme: str = "light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{origin}/{name}")
        page.wait_for_load_state("networkidle")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith((address, "file:", "data:", "blob:"))] == []
    assert errors == []


OVERFLOWING = """() => {
  const limit = document.documentElement.clientWidth + 1;
  const clipped = (element) => element && element !== document.body
    && (getComputedStyle(element).overflowX !== "visible" || clipped(element.parentElement));
  return [...document.querySelectorAll("article *")]
    .filter((element) => element.checkVisibility() && element.getBoundingClientRect().right > limit)
    .filter((element) => !clipped(element) && !element.closest("mjx-assistive-mml, .visually-hidden"))
    .map((element) => element.outerHTML.slice(0, 120));
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_and_is_accessible(visit, name, width, theme):
    page = visit(f"{name}.html", width=width, theme=theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(OVERFLOWING) == []
    violations = Axe().run(page).response["violations"]
    serious = [(found["id"], found["nodes"][0]["html"]) for found in violations
               if found["impact"] in ("serious", "critical")]
    assert serious == []


@pytest.mark.parametrize("stem", LESSONS)
def test_math_is_drawn_with_our_copy(visit, stem):
    page = visit(f"docs/{stem}.html")
    page.wait_for_selector("mjx-container")
    assert page.locator("mjx-merror").count() == 0
    assert page.locator(".math").count() == page.locator("mjx-container").count()
    assert page.evaluate("document.fonts.check('16px \"Source Sans 3\"')")


def results(page) -> set[str]:
    page.wait_for_function("document.querySelector('#search-results')?.textContent.includes('recherche')")
    page.wait_for_load_state("networkidle")
    links = page.locator("#search-results li > a").evaluate_all("links => links.map(link => link.pathname)")
    return set(links)


@pytest.mark.parametrize(("plain", "accented"), [
    ("lecon", "leçons"), ("reseaux", "réseaux"), ("preentrainement", "pré-entraînement"), ("coeurs", "cœurs"),
])
def test_search_ignores_accents(visit, plain, accented):
    found = results(visit(f"search.html?q={plain}"))
    assert found
    common = found & results(visit(f"search.html?q={accented}"))
    assert len(common) >= 0.8 * len(found)


def test_search_finds_the_lesson_and_quotes_it(visit):
    page = visit("search.html?q=preentrainement")
    assert "/docs/04_preentrainement.html" in results(page)
    excerpt = page.locator("#search-results li", has=page.locator("a[href*='04_preentrainement']")).first
    text = excerpt.locator(".context").inner_text()
    assert len(text) > 100 and "Paramètres système" not in text


def test_search_dialog_opens_by_keyboard(visit):
    page = visit("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("perplexite")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=perplexite")
    assert any(link.startswith("/docs/annexes/glossaire") for link in results(page))


@pytest.mark.parametrize("name", QUIZ_PAGES)
def test_quiz_by_keyboard(visit, name):
    page = visit(f"{name}.html")
    quiz = page.locator(".quiz").first
    questions = quiz.locator("fieldset")
    first = questions.first
    assert quiz.locator(".quiz-corrige:visible").count() == 0
    first.locator("input").first.focus()
    page.keyboard.press("Space")
    feedback = first.locator("[role=status]")
    letters = []
    for _ in range(first.locator("input").count()):
        chosen = first.locator("input:checked").get_attribute("value")
        text = feedback.inner_text()
        letters.append(text[:1])
        assert text.startswith(f"{chosen}. ") and re.match(r"[a-h]\. (Juste|Faux)\. .{20}", text)
        right = "Juste" in text
        assert f"{int(right)} bonne réponse sur {questions.count()}" in quiz.locator(".quiz-score").inner_text()
        page.keyboard.press("ArrowDown")
    assert letters == sorted(set(letters)), "chaque réponse a montré la sienne"
    page.keyboard.press("Tab")
    assert questions.nth(1).locator("input").first.evaluate("input => input === document.activeElement")


@pytest.mark.parametrize("name", QUIZ_PAGES)
def test_quiz_without_javascript(visit, name):
    page = visit(f"{name}.html", java_script_enabled=False)
    question = page.locator(".quiz fieldset").first
    assert not question.locator(".quiz-corrige li").first.is_visible()
    question.locator("summary").click()
    assert question.locator(".quiz-corrige li").first.is_visible()


@pytest.mark.parametrize("stem", LESSONS)
def test_solutions_unfold_by_keyboard(visit, stem):
    page = visit(f"docs/{stem}.html")
    solutions = page.locator("details.solution")
    assert solutions.count() >= 5
    summary = solutions.first.locator("> summary")
    content = solutions.first.locator("> :not(summary)").first
    assert not content.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert content.is_visible()


def test_copy_buttons_speak_french(visit):
    page = visit("docs/annexes/contribuer.html")
    labels = page.locator(".copybtn").evaluate_all("buttons => buttons.map(button => button.dataset.tooltip)")
    assert set(labels) == {"Copier"}


@pytest.mark.parametrize("name", QUIZ_PAGES)
def test_page_works_straight_from_the_disk(visit, name):
    page = visit(f"{name}.html", origin=SITE.as_uri())
    page.wait_for_selector("mjx-container")
    page.locator(".quiz input").first.check()
    assert page.locator(".quiz [role=status]").first.inner_text()
