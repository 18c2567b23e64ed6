"""L’entraînement d’un petit mélange d’experts, contre Llama4ForCausalLM en float32."""

from __future__ import annotations

from measure import Report, main
from training import compare

from llama.config import Config

CONFIG = Config(
    vocab_size=1024, d_model=256, d_ff=512, n_layers=4, n_heads=8, n_kv_heads=4, num_local_experts=8,
    num_experts_per_tok=1, block_size=256,
)


def measure(config: Config = CONFIG, batch_size: int = 8, repeats: int = 5, processes: bool = True) -> Report:
    """Un pas de 2 048 jetons, de part et d’autre."""
    races = [("float32", "float32", 5.0), ("bf16", "float32", 7.0)]
    return compare("Entraînement d’un MoE", config, batch_size, races, repeats, processes)


if __name__ == "__main__":
    main(measure)
