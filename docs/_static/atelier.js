/* Une équation plus large que la page se fait défiler aussi au clavier. */
"use strict";

document.addEventListener("DOMContentLoaded", async () => {
  await window.MathJax?.startup?.promise;
  for (const equation of document.querySelectorAll("mjx-container[display], div.math")) {
    if (equation.scrollWidth > equation.clientWidth + 1) equation.tabIndex = 0;
  }
});
