"""La conversation dans le terminal : `llama chat`. Les échanges s’accumulent, les plus anciens s’oublient."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from .chat import Message
from .config import LlamaError
from .runner import BasicModelRunner

HELP = (
    "/quitter (ou Ctrl-D) : sortir ; /oublier : recommencer ; /historique : relire ; /aide : ceci. "
    "Ctrl-C arrête la réponse en cours."
)


class Conversation:
    """Une conversation avec un modèle.

    Args:
        runner: le modèle ; s’il n’a pas de gabarit de conversation, il continue chaque texte, sans mémoire.
        system: consigne placée en tête.
        max_new_tokens: jetons d’une réponse, au plus.
        **options: voir `BasicModelRunner.stream`.

    Attributes:
        messages: les échanges dont le modèle se souvient.
        forgotten: le nombre d’échanges oubliés, faute de place.
    """

    def __init__(
        self, runner: BasicModelRunner, system: str | None = None, max_new_tokens: int = 128, **options: Any
    ) -> None:
        self.runner, self.max_new_tokens, self.options = runner, max_new_tokens, options
        self.head: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self.forgotten = 0

    def ask(self, question: str) -> Iterator[str]:
        """La réponse, par morceaux ; interrompue, ce qui en est écrit reste dans la conversation."""
        if not self.runner.chat:
            yield from self.runner.stream(question, max_new_tokens=self.max_new_tokens, **self.options)
            return
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            self._forget()
            messages = self.head + self.messages
            for piece in self.runner.stream(messages, max_new_tokens=self.max_new_tokens, **self.options):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def _forget(self) -> None:
        """Oublie les plus anciens échanges tant qu’il n’y a pas la place de répondre."""
        length = self.runner.model.config.block_size
        wanted = length - min(self.max_new_tokens, length // 2)
        while len(self.messages) > 1 and len(self.runner.prompt(self.head + self.messages)) > wanted:
            del self.messages[:2]
            self.forgotten += 1


def converse(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """La boucle du terminal, jusqu’à `/quitter` ou la fin de l’entrée.

    Raises:
        KeyboardInterrupt: Ctrl-C pendant que l’on tape ; pendant une réponse, il ne fait que l’arrêter.
    """
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401 (les flèches retrouvent les lignes déjà tapées)
        except ImportError:
            pass
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = read("vous › " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quitter":
            return
        if line == "/oublier":
            conversation.messages.clear()
        elif line == "/historique":
            for message in conversation.messages:
                print(f"{message['role']} : {message['content']}")
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            _answer(conversation, line)


def _answer(conversation: Conversation, question: str) -> None:
    forgotten = conversation.forgotten
    try:
        for piece in conversation.ask(question):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(réponse interrompue)", file=sys.stderr)
    except LlamaError as error:
        print(error, file=sys.stderr)
    if conversation.forgotten > forgotten:
        print("(le début de la conversation est oublié : elle dépasse ce que ce modèle lit)", file=sys.stderr)
