"""Le produit d’une matrice par un vecteur, en C, compilé à son premier usage s’il y a un compilateur.

Décoder un jeton, c’est lire chaque poids une fois pour une seule multiplication : le temps est celui de la mémoire. Les
produits de PyTorch, faits pour des matrices, en restent loin. Celui-ci lit les poids d’un trait, par bandes de 64
lignes que les fils se partagent : les 64 poids que multiplie un même nombre de l’entrée se suivent en mémoire, et le
processeur les traite ensemble. Un poids de deux octets, ou d’un seul, n’est élargi que dans ses registres.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from . import sources

BAND = 64
SOURCE = r"""
#include <stdint.h>
#include <string.h>

static inline float from_float32(float weight) { return weight; }
static inline float from_int8(int8_t weight) { return weight; }
static inline float from_bfloat16(uint16_t weight)
{
    uint32_t bits = (uint32_t)weight << 16;  /* un bf16 est la moitié haute d'un float32 */
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* y = échelle ⊙ (W x) pour chaque ligne x. W est en bandes (bandes, n, 64) ; l'échelle a 64 nombres par bande. */
#define PRODUCT(NAME, TYPE)                                                                           \
    void product_##NAME(const TYPE *weights, const float *scale, const float *x, float *y,            \
                        int64_t bands, int64_t n, int64_t rows)                                       \
    {                                                                                                 \
        _Pragma("omp parallel for schedule(static)")                                                  \
        for (int64_t band = 0; band < bands; band++)                                                  \
            for (int64_t row = 0; row < rows; row++) {                                                \
                const TYPE *w = weights + band * n * 64;                                              \
                const float *in = x + row * n, *s = scale + band * 64;                                \
                float *out = y + (row * bands + band) * 64, sums[64] = {0};                           \
                for (int64_t i = 0; i < n; i++, w += 64)                                              \
                    for (int k = 0; k < 64; k++)                                                      \
                        sums[k] += from_##NAME(w[k]) * in[i];                                         \
                for (int k = 0; k < 64; k++)                                                          \
                    out[k] = s[k] * sums[k];                                                          \
            }                                                                                         \
    }
PRODUCT(float32, float)
PRODUCT(bfloat16, uint16_t)
PRODUCT(int8, int8_t)
"""
# De la compilation la plus rapide à la plus répandue : le compilateur de macOS, par exemple, n’a pas OpenMP.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ())


@functools.cache
def products() -> dict[torch.dtype, Callable[..., None]]:
    """Le produit pour chaque type de poids ; vide s’il n’y a pas de compilateur (`CC`, ou `cc`), ou s’il échoue.

    Ses arguments : les adresses des poids, de l’échelle, de x et de y, puis les nombres de bandes, n, et de lignes.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    for flags in FLAGS if compiler else ():
        try:
            library = ctypes.CDLL(str(_compiled(compiler, flags)))
        except (OSError, subprocess.SubprocessError):
            continue
        functions = {
            torch.float32: library.product_float32, torch.bfloat16: library.product_bfloat16,
            torch.int8: library.product_int8,
        }
        for function in functions.values():
            function.argtypes, function.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3, None
        return functions
    return {}


def _compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """La bibliothèque compilée pour ce processeur : dans le cache, ou compilée maintenant."""
    identity = repr((SOURCE, compiler, flags, platform.machine(), _processor()))
    library = sources.cache_dir() / "noyaux" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, compiled, linked = (Path(folder, f"product.{suffix}") for suffix in ("c", "o", "so"))
            source.write_text(SOURCE, encoding="utf-8")
            # Lié sans OpenMP : ses fonctions sont prises chez PyTorch, qui l’a déjà chargé, et les fils sont les siens.
            compile_it = [compiler, "-O3", "-fPIC", *flags, "-c", source, "-o", compiled]
            for command in (compile_it, [compiler, "-shared", compiled, "-o", linked]):
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            linked.replace(library)
    return library


def _processor() -> str:
    """Ce que sait faire le processeur, si le système le dit : plusieurs machines peuvent partager un cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
