"""`BasicModelRunner` : charger un modèle, l’interroger, l’affiner sur ses propres questions, mesurer le progrès.

La même interface que le service du même nom, mais tout se fait ici, sur cette machine : rien ne part ailleurs.
Ce module enchaîne les autres (`pretrained`, `data`, `lora`, `training`, `evaluation`, `generation`) et n’ajoute
aucun calcul.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import pretrained
from .assembly import chat_template, folded, load, with_chat_template
from .chat import Message
from .config import LlamaError, TrainingConfig
from .data import Examples, check_vocabulary, question_examples
from .evaluation import exact_match, token_f1
from .generation import generate, stream
from .history import History
from .lora import LoRALinear, adapter_names, add_lora, save_adapter
from .questions import QuestionSet
from .readers import Pair
from .training import mean_loss, train
from .workbench import find_device

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_RATE, FULL_RATE = 1e-3, 1e-4
MAX_EXAMPLE = 512
"""Jetons d’un exemple d’affinage, au plus : la mémoire et le temps suivent le plus long."""
WATCHED = 32
"""Questions mises de côté que l’entraînement surveille, au plus : ses évaluations restent courtes."""


@dataclass(frozen=True)
class FineTuning(TrainingConfig):
    """Les réglages d’un affinage, adaptateur compris : une reprise doit avoir le même.

    Args:
        lora: `rank`, `alpha` et `targets` du LoRA entraîné ; None si tous les poids le sont.
    """

    lora: dict[str, Any] | None = None


class BasicModelRunner(QuestionSet):
    """Un modèle et son tokenizer, prêts à répondre et à apprendre, sur cette machine.

    Args:
        model_name: un nom du Hub (`"meta-llama/Llama-2-7b-hf"`), un dossier (modèle, ou adaptateur LoRA), un
            fichier GGUF, ou un nom de `sources` (`"smollm2"`).
        device: `"auto"` (le GPU s’il y en a un), `"cpu"` ou `"cuda"`.
        val_fraction: part des questions chargées qui sont mises de côté pour évaluer (`QuestionSet`).
        seed: graine de cette mise de côté.

    Attributes:
        model: le `LlamaModel`.
        tokenizer: celui qui voyage avec lui.
        history: l’historique du dernier `train`.

    Raises:
        LlamaError: modèle absent, protégé ou illisible ; le message dit comment en sortir.
    """

    def __init__(
        self, model_name: str | Path, *, device: str = "auto", val_fraction: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__(val_fraction, seed)
        place = find_device(device)
        self.model, self.tokenizer = load(model_name)
        self.model.to(place).eval()
        self.history: History | None = None
        self._before: dict[str, float] = {}
        self._measured: list[Pair] = []

    @property
    def chat(self) -> bool:
        """Ce modèle converse-t-il ? Sinon, il continue les textes."""
        return chat_template(self.tokenizer) is not None

    def __call__(self, text: str | Sequence[str], **options: Any) -> str | list[str]:
        """La même chose que `predict`."""
        return self.predict(text, **options)

    def predict(
        self, text: str | Sequence[str], *, max_new_tokens: int = 128, batch_size: int = 8, seed: int = 0,
        **options: Any,
    ) -> str | list[str]:
        """Répond à une question ; à une liste, par une liste.

        Args:
            text: une question ou plusieurs ; si le modèle ne converse pas, des débuts de texte à continuer.
            max_new_tokens: jetons écrits au plus.
            batch_size: questions passées à la fois ; sans effet sur les réponses.
            seed: graine, si `temperature` n’est pas nulle.
            **options: `stop`, et les champs de `generation.Sampling` (`temperature`, `top_k`, `top_p`…).

        Raises:
            LlamaError: texte vide, ou trop long pour le modèle ; réglage impossible.
        """
        texts = [text] if isinstance(text, str) else text
        answers = self._answers([self.prompt(item) for item in texts], max_new_tokens, batch_size, seed, **options)
        return answers[0] if isinstance(text, str) else answers

    def stream(
        self, text: str | Sequence[Message], *, max_new_tokens: int = 128, raw: bool = False, **options: Any
    ) -> Iterator[str]:
        """Comme `predict`, par morceaux ; une liste de messages est une conversation, `raw` un texte à continuer."""
        ids = self.prompt(text, raw)
        limit = min(max_new_tokens, self._room(ids))
        yield from stream(
            self.model, ids, self.tokenizer, max_new_tokens=limit, eos_id=self.tokenizer.eos_id, **options
        )

    def prompt(self, text: str | Sequence[Message], raw: bool = False) -> list[int]:
        """Les jetons que le modèle lit avant de répondre ; voir `stream`."""
        if isinstance(text, str) and not text.strip():
            raise LlamaError("Le texte est vide : posez une question, ou donnez le début d’un texte.")
        if isinstance(text, str) and (raw or not self.chat):
            return self.tokenizer.encode_document(text)
        return self._question(text)

    def _question(self, text: str | Sequence[Message]) -> list[int]:
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return self._chat_tokenizer.encode_chat(messages, add_generation_prompt=True)[0]

    def _answers(
        self, prompts: list[list[int]], max_new_tokens: int, batch_size: int, seed: int = 0, **options: Any
    ) -> list[str]:
        limits = [min(max_new_tokens, self._room(ids)) for ids in prompts]
        answers = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            written = generate(
                self.model, prompts[rows], max_new_tokens=max(limits[rows]), seed=seed + start,
                eos_id=self.tokenizer.eos_id, tokenizer=self.tokenizer, **options,
            )
            # La place d’une réponse ne dépend pas de ses voisines.
            answers += [ids[:limit] for ids, limit in zip(written, limits[rows], strict=True)]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

    def _room(self, ids: Sequence[int]) -> int:
        length = self.model.config.block_size
        if len(ids) >= length:
            raise LlamaError(
                f"Texte trop long : {len(ids)} jetons, et ce modèle en lit {length}, réponse comprise ; "
                "raccourcissez-le."
            )
        return length - len(ids)

    def train(
        self, is_public: bool = False, *, full: bool = False, rank: int = 16, alpha: float = 32.0,
        targets: Sequence[str] = ATTENTION, gradient_checkpointing: bool = False, out: Path | str | None = None,
        progress: bool = True, **settings: Any,
    ) -> History:
        """Affine le modèle sur les questions chargées, ici, et s’arrête quand il ne progresse plus.

        Args:
            is_public: accepté, et ne fait rien : le modèle reste sur cette machine.
            full: entraîner tous les poids, au lieu d’un LoRA.
            rank: rang du LoRA.
            alpha: son échelle.
            targets: les couches qu’il adapte.
            gradient_checkpointing: recalculer les activations au lieu de les garder.
            out: dossier des points de reprise.
            progress: montrer la barre.
            **settings: champs de `TrainingConfig` ; par défaut 60 pas de 4 questions, évalués six fois, arrêtés
                après trois évaluations sans progrès.

        Returns:
            L’historique ; le modèle a ses meilleurs poids.

        Raises:
            LlamaError: trop peu de questions, réglage impossible.
        """
        steps = settings.get("steps", 60)
        defaults = {"steps": steps, "batch_size": 4, "learning_rate": FULL_RATE if full else LORA_RATE, "patience": 3,
                    "eval_every": max(1, steps // 6)}
        config = TrainingConfig.from_dict(defaults | settings)
        training, held_out = self.parts()
        watched = random.Random(self.seed).sample(held_out, min(len(held_out), WATCHED))
        data, val = self._examples(training), self._examples(watched)
        if self._measured is not held_out:
            self.evaluate()
        self.frozen = True
        if full:
            self.model = folded(self.model).requires_grad_(True)
        elif not adapter_names(self.model):
            add_lora(self.model, rank, alpha, targets, seed=config.seed)
        config = FineTuning(**config.to_dict(), lora=self._lora())
        self.model.gradient_checkpointing = gradient_checkpointing
        self.history = train(self.model, data, config, val=val, out=out, progress=progress)
        self.model.eval()
        self.tokenizer = self._chat_tokenizer
        return self.history

    def _lora(self) -> dict[str, Any] | None:
        layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, LoRALinear)}
        adapters = {path: layer.adapters[layer.active] for path, layer in layers.items() if layer.active}
        if not adapters:
            return None
        first, targets = next(iter(adapters.values())), {path.rpartition(".")[2] for path in adapters}
        return {"rank": first.rank, "alpha": first.alpha, "targets": sorted(targets)}

    def evaluate(self) -> dict[str, float]:
        """Mesure le modèle sur les questions mises de côté ; voir `measure`.

        Returns:
            Les mesures ; après `train`, celles d’avant aussi, sous `loss_before`, `perplexity_before`…
        """
        self._measured = self.parts()[1]
        metrics = self.measure(self._measured)
        if self.history is None:
            self._before = {f"{name}_before": value for name, value in metrics.items() if not name.startswith("n_")}
            return metrics
        return metrics | self._before

    def measure(
        self, pairs: Sequence[Pair], *, n_answers: int = 16, max_new_tokens: int = 64, batch_size: int = 8
    ) -> dict[str, float]:
        """Mesure le modèle sur des questions dont on sait la réponse.

        Args:
            pairs: (question, réponse).
            n_answers: questions auxquelles il répond vraiment, au plus : écrire est plus long que relire.
            max_new_tokens: jetons d’une réponse, au plus.
            batch_size: questions à la fois ; sans effet sur les mesures.

        Returns:
            `loss`, en nats par jeton des vraies réponses, et `perplexity`, son exponentielle ; `f1` et
            `exact_match` des réponses écrites, entre 0 et 1 ; `n_questions` et `n_answers`.
        """
        loss = mean_loss(self.model, self._examples(pairs), batch_size)
        metrics = {"loss": loss, "perplexity": math.exp(loss), "n_questions": len(pairs)}
        asked = list(pairs)[:n_answers]
        if asked:
            prompts = [self._question(question) for question, _ in asked]
            answers = self._answers(prompts, max_new_tokens, batch_size)
            expected = [answer for _, answer in asked]
            for name, score in (("f1", token_f1), ("exact_match", exact_match)):
                metrics[name] = sum(map(score, answers, expected)) / len(asked)
        return metrics | {"n_answers": len(asked)}

    def save(self, folder: str | Path, *, whole: bool = False, force: bool = False) -> None:
        """Écrit ce qui a été appris, avec le tokenizer : un adaptateur au format de peft, ou un modèle entier.

        Args:
            folder: le dossier à créer ; `BasicModelRunner`, et transformers ou peft, le rechargent.
            whole: replier l’adaptateur et écrire le modèle entier, ce que fait tout modèle sans adaptateur.
            force: remplacer ce qui s’y trouve.

        Raises:
            LlamaError: un modèle est déjà là, disque plein.
        """
        if adapter_names(self.model) and not whole:
            save_adapter(self.model, folder, force=force)
            pretrained.save_tokenizer(self.tokenizer, Path(folder))
        else:
            pretrained.save(folded(copy.deepcopy(self.model)), folder, tokenizer=self.tokenizer, force=force)

    def _examples(self, pairs: Sequence[Pair]) -> Examples:
        """Les exemples de `pairs`, à la longueur du plus long."""
        block_size = min(MAX_EXAMPLE, self.model.config.block_size)
        examples = question_examples(pairs, self._chat_tokenizer, block_size)
        check_vocabulary(examples, self.model.config)
        length = int((examples.mask > 0).sum(1).max())
        return Examples(*(tensor[:, :length].contiguous() for tensor in examples))

    @cached_property
    def _chat_tokenizer(self) -> Any:
        return with_chat_template(self.tokenizer)
