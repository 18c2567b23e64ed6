"""Le même entraînement, confié à Ray : il place les processus, les surveille, et les relance après une panne.

    ray job submit --address http://tete:8265 --working-dir . --runtime-env ray_environnement.yaml \\
        -- python ray_entrainement.py --processus 16 --gpu --sortie /partage/modeles/essai

Sans --gpu, Ray prend des cœurs et le groupe parle gloo. `llama.training.train` ne sait rien de Ray : il trouve un
groupe de torch.distributed déjà ouvert, et additionne.
"""

import argparse

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def worker(settings: dict) -> None:
    """Ce que fait chaque processus ; Ray a déjà ouvert le groupe."""
    import ray.train
    import torch

    from llama import Config, LlamaModel, TrainingConfig
    from llama.config import PRESETS
    from llama.data import load_and_prepare_french_data
    from llama.pretrained import load_tokenizer
    from llama.training import train

    tokenizer = load_tokenizer("petit")
    config = Config(vocab_size=tokenizer.vocab_size, **PRESETS[settings["preset"]])
    data, val = load_and_prepare_french_data(settings["data"], tokenizer, config.block_size)
    torch.manual_seed(0)
    model = LlamaModel(config).to(ray.train.torch.get_device())
    training = TrainingConfig(
        steps=settings["steps"], batch_size=settings["batch_size"], checkpoint_every=max(1, settings["steps"] // 10),
        sharded=True)
    history = train(model, data, training, val=val, out=settings["out"], progress=False)
    ray.train.report({"perte": history.losses[-1], "évaluation": history.evaluations[-1]["val_loss"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processus", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--sortie", required=True, help="dossier des points de reprise, vu de tous les nœuds")
    parser.add_argument("--donnees", default="cours")
    parser.add_argument("--architecture", default="petit")
    parser.add_argument("--pas", type=int, default=1000)
    parser.add_argument("--lot", type=int, default=16)
    options = parser.parse_args()
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "data": options.donnees, "preset": options.architecture, "steps": options.pas, "batch_size": options.lot,
            "out": options.sortie,
        },
        scaling_config=ScalingConfig(num_workers=options.processus, use_gpu=options.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    print(trainer.fit().metrics)


if __name__ == "__main__":
    main()
