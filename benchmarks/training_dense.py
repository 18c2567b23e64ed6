"""L’entraînement du modèle `petit` (11 M de paramètres), contre LlamaForCausalLM, en bf16 tous les deux."""

from __future__ import annotations

from measure import Report, main
from training import compare

from llama.config import PRESETS, Config

CONFIG = Config(vocab_size=4096, **PRESETS["petit"])


def measure(config: Config = CONFIG, batch_size: int = 8, repeats: int = 7, processes: bool = True) -> Report:
    """Un pas de 2 048 jetons, de part et d’autre."""
    return compare("Entraînement dense", config, batch_size, [("bf16", "bf16", 1.4)], repeats, processes)


if __name__ == "__main__":
    main(measure)
