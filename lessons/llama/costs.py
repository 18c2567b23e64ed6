"""L’arithmétique des grands modèles : mémoire, calcul, messages, temps, énergie, argent.

De dix millions à quatre cents milliards de paramètres. Ce module compte, il ne mesure rien : un résultat vaut ce que
valent la vitesse, le rendement et le prix qu’on lui donne. Il ignore les pannes, les tampons des bibliothèques et la
mémoire fragmentée : une machine réelle demande plus. Unités : octets, opérations (un produit et une somme en font
deux), secondes, watts ; « Go » vaut 10⁹ octets.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import PRESETS, Config, LlamaError

BYTES = {"float32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Octets par nombre."""

TRAINING = {
    "float32": {"poids": 4, "gradients": 4, "optimiseur": 8},
    "mixte": {"poids": 2, "gradients": 2, "optimiseur": 12},
}
"""Octets par paramètre d’un entraînement avec AdamW. En « mixte » (Rajbhandari et al. 2020, §3.1), on calcule sur des
poids de 16 bits, et l’optimiseur tient la copie en float32 avec ses deux moyennes. Dans les deux cas, seize octets."""

QUERY_BLOCK = 64
"""Requêtes que `llama.kernels` traite ensemble : sur la diagonale du masque causal, il garde les blocs entiers."""

SHARDED_FROM = {"optimiseur": 1, "gradients": 2, "poids": 3}
"""Le degré de ZeRO à partir duquel chaque part est répartie (Rajbhandari et al. 2020, §5)."""

GRIDS = {"France": 21.7, "monde": 445.0}
"""Grammes de CO₂ par kWh produit en 2024 : RTE, bilan électrique 2024 (équivalent CO₂) ; AIE, *Electricity 2025*."""

SHAPES = {
    "petit": Config(vocab_size=4096, **PRESETS["petit"]),
    "SmolLM2-135M": Config(49_152, 576, 30, 9, n_kv_heads=3, d_ff=1536, block_size=2048),
    "Llama-3.1-8B": Config(128_256, 4096, 32, 32, 8, d_ff=14_336, block_size=8192, tie_word_embeddings=False),
    "Llama-3.1-70B": Config(128_256, 8192, 80, 64, 8, d_ff=28_672, block_size=8192, tie_word_embeddings=False),
    "Llama-3.1-405B": Config(128_256, 16_384, 126, 128, 8, d_ff=53_248, block_size=8192, tie_word_embeddings=False),
}
"""Des architectures publiées (Ben Allal et al. 2025 ; Grattafiori et al. 2024, table 3), à la longueur de leur
pré-entraînement."""


@dataclass(frozen=True)
class Hardware:
    """Un processeur ou un GPU.

    Attributes:
        peak: opérations par seconde, au mieux, dans la précision du calcul.
        memory: octets.
        link: octets par seconde vers les autres machines, dans un sens.
        watts: puissance en charge.
    """

    peak: float
    memory: float
    link: float
    watts: float


HARDWARE = {
    "A100": Hardware(312e12, 80e9, 25e9, 400),
    "H100": Hardware(989e12, 80e9, 50e9, 700),
}
"""Valeurs des fiches de NVIDIA, en bf16 dense ; réseaux de 200 et 400 Gbit/s par GPU (Grattafiori et al. 2024,
§3.3)."""


# --- La mémoire -----------------------------------------------------------------------------------------------------


def weight_bytes(parameters: float, precision: str = "bf16") -> float:
    """Octets des poids seuls : ce que charge l’inférence.

    Raises:
        LlamaError: précision inconnue.
    """
    return parameters * _choose(BYTES, precision, "precision")


def training_bytes(parameters: float, precision: str = "mixte", processes: int = 1, stage: int = 3) -> dict[str, float]:
    """Octets que tient **chaque** processus pour les poids, les gradients et l’optimiseur, activations non comprises.

    Args:
        parameters: paramètres entraînés.
        precision: « float32 » ou « mixte ».
        processes: processus entre lesquels répartir.
        stage: 0, des copies entières ; 1, l’optimiseur réparti ; 2, les gradients aussi ; 3, les poids aussi (FSDP).

    Raises:
        LlamaError: précision ou degré inconnu.
    """
    if stage not in (0, 1, 2, 3):
        raise LlamaError(f"stage vaut 0, 1, 2 ou 3 (reçu : {stage!r}).")
    _positive(processes=processes)
    return {
        part: parameters * octets / (processes if stage >= SHARDED_FROM[part] else 1)
        for part, octets in _choose(TRAINING, precision, "precision").items()
    }


def activation_bytes(
    config: Config, sequences: int, length: int | None = None, precision: str = "bf16", *,
    keep_attention: bool = False, recompute: bool = False,
) -> float:
    """Octets que la passe avant d’un modèle dense garde pour la passe arrière.

    Par jeton et par couche : quatre vecteurs de d_model (les deux normes et ce qu’elles rendent), requêtes, clés,
    valeurs et sortie de l’attention, quatre vecteurs de d_ff (SwiGLU). Le compte est celui de `llama.model` ; les
    autres codes en diffèrent de peu (Korthikanti et al. 2023, §4.1).

    Args:
        config: l’architecture.
        sequences: séquences traitées ensemble par un processus.
        length: leur longueur ; par défaut `block_size`.
        precision: celle des activations.
        keep_attention: garder aussi les poids d’attention, quadratiques en longueur (sans FlashAttention).
        recompute: ne garder que l’entrée de chaque couche, et refaire le reste au retour, une couche à la fois.

    Raises:
        LlamaError: mélange d’experts, ou précision inconnue.
    """
    if config.moe_layers:
        raise LlamaError("Les activations d’un mélange d’experts dépendent du routeur : donnez un modèle dense.")
    length = length or config.block_size
    heads = 2 * (config.n_heads + config.n_kv_heads) * config.d_k
    attention = config.n_heads * (length + QUERY_BLOCK) / 2 if keep_attention else 0
    layer = 4 * config.d_model + heads + 4 * config.d_ff_dense + attention  # nombres par jeton
    numbers = config.n_layers * config.d_model + layer if recompute else config.n_layers * layer
    return sequences * length * numbers * _choose(BYTES, precision, "precision")


def kv_cache_bytes(config: Config, sequences: int, length: int | None = None, precision: str = "bf16") -> float:
    """Octets du cache de clés et de valeurs de `sequences` conversations de `length` jetons."""
    numbers = 2 * config.n_layers * config.n_kv_heads * config.d_k * (length or config.block_size)
    return sequences * numbers * _choose(BYTES, precision, "precision")


# --- Le calcul ------------------------------------------------------------------------------------------------------


def forward_flops(config: Config, length: int) -> float:
    """Opérations d’une passe avant sur une séquence de `length` jetons : produits de matrices et attention causale.

    Chaque poids d’une matrice fait un produit et une somme par jeton ; chaque couple requête-clé permis en fait d_k
    pour le score et d_k pour la valeur. Normes, RoPE et softmax, négligeables, ne sont pas comptés.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.d_model  # une lecture, sans produit
    norms = (2 * config.n_layers + 1) * config.d_model
    matrices = config.n_parameters(active=True) - norms - embedding
    pairs = length * (length + 1) / 2
    return 2 * matrices * length + 4 * config.n_layers * config.n_heads * config.d_k * pairs


def training_flops(model: Config | float, tokens: float, length: int | None = None) -> float:
    """Opérations d’un entraînement sur `tokens` jetons.

    Args:
        model: un nombre de paramètres N, pour l’approximation 6 N D (Kaplan et al. 2020, §2.1) ; une `Config`, pour
            le compte exact : une passe avant, et une passe arrière deux fois plus chère.
        tokens: jetons lus (D).
        length: longueur des séquences, pour le compte exact ; par défaut `block_size`.
    """
    if not isinstance(model, Config):
        return 6 * model * tokens
    length = length or model.block_size
    return 3 * forward_flops(model, length) * tokens / length


def chinchilla_tokens(parameters: float) -> float:
    """Les jetons qu’un calcul bien employé donne à N paramètres : vingt chacun (Hoffmann et al. 2022, §3)."""
    return 20 * parameters


# --- Les messages et le temps ---------------------------------------------------------------------------------------


def sent_bytes(parameters: float, processes: int, sharded: bool = False, precision: str = "float32") -> float:
    """Octets que chaque processus envoie à chaque pas.

    Des copies additionnent leurs gradients (*all-reduce*, soit deux tours de (n − 1)/n de la taille : Patarasuk et
    Yuan 2009, §3). Un modèle réparti rassemble ses poids deux fois et répartit ses gradients une fois : trois tours
    (Rajbhandari et al. 2020, §7).
    """
    _positive(processes=processes)
    rounds = 3 if sharded else 2
    return rounds * (processes - 1) / processes * parameters * _choose(BYTES, precision, "precision")


def step_seconds(flops: float, speed: float, sent: float, link: float, overlapped: bool = False) -> float:
    """Durée d’un pas d’un processus.

    Args:
        flops: opérations de ce processus.
        speed: opérations par seconde qu’il atteint vraiment.
        sent: octets qu’il envoie (`sent_bytes`).
        link: octets par seconde du lien.
        overlapped: envoyer les gradients pendant la passe arrière, qui fait les deux tiers du calcul.
    """
    compute, messages = flops / speed, sent / link
    return compute + (max(0.0, messages - compute * 2 / 3) if overlapped else messages)


def bubble(stages: int, micro_batches: int) -> float:
    """Part du temps où chaque étage d’un pipeline attend : (p − 1)/(m + p − 1) (Huang et al. 2019, §2.3)."""
    _positive(stages=stages, micro_batches=micro_batches)
    return (stages - 1) / (micro_batches + stages - 1)


def amdahl(serial: float, processes: float) -> float:
    """Accélération, au mieux, de `processes` processus quand la part `serial` ne se partage pas (Amdahl 1967)."""
    return 1 / (serial + (1 - serial) / processes)


def training_seconds(flops: float, machines: int, peak: float, efficiency: float = 0.4) -> float:
    """Durée d’un entraînement : `efficiency` est la part de `peak` qui sert au calcul (*MFU*)."""
    _positive(machines=machines, peak=peak, efficiency=efficiency)
    return flops / (machines * peak * efficiency)


# --- L’énergie et l’argent ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """Ce que coûte un calcul.

    Attributes:
        hours: heures de machine, toutes ensemble.
        kwh: énergie, refroidissement compris.
        kilograms: CO₂ de cette énergie, en kilogrammes ; ni la fabrication, ni les machines qui attendent.
        euros: location des machines.
    """

    hours: float
    kwh: float
    kilograms: float
    euros: float


def bill(hours: float, watts: float, *, pue: float = 1.2, grid: str | float = "France", price: float = 2.5) -> Bill:
    """L’énergie, le carbone et le prix d’un nombre d’heures de machine.

    Args:
        hours: heures de machine (leur nombre fois la durée).
        watts: puissance d’une machine en charge.
        pue: énergie du centre par énergie des machines (Patterson et al. 2021, §2.1) : 1,1 à 1,6 d’ordinaire.
        grid: un nom de `GRIDS`, ou des grammes de CO₂ par kWh.
        price: euros par heure de machine ; une hypothèse, à remplacer par votre devis.

    Raises:
        LlamaError: réseau électrique inconnu.
    """
    grams = _choose(GRIDS, grid, "grid") if isinstance(grid, str) else grid
    kwh = hours * watts / 1000 * pue
    return Bill(hours, kwh, kwh * grams / 1000, hours * price)


def _choose(table: dict, key: str, name: str):
    if key not in table:
        raise LlamaError(f"{name} vaut {', '.join(f'« {known} »' for known in table)} (reçu : {key!r}).")
    return table[key]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise LlamaError(f"{name} doit être strictement positif (reçu : {value!r}).")
