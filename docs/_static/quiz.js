/* Les questionnaires : choisir une réponse montre aussitôt son explication. Sans ce script, les réponses commentées
   restent lisibles sous chaque question. */
"use strict";

for (const quiz of document.querySelectorAll(".quiz")) {
  const score = quiz.querySelector(".quiz-score");
  const questions = [...quiz.querySelectorAll(".quiz-question")];

  const updateScore = () => {
    const answered = questions.filter((question) => question.dataset.etat).length;
    const right = questions.filter((question) => question.dataset.etat === "juste").length;
    const plural = right > 1 ? "s" : "";
    score.hidden = answered === 0;
    score.textContent = `${right} bonne${plural} réponse${plural} sur ${questions.length}`
      + (answered < questions.length ? `, ${questions.length - answered} à faire` : "");
  };

  for (const question of questions) {
    const corrections = [...question.querySelectorAll(".quiz-corrige li")];
    const choices = [...question.querySelectorAll("input")];
    question.querySelector(".quiz-corrige").hidden = true;
    question.addEventListener("change", (event) => {
      const correction = corrections[choices.indexOf(event.target)];
      question.dataset.etat = correction.className;
      question.querySelector(".quiz-retour").replaceChildren(...correction.cloneNode(true).childNodes);
      updateScore();
    });
  }
}
