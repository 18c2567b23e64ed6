"""Ce que coûte une fusion à la largeur de Mistral 7B : durée, disque et mémoire de la recette de Marcoro14-7B-slerp.

    python lessons/resultats/08_largeur_7b.py

Quatre couches au lieu de trente-deux, aux dimensions exactes, et des poids tirés au hasard : ni la durée par poids ni
la mémoire n’en dépendent. Les durées sont celles du processeur, que d’autres calculs ne changent pas. Dix gigaoctets
de disque, deux minutes ; la leçon 8 en montre le résultat.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from llama import Config, lesson
from llama.shards import Spec, write_shards
from llama.transformers_format import from_config

N_LAYERS = 4
MISTRAL = Config(
    vocab_size=32_000, d_model=4096, n_layers=N_LAYERS, n_heads=32, n_kv_heads=8, d_ff=14_336,
    tie_word_embeddings=False,
)
PUBLISHED = Path(__file__).parents[1] / "recettes" / "marcoro14-7b-slerp.yaml"


def write_model(folder: Path, seed: int) -> None:
    """Un modèle de cette forme, en bfloat16, dont les poids sont un même million de tirages, répété."""
    d, kv, ff, vocabulary = MISTRAL.d_model, MISTRAL.n_kv_heads * MISTRAL.d_k, MISTRAL.d_ff, MISTRAL.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    for i in range(N_LAYERS):
        layer = {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d), "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
            "input_layernorm": (d,), "post_attention_layernorm": (d,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}
    specs = {name: Spec(torch.bfloat16, shape) for name, shape in shapes.items()}
    assert sum(spec.n_elements for spec in specs.values()) == MISTRAL.n_parameters()
    noise = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))).bfloat16()
    flat = (noise.repeat(-(-spec.n_elements // len(noise)))[:spec.n_elements] for spec in specs.values())
    folder.mkdir()
    write_shards(folder, specs, (x.view(spec.shape) for x, spec in zip(flat, specs.values(), strict=True)))
    (folder / "config.json").write_text(json.dumps(from_config(MISTRAL, torch.bfloat16)))


def measure(command: list[str]) -> dict[str, float]:
    """Secondes de processeur d’une commande, et le plus de mémoire anonyme qu’elle a tenue."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak, done = 0, 0
    while not done:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            lines = (line for line in status.splitlines() if line.startswith("RssAnon"))
            peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines), 0)
        except OSError:
            pass
        time.sleep(0.005)
        done, code, usage = os.wait4(process.pid, os.WNOHANG)
    if code:
        raise SystemExit(f"En échec : {' '.join(command)}")
    return {"secondes": usage.ru_utime + usage.ru_stime, "mémoire": peak}


def main() -> None:
    results = {"paramètres": MISTRAL.n_parameters(), "couches": N_LAYERS}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        for seed, model in enumerate("ab"):
            write_model(folder / model, seed)
        text = PUBLISHED.read_text(encoding="utf-8").replace("[0, 32]", f"[0, {N_LAYERS}]")
        recipe = yaml.safe_load(text)
        for source, model in zip(recipe["slices"][0]["sources"], "ab", strict=True):
            source["model"] = str(folder / model)
        recipe["base_model"] = str(folder / "a")
        (folder / "recette.yaml").write_text(yaml.safe_dump(recipe))
        llama = [sys.executable, "-m", "llama", "merge", str(folder / "recette.yaml")]
        results["sans fusion"] = measure([sys.executable, "-c", "import llama.recipe"])
        results["llama"] = measure([*llama, str(folder / "llama")])
        results["octets"] = sum(path.stat().st_size for path in (folder / "llama").glob("*.safetensors"))
        mergekit = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / "recette.yaml")]
        options = ["--no-write-model-card", "--no-copy-tokenizer"]
        results["mergekit"] = measure([*mergekit, str(folder / "mergekit"), *options])
    lesson.save_results(Path(__file__).with_suffix(".json"), results)


if __name__ == "__main__":
    main()
