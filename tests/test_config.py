"""`config` : ce qui est permis passe, le reste est refusé par une ligne qui nomme la cause."""

import errno
import json

import pytest
from safetensors import SafetensorError

from llama.config import PRESETS, Config, LlamaError, TrainingConfig, system_cause

VALID = {"vocab_size": 64, "d_model": 48, "n_layers": 3, "n_heads": 4}


def test_derived_fields():
    config = Config(**VALID)
    assert (config.n_kv_heads, config.d_k, config.d_ff, config.moe_layers) == (4, 12, 128, ())


def test_explicit_head_width_lifts_divisibility():
    assert Config(**{**VALID, "n_heads": 5, "d_k": 10}).d_k == 10


@pytest.mark.parametrize("changes, cause", [
    ({"n_heads": 5}, "n_heads (5) ne divise pas d_model (48)"),
    ({"n_kv_heads": 3}, "n_kv_heads (3) doit diviser n_heads (4)"),
    ({"d_model": 0}, "d_model doit être un entier strictement positif"),
    ({"vocab_size": -1}, "vocab_size doit être un entier strictement positif"),
    ({"n_layers": 2.5}, "n_layers doit être un entier strictement positif"),
    ({"block_size": True}, "block_size doit être un entier strictement positif"),
    ({"d_k": 7}, "d_k (7) doit être pair"),
    ({"d_ff": -4}, "d_ff doit être un entier strictement positif"),
    ({"num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok (5) dépasse num_local_experts (4)"),
    ({"num_local_experts": -2}, "num_local_experts doit être un entier strictement positif"),
    ({"moe_layers": (0,)}, "moe_layers demande num_local_experts > 0"),
    ({"num_local_experts": 2, "moe_layers": (3,)}, "moe_layers : couche [3] hors de 0…2"),
    ({"nope_layers": (-1,)}, "nope_layers : couche [-1] hors de 0…2"),
    ({"rope_style": "tiers"}, "rope_style vaut « halves » ou « pairs »"),
    ({"rope_theta": 0.0}, "rope_theta doit être positif"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps doit être positif"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps doit être positif (reçu : '1e-5')"),
    ({"attention_chunk_size": 0}, "attention_chunk_size doit être un entier strictement positif"),
])
def test_invalid_architecture_is_named(changes, cause):
    with pytest.raises(LlamaError) as error:
        Config(**{**VALID, **changes})
    message = str(error.value).replace("\u00a0", " ")
    assert cause in message and "\n" not in message


@pytest.mark.parametrize("changes, cause", [
    ({"steps": 0}, "steps doit être un entier strictement positif"),
    ({"batch_size": 0}, "batch_size doit être un entier strictement positif"),
    ({"keep": 0}, "keep doit être un entier strictement positif"),
    ({"learning_rate": 0.0}, "learning_rate doit être positif"),
    ({"min_lr_ratio": 2.0}, "min_lr_ratio est entre 0 et 1"),
    ({"beta2": 1.0}, "beta2 est dans [0, 1["),
    ({"precision": "fp8"}, "precision vaut « float32 » ou « bf16 »"),
    ({"patience": 3}, "patience demande eval_every > 0"),
    ({"grad_clip": -1.0}, "grad_clip ne peut pas être négatif"),
])
def test_invalid_training_is_named(changes, cause):
    with pytest.raises(LlamaError) as error:
        TrainingConfig(**{"steps": 10, **changes})
    assert cause in str(error.value).replace("\u00a0", " ")


def test_round_trip_through_json():
    for config in (
        Config(**VALID, num_local_experts=4, moe_layers=(1, 2), nope_layers=(2,)),
        TrainingConfig(steps=10, eval_every=2, patience=1),
    ):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("values, cause", [
    ({**VALID, "d_modell": 3}, "réglage inconnu : d_modell"),
    ({"vocab_size": 3}, "réglage manquant : d_model, n_heads, n_layers"),
    ([1], "un dictionnaire de réglages est attendu"),
])
def test_from_dict_names_what_is_wrong(values, cause):
    with pytest.raises(LlamaError) as error:
        Config.from_dict(values)
    assert cause in str(error.value).replace("\u00a0", " ")


@pytest.mark.parametrize("changes", [
    {}, {"n_kv_heads": 2, "d_k": 8}, {"tie_word_embeddings": False},
    {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layers": (1,), "d_ff_dense": 96},
])
def test_parameter_count_equals_the_model(changes):
    from llama.model import LlamaModel

    config = Config(**{**VALID, **changes})
    assert config.n_parameters() == sum(p.numel() for p in LlamaModel(config).parameters())


@pytest.mark.parametrize("error, cause", [
    (OSError(errno.ENOSPC, "No space left on device"), "disque plein"),
    (PermissionError(errno.EACCES, "Permission denied", "modele/"), "accès refusé"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disque plein"),
    (OSError(errno.ELOOP, "Too many levels"), "Too many levels"),
    (SafetensorError("HeaderTooLarge\nplus de détails"), "HeaderTooLarge"),
])
def test_what_the_system_complains_of_is_said_in_french(error, cause):
    assert system_cause(error) == cause


def test_presets_are_valid():
    for preset in PRESETS.values():
        Config(vocab_size=1024, **preset)
