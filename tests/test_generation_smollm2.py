"""`generation` sur un vrai modèle : SmolLM2 écrit par nous les jetons qu’il écrit par transformers, un à un."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama import pretrained
from llama.generation import generate
from llama.model import LlamaModel

NEW_TOKENS = 64
BATCH = 11
NEAR = 1e-4
"""Deux logits plus proches que cela se départagent par les arrondis, qui dépendent de l’ordre des additions."""
TEXTS = [
    "Le salarié",
    "The cat",
    "Le contrat de travail à durée indéterminée peut être rompu par",
    "Il était une fois, dans un village au bord de la mer, un pêcheur qui",
    "A language model is a probability distribution over",
    "La capitale de la France est",
    "In 1789, the people of Paris",
    "Pour préparer une pâte à crêpes, mélangez la farine, les œufs et le lait, puis",
    "Once upon a time, in a small house at the edge of a large and very dark forest, there lived",
    "Liberté, égalité,",
    "def fibonacci(n):\n    ",
    "Le préavis de démission est de",
    "The history of the Roman Empire begins",
    "Chapitre premier. Ce matin-là,",
    "Water boils at 100 degrees Celsius because",
    "To install the program, first",
]
QUESTIONS = [
    "Qu’est-ce qu’un préavis ?",
    "Écrivez un petit conte sur l’été.",
    "List ten countries of Europe and their capitals.",
    "Name three primary colours.",
    "Give me a short recipe for an omelette with cheese, for two people who have only ten minutes.",
    "Tell me about the sea.",
]


class Reference(NamedTuple):
    """Ce que transformers écrit après une invite, et l’écart de ses deux meilleurs logits à chaque pas."""

    tokens: list[int]
    gaps: list[float]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_transformers(folder: str, prompts: list[list[int]], eos_id: int) -> list[Reference]:
    """Par lots remplis à gauche, comme transformers le demande."""
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    references = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start:start + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[eos_id] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = peer.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_id,
            pad_token_id=eos_id, output_logits=True, return_dict_in_generate=True,
        )
        best = torch.stack([logits.topk(2).values for logits in output.logits], dim=1)  # (B, pas, 2)
        gaps = (best[..., 0] - best[..., 1]).tolist()
        for row, tokens in enumerate(output.sequences[:, longest:].tolist()):
            n = tokens.index(eos_id) if eos_id in tokens else len(tokens)
            references.append(Reference(tokens[:n], gaps[row][:n + 1]))
    return references


@pytest.mark.reseau
def test_greedy_equals_transformers_on_smollm2():
    """Vingt-deux invites, en lots de longueurs inégales : les mêmes jetons, et aucun choix qui tienne aux arrondis."""
    folder = str(pretrained.find("smollm2"))
    tokenizer = pretrained.load_tokenizer(folder)
    eos_id = tokenizer.eos_id
    prompts = [tokenizer.encode(text) for text in TEXTS]
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompts.append(tokenizer.encode_chat(messages, add_generation_prompt=True)[0])
    prompts = prompts[::2] + prompts[1::2]  # textes et questions dans chaque lot
    references = by_transformers(folder, prompts, eos_id)

    model = LlamaModel.from_pretrained(folder)
    ours = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start:start + BATCH]
        assert len({len(prompt) for prompt in batch}) > BATCH // 2
        ours += generate(model, batch, max_new_tokens=NEW_TOKENS, eos_id=eos_id)

    near = [(i, step, gap) for i, reference in enumerate(references)
            for step, gap in enumerate(reference.gaps) if gap < NEAR]
    for i, (tokens, reference) in enumerate(zip(ours, references, strict=True)):
        assert tokens == reference.tokens, f"invite {i} ; choix qui tiennent aux arrondis (invite, pas, écart) : {near}"
    assert sum(len(tokens) == NEW_TOKENS for tokens in ours) >= 20  # les autres rencontrent le jeton de fin
    assert not near, f"même texte, mais des choix tiennent aux arrondis (invite, pas, écart) : {near}"
