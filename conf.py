"""Réglages du site. La racine du dépôt est le dossier source : chapitres et carnets y sont côte à côte."""

import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT / "docs" / "_ext"), str(ROOT / "lessons")]

with open(ROOT / "pyproject.toml", "rb") as file:
    PROJECT = tomllib.load(file)["project"]
URLS = PROJECT.get("urls", {})

project = "L’atelier des LLM"
author = "Les auteurs de l’atelier des LLM"
copyright = f"{author}, CC BY-SA 4.0"
version = release = PROJECT["version"]
language = "fr"

# --- Sources ------------------------------------------------------------------------------------------------

root_doc = "index"
include_patterns = ["index.rst", "docs/*.rst", "docs/annexes/*.rst", "docs/api/*.rst", "lessons/*.ipynb"]
source_suffix = {".rst": "restructuredtext", ".ipynb": "myst-nb"}
templates_path = ["docs/_templates"]
suppress_warnings = [
    "epub.unknown_project_files",  # les polices
    "toc.empty_glob",  # tant qu’aucun chapitre n’est écrit
]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_exercise",
    "sphinxcontrib.bibtex",
    "notfound.extension",
    "assets",
    "bibliographie",
    "carnet",
    "credits",
    "docstrings",
    "exercices",
    "lecons",
    "parcours",
    "quiz",
    "recherche",
]

# --- Carnets : tels qu’ils sont dans le dépôt, jamais exécutés par la construction --------------------------

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # par défaut, deux scripts pris chez des tiers
nb_merge_streams = True
nb_code_prompt_show = "Afficher le code"
nb_code_prompt_hide = "Masquer le code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
lecons_depot = URLS.get("Repository", "")

# --- Texte --------------------------------------------------------------------------------------------------

default_role = "py:obj"  # `Config` dans une docstring devient un lien vers sa référence
numfig = True
numfig_secnum_depth = 1
math_numfig = True
numfig_format = {"figure": "Figure %s", "table": "Tableau %s", "section": "Section %s"}
smartquotes_action = "D"  # les tirets seulement : guillemets et espaces insécables sont écrits tels quels
highlight_language = "python3"
bibtex_bibfiles = ["docs/references.bib"]
bibtex_default_style = "francais"
exercise_style = "solution_follow_exercise"  # le titre n’est que « Solution »
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# --- Pages --------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["docs/_static"]
html_css_files = ["atelier.css"]
html_js_files = [("atelier.js", {"defer": "defer"})]
html_favicon = "docs/_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_copy_source = False
html_show_sphinx = False
html_permalinks_icon = "#"
html_theme_options = {
    "logo": {
        "text": project,
        "alt_text": "",
        "image_light": "docs/_static/logo.svg",
        "image_dark": "docs/_static/logo-sombre.svg",
    },
    "navbar_persistent": [],
    "back_to_top_button": False,
    "search_bar_text": "Rechercher dans le cours…",
    "toc_title": "Sur cette page",
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "footer_content_items": "mentions.html",
}
mathjax_path = "mathjax/tex-mml-chtml.js"
mathjax3_config = {
    "options": {"enableMenu": False},  # le menu contextuel de MathJax est en anglais
    "chtml": {"mtextInheritFont": True},  # ses polices n’ont pas nos lettres accentuées
}

# L’adresse publique du site, si pyproject.toml la donne : plan du site et aperçus de partage en dépendent.
html_baseurl = URLS.get("Documentation", "")
notfound_context = {
    "title": "Page introuvable",
    "body": "<h1>Page introuvable</h1><p>Cette adresse ne mène à rien ; voyez le sommaire.</p>",
}
notfound_urls_prefix = urlsplit(html_baseurl).path or "/"
if html_baseurl:
    extensions += ["sphinx_sitemap", "sphinxext.opengraph"]
    sitemap_url_scheme = "{link}"
    ogp_site_url = html_baseurl
    ogp_enable_meta_description = True
    ogp_social_cards = {"enable": False}
