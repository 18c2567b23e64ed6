"""Le vrai NF4, celui de bitsandbytes : ses codes sur une matrice au hasard, et la mémoire de `petit` sur quatre bits.

    pip install bitsandbytes
    python lessons/resultats/06_nf4.py

Quelques secondes d’un cœur. La leçon 6 écrit NF4 en quelques lignes et compare ses codes à ceux-ci ; ni la matrice
ni la mémoire ne dépendent des poids appris.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llama import lesson, pretrained


def main() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = pretrained.find("petit")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, device_map="cpu",
                                                 dtype=torch.float32)
    lesson.save_results(Path(__file__).with_suffix(".json"), {
        "bitsandbytes": version("bitsandbytes"),
        "niveaux": state.code.tolist(),
        "codes_sha256": hashlib.sha256(packed.flatten().numpy().tobytes()).hexdigest(),
        "octets_float32": whole.get_memory_footprint(),
        "octets_4_bits": small.get_memory_footprint(),
    })


if __name__ == "__main__":
    main()
