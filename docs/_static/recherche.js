/* La recherche, sans égard aux accents : le pendant de docs/_ext/recherche.py, et des extraits bien placés. */
"use strict";

if (typeof Search !== "undefined" && window.Stemmer) {
  const stripAccents = (text) => text.normalize("NFD").replace(/\p{M}/gu, "");

  const AccentedStemmer = window.Stemmer;
  window.Stemmer = function () {
    const stemmer = new AccentedStemmer();
    this.stemWord = (word) =>
      stemmer.stemWord(stripAccents(word).replaceAll("œ", "oe").replaceAll("æ", "ae"));
  };

  /* Comme dans Sphinx, mais sur l’article seul, et en trouvant « réseaux » par « reseau ». */
  Search.makeSearchSummary = (html, keywords, anchor) => {
    const spaced = html.replace(/<\/(p|d[td]|li|h\d|div|t[dh]|pre)>/g, " $&"); // textContent colle les blocs
    const page = new DOMParser().parseFromString(spaced, "text/html");
    page.querySelectorAll(".headerlink, script, style, .no-search").forEach((element) => element.remove());
    const target = anchor ? page.getElementById(anchor.slice(1)) : null;
    const scope = target?.matches("dt") ? target.nextElementSibling : target ?? page.querySelector("article");
    const text = (scope?.textContent ?? "").normalize("NFC").replace(/\s+/g, " ").trim();
    if (!text) return null;
    const plain = [...text].map((letter) => stripAccents(letter)[0] ?? letter).join("").toLowerCase();
    const found = [...keywords].map((word) => plain.indexOf(word)).filter((index) => index > -1);
    const before = (found.at(-1) ?? 0) - 120;
    const start = before > 0 ? plain.indexOf(" ", before) + 1 : 0;
    const summary = document.createElement("p");
    summary.classList.add("context");
    summary.textContent =
      (start ? "… " : "") + text.slice(start, start + 240).trim() + (start + 240 < text.length ? " …" : "");
    return summary;
  };
}
