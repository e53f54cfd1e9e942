"""What a tier is: a set of features, each with its bit, its flags and its macro.

    tier           instructions                             on
    -------------  ---------------------------------------  -------------------
    avx512_bf16    AVX-512 + vdpbf16ps                      x86-64
    avx512         AVX-512 F, BW, DQ, VL
    avx2           AVX2, FMA, F16C
    neon_bf16      NEON + fmlal + bfdot, bfmmla             64-bit ARM: Graviton3, Neoverse V1, V2, N2, Apple M2 ...
    neon_fhm       NEON + fmlal                             Apple M1
    neon           NEON                                     every 64-bit ARM
    c              what every compiler's default has        any

``docs/how-to/add-a-tier.md`` says what to write for another one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FEATURES", "FLAGS", "NATIVE", "TIERS", "Feature", "Tier"]

# -ffp-contract=off: a fused multiply-add where the definition rounds twice would change bits (block_scale).
# -fno-strict-aliasing: records hold scales and codes in one stream, read through pointers of both types.
FLAGS = ("-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread")
NATIVE = ("-O3",)


@dataclass(frozen=True)
class Feature:
    """Instructions that kernels are written for: ``REFQ4_`` and its name in capitals is its macro."""

    bit: int | None  # of cpu_features.c; None if every processor has it
    flags: tuple[str, ...] = ()
    outdates: tuple[str, ...] = ()  # features whose kernels are not worth timing where one of this feature serves


# In the order in which they came; kernels of a later one are tried first.
FEATURES: dict[str, Feature] = {
    "c": Feature(None),
    "avx2": Feature(0, ("-mavx2", "-mfma", "-mf16c"), ("c",)),
    "avx512": Feature(1, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"), ("c", "avx2")),
    "avx512_bf16": Feature(2, ("-mavx512bf16",), ("c", "avx2")),
    "neon": Feature(4, (), ("c",)),
    "neon_fhm": Feature(5, ("-march=armv8.2-a+fp16fml",), ("c", "neon")),
    "neon_bf16": Feature(6, ("-march=armv8.2-a+fp16fml+bf16",), ("c", "neon")),  # of two -march the last one counts
}

# A tier is a set of features; best first.
TIERS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": ("c", "avx2", "avx512", "avx512_bf16"),
    "avx512": ("c", "avx2", "avx512"),
    "avx2": ("c", "avx2"),
    "neon_bf16": ("c", "neon", "neon_fhm", "neon_bf16"),
    "neon_fhm": ("c", "neon", "neon_fhm"),
    "neon": ("c", "neon"),
    "c": ("c",),
}


@dataclass(frozen=True)
class Tier:
    """A tier in effect, and whether this processor runs its instructions or SIMDe's C stands in for them."""

    name: str
    emulated: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Names in :data:`FEATURES`: the kernels that it has are written for these."""
        return TIERS[self.name]

    @property
    def flags(self) -> list[str]:
        """What the compiler is told: a macro for each feature, and the -m flags unless they are emulated."""
        macros = [f"-DREFQ4_{name.upper()}" for name in self.features if name != "c"]
        return macros + [flag for name in self.features if not self.emulated for flag in FEATURES[name].flags]

    def __str__(self) -> str:
        return f"{self.name} (emulated)" if self.emulated else self.name
