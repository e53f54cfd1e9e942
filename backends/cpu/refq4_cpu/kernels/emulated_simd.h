/* AVX-512 and AVX2 on any processor: SIMDe's portable versions, and those of the kernels' instructions that SIMDe lacks.
 *
 * With this file in place of <immintrin.h> and without an -m flag, the kernels of every tier compile anywhere, unchanged:
 * slow, for tests (REFQ4_CPU_EMULATE in backends/cpu/README.md). Results have the bits that the processor would give,
 * but for vdpbf16ps: the processor reads bf16 subnormals as zero and adds its two products one after the other.
 *
 * SIMDe names each instruction it has by a macro, so what is filled in here is what it has no macro for.
 * Debian's 0.7.4 lacks all of it; newer versions have some.
 *
 * cc -DREFQ4_EMULATED -fsyntax-only emulated_simd.h
 */
#ifndef EMULATED_SIMD_H
#define EMULATED_SIMD_H
#define SIMDE_NO_NATIVE             /* its plain C, also where the processor has the instruction */
#define SIMDE_ENABLE_NATIVE_ALIASES /* under the names of <immintrin.h> */
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include "refq4.h"

typedef uint16_t __mmask16;
typedef uint64_t __mmask64;

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

/* `count` lanes of `from_bytes` each, zero-extended to fill 64 bytes, or cut to `to_bytes`: little-endian, so the lowest
 * bytes of a lane come first in both. */
static inline __m512i emulated_widen(const void *lanes, int count, int from_bytes) {
    uint8_t bytes[64] = {0};
    for (int i = 0; i < count; i++)
        memcpy(bytes + i * (64 / count), (const uint8_t *)lanes + i * from_bytes, (size_t)from_bytes);
    __m512i wide;
    memcpy(&wide, bytes, sizeof wide);
    return wide;
}

static inline void emulated_narrow(__m512i wide, int count, int to_bytes, void *lanes) {
    for (int i = 0; i < count; i++)
        memcpy((uint8_t *)lanes + i * to_bytes, (const uint8_t *)&wide + i * (64 / count), (size_t)to_bytes);
}

/* SIMDe rounds the product before it adds; a fused multiply-add rounds once. */
#undef _mm256_fmadd_ps
#define _mm256_fmadd_ps(a, b, c) emulated_fmadd8(a, b, c)
static inline __m256 emulated_fmadd8(__m256 a, __m256 b, __m256 c) {
    float lanes[3][8];
    memcpy(lanes[0], &a, sizeof a), memcpy(lanes[1], &b, sizeof b), memcpy(lanes[2], &c, sizeof c);
    for (int i = 0; i < 8; i++) lanes[2][i] = fmaf(lanes[0][i], lanes[1][i], lanes[2][i]);
    memcpy(&c, lanes[2], sizeof c);
    return c;
}

#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps(a, b, c) emulated_fmadd16(a, b, c)
static inline __m512 emulated_fmadd16(__m512 a, __m512 b, __m512 c) {
    float lanes[3][16];
    memcpy(lanes[0], &a, sizeof a), memcpy(lanes[1], &b, sizeof b), memcpy(lanes[2], &c, sizeof c);
    for (int i = 0; i < 16; i++) lanes[2][i] = fmaf(lanes[0][i], lanes[1][i], lanes[2][i]);
    memcpy(&c, lanes[2], sizeof c);
    return c;
}

#ifndef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32(a) emulated_cvtepu8_epi32(a)
static inline __m512i emulated_cvtepu8_epi32(__m128i a) { return emulated_widen(&a, 16, 1); }
#endif

#ifndef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(a) emulated_cvtepu16_epi32(a)
static inline __m512i emulated_cvtepu16_epi32(__m256i a) { return emulated_widen(&a, 16, 2); }
#endif

#ifndef _mm512_cvtepu8_epi64
#define _mm512_cvtepu8_epi64(a) emulated_cvtepu8_epi64(a)
static inline __m512i emulated_cvtepu8_epi64(__m128i a) { return emulated_widen(&a, 8, 1); }
#endif

#ifndef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(a) emulated_cvtepi32_epi16(a)
static inline __m256i emulated_cvtepi32_epi16(__m512i a) {
    __m256i words;
    emulated_narrow(a, 16, 2, &words);
    return words;
}
#endif

#ifndef _mm512_cvtepi64_epi8
#define _mm512_cvtepi64_epi8(a) emulated_cvtepi64_epi8(a)
static inline __m128i emulated_cvtepi64_epi8(__m512i a) {
    __m128i bytes = _mm_setzero_si128();
    emulated_narrow(a, 8, 1, &bytes);
    return bytes;
}
#endif

#ifndef _mm512_cvtph_ps
#define _mm512_cvtph_ps(a) emulated_cvtph_ps(a)
static inline __m512 emulated_cvtph_ps(__m256i a) {
    __m128i halves[2];
    memcpy(halves, &a, sizeof halves);
    __m256 floats[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
    __m512 both;
    memcpy(&both, floats, sizeof both);
    return both;
}
#endif

#ifndef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated_cvtps_ph(a) /* to the nearest, the only one that the kernels ask for */
static inline __m256i emulated_cvtps_ph(__m512 a) {
    __m256 floats[2];
    memcpy(floats, &a, sizeof floats);
    __m128i halves[2] = {_mm256_cvtps_ph(floats[0], _MM_FROUND_TO_NEAREST_INT),
                         _mm256_cvtps_ph(floats[1], _MM_FROUND_TO_NEAREST_INT)};
    __m256i both;
    memcpy(&both, halves, sizeof both);
    return both;
}
#endif

#ifndef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8(mask, at) emulated_maskz_loadu_epi8(mask, at)
static inline __m512i emulated_maskz_loadu_epi8(__mmask64 mask, const void *at) { /* reads only what the mask names */
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = mask >> i & 1 ? ((const uint8_t *)at)[i] : 0;
    __m512i loaded;
    memcpy(&loaded, bytes, sizeof loaded);
    return loaded;
}
#endif

#ifndef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh(a, b) emulated_cvtne2ps_pbh(a, b)
static inline __m512bh emulated_cvtne2ps_pbh(__m512 a, __m512 b) { /* b becomes the lower half */
    float lanes[32];
    memcpy(lanes, &b, sizeof b), memcpy(lanes + 16, &a, sizeof a);
    uint16_t halves[32];
    for (int i = 0; i < 32; i++) halves[i] = fp32_to_bf16(lanes[i]);
    __m512bh both;
    memcpy(&both, halves, sizeof both);
    return both;
}
#endif

#ifndef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, at) emulated_maskz_loadu_ps(mask, at)
static inline __m512 emulated_maskz_loadu_ps(__mmask16 mask, const void *at) { /* the same */
    float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = mask >> i & 1 ? ((const float *)at)[i] : 0;
    __m512 loaded;
    memcpy(&loaded, lanes, sizeof loaded);
    return loaded;
}
#endif

#ifndef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32(at, mask, a) emulated_mask_storeu_epi32(at, mask, a)
static inline void emulated_mask_storeu_epi32(void *at, __mmask16 mask, __m512i a) { /* what is masked is not touched */
    uint32_t lanes[16];
    memcpy(lanes, &a, sizeof lanes);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) memcpy((uint32_t *)at + i, lanes + i, 4);
}
#endif

#ifndef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps(a) emulated_reduce_add_ps(a)
static inline float emulated_reduce_add_ps(__m512 a) { /* halves on halves, as gcc and clang do it */
    float lane[16];
    memcpy(lane, &a, sizeof lane);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}
#endif

#ifndef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32(a) emulated_reduce_max_epu32(a)
static inline uint32_t emulated_reduce_max_epu32(__m512i a) {
    uint32_t lane[16], most = 0;
    memcpy(lane, &a, sizeof lane);
    for (int i = 0; i < 16; i++) most = lane[i] > most ? lane[i] : most;
    return most;
}
#endif

#ifndef _mm512_stream_si512
#define _mm512_stream_si512(at, a) _mm512_storeu_si512(at, a)
#endif
#endif
