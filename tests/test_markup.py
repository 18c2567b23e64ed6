"""`markup` : du balisage au texte nu, sans rien perdre, sans rien redonner."""

import pytest

from llama.markup import compose, html_lines, markdown_lines, tidy, tree_lines


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("  un\n\t deux  ", "un deux"),
        ("montants , puis", "montants, puis"),
        ("12\u202f000\u2009€ \u00a0 net", "12\u00a0000\u00a0€\u00a0net"),
        ("cé\u00adsu\u200bre\ufeff", "césure"),
        ("e\u0301te\u0301", "été"),
        ("Droits &amp; d&eacute;marches&nsbp;: l&#039;essentiel", "Droits & démarches\u00a0: l'essentiel"),
        ("nom_@ministere.fr", "nom@ministere.fr"),
        ("etc ...", "etc ..."),
    ],
)
def test_tidy(raw, clean):
    assert tidy(raw) == clean


def test_compose_separates_headings_and_paragraphs():
    assert compose([(1, "A"), (0, "un"), (0, "- x"), (2, "B"), (0, "deux")]) == "A\nun\n- x\n\nB\ndeux"


def test_compose_drops_headings_without_text():
    assert compose([(1, "Vide"), (2, "Vide aussi"), (1, "Plein"), (2, "Sous"), (0, "texte"), (1, "Fin")]) == (
        "Plein\n\nSous\ntexte"
    )
    assert compose([(1, "Rien"), (0, "  "), (0, "- ")]) == ""


def test_compose_gives_a_passage_once():
    passage = [(0, "Le dossier comprend les pièces suivantes, à remettre en mairie :"), (0, "- le plan")]
    text = compose([(1, "En ligne"), *passage, (1, "Sur place"), *passage, (1, "Coût"), (0, "Gratuit.")])
    assert text.count("Le dossier comprend") == 1 and "Sur place" not in text and text.endswith("Gratuit.")


def test_compose_keeps_short_repeats_and_different_lists():
    text = compose([(1, "A"), (0, "Gratuit."), (1, "B"), (0, "Gratuit.")])
    assert text.count("Gratuit.") == 2
    opening = "Le salarié a droit aux congés qui figurent dans la liste qui suit, sans condition :"
    text = compose([(0, opening), (0, "- naissance"), (0, opening), (0, "- mariage")])
    assert text.count(opening) == 2


def test_compose_keeps_optional_items_only_when_announced():
    lines = [(0, "Un texte."), (-1, "- un service"), (0, "Utilisez le service :"), (-1, "- e-création")]
    assert compose(lines) == "Un texte.\nUtilisez le service :\n- e-création"


def test_compose_drops_an_announcement_of_nothing():
    assert compose([(0, "Il faut :"), (1, "Délai"), (0, "Un mois.")]) == "Délai\nUn mois."
    assert compose([(0, "Il faut :"), (0, "un plan.")]) == "Il faut :\nun plan."


def test_html_prose_lists_and_headings():
    html = (
        "<h3>Les <strong>congés</strong> payés</h3><p>Le salarié&nbsp;: <em>cinq</em> semaines<br>par an</p>"
        "<ul><li><p>un</p></li><li>deux<ul><li>trois</li></ul></li></ul>fin"
    )
    assert html_lines(html) == [
        (2, "Les congés payés"),
        (0, "Le salarié\u00a0: cinq semaines"),
        (0, "par an"),
        (0, "- un"),
        (0, "- deux"),
        (0, "- trois"),
        (0, "fin"),
    ]


def test_html_tables_are_rows():
    html = (
        "<table><tr><th>Ancienneté</th><th>Préavis</th></tr><tr><td><p>6 mois</p></td><td>1 mois</td>"
        "<td>oui</td></tr><tr><td>seul</td><td></td></tr></table>"
    )
    assert [text for _, text in html_lines(html)] == [
        "- Ancienneté\u00a0: Préavis",
        "- 6 mois\u00a0: 1 mois\u00a0; oui",
        "- seul",
    ]


def test_html_skips_cards_videos_and_links_alone():
    html = (
        '<p>Avant</p><div class="x fr-card y"><img src="a"><div><p>Carte<br>deux</p></div></div>'
        '<ul><li><a href="u">Un lien</a> ;</li><li>Voir <a href="u">la loi</a></li></ul>'
        '<div class="fr-content-media youtube_player"><p>Vidéo</p></div><p>Après</p>'
    )
    assert [text for _, text in html_lines(html)] == ["Avant", "- Voir la loi", "Après"]


def test_html_notice_joins_its_text():
    html = '<div class="x"><h3><strong>À savoir</strong> <strong>! </strong></h3><p>Un mois.</p></div>'
    assert html_lines(html) == [(0, "À savoir\u00a0: Un mois.")]


def test_markdown_of_contributions():
    markdown = (
        "#### 1. Durée\n\nLe **CDI** dure _toujours_ :\n\n- Cadres : 3&nbsp;mois ;\n  - sauf accord\\* ;\n\n"
        "_Sources_ :\n[Article L1](https://exemple.fr)\n[Article L2](https://exemple.fr)\n\n"
        '<Tab title="CDD">\n\n#### 2. Suite\n\n[Le code](https://exemple.fr) le dit.\n\n</Tab>\n'
        "<HDN>\n\nFin.\n"
    )
    assert compose(markdown_lines(markdown)) == (
        "1. Durée\nLe CDI dure toujours :\n- Cadres : 3\u00a0mois ;\n- sauf accord* ;\n\n"
        "CDD\n\n2. Suite\nLe code le dit.\nFin."
    )


def element(name, *children, **attributes):
    """Un nœud de l’arbre, comme xml-js les écrit."""
    nodes = [{"type": "text", "text": child} if isinstance(child, str) else child for child in children]
    return {"type": "element", "name": name, "attributes": attributes, "children": nodes}


def text_of(*children):
    return compose(tree_lines(element("Texte", *children)))


@pytest.mark.parametrize(
    "children, line",
    [
        (["La 1", element("Exposant", "re"), " fois"], "La 1re fois"),
        (["le 2", element("Exposant", "e"), element("LienIntra", "jour ouvré"), "."], "le 2e jour ouvré."),
        ([element("MiseEnEvidence", "vous"), element("LienInterne", "modifiez")], "vous modifiez"),
        (["la", element("LienInterne", "CRDS", type="Acronyme"), "et la CSG"], "la CRDS et la CSG"),
        (["soit", element("Valeur", "75\u00a0€"), "."], "soit 75\u00a0€."),
        ([element("Expression", "authentiqu"), "e"], "authentique"),
        (["sans ", element("Image", element("Legende", "photo")), "image"], "sans image"),
    ],
)
def test_tree_inline(children, line):
    assert text_of(element("Paragraphe", *children)) == line


def test_tree_sections_lists_tables_and_boxes():
    def paragraph(text):
        return element("Paragraphe", text)

    def cell(text):
        return element("Cellule", paragraph(text))

    text = text_of(
        element(
            "Chapitre",
            element("Titre", paragraph("Démarche")),
            paragraph("Il faut :"),
            element("Liste", element("Item", paragraph("un plan")), element("Item", paragraph("un titre"))),
            element("ServiceEnLigne", element("Titre", "e-permis"), element("Source", "Ministère")),
        ),
        element(
            "BlocCas",
            element(
                "Cas",
                element("Titre", "À Paris"),
                paragraph("Gratuit."),
                element("OuSAdresser", element("Titre", "Mairie")),
            ),
        ),
        element("Tableau", element("Colonne"), element("Rangée", cell("6 mois"), cell("8 jours"))),
        element("ANoter", element("Titre", "À noter"), paragraph("le délai est court.")),
        element("Definition", element("Titre", "caché")),
    )
    assert text == (
        "Démarche\nIl faut :\n- un plan\n- un titre\n- e-permis\n\nÀ Paris\nGratuit.\n"
        "- 6 mois\u00a0: 8 jours\nÀ noter\u00a0: le délai est court."
    )


def test_tree_bold_line_is_a_heading():
    bold = element("Paragraphe", element("MiseEnEvidence", "Montant de l'aide"))
    phone = element("Paragraphe", element("MiseEnEvidence", "39 39"))
    assert text_of(
        element("Paragraphe", "Début."), bold, element("Paragraphe", "Dix euros."), phone, bold
    ) == ("Début.\n\nMontant de l'aide\nDix euros.\n39 39")
