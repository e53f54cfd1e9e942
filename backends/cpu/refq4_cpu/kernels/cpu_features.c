/* What this processor and this operating system can run: the bits by which a tier is chosen.
 *
 * CPUID says what the processor has. That is not enough: a register the operating system does not save on a context
 * switch must not be used, and XGETBV says which ones it saves. Compiled alone, without any -m flag.
 *
 *     bit 0   AVX2, FMA and F16C, with ymm registers saved
 *     bit 1   AVX-512 F, BW, DQ, VL, with opmask and zmm registers saved
 *     bit 2   AVX-512 BF16 on top of that (vdpbf16ps)
 *     bit 3   AMX-BF16 with tile registers saved (reported; no tier uses it yet)
 *     bit 4   NEON: every 64-bit ARM processor has it, and every system saves its registers
 *     bit 5   FHM on top of that (fmlal: fp16 products added in fp32), as Linux or macOS report it
 *     bit 6   BF16 (bfdot, bfmmla), likewise
 *
 * cc -O1 -fsyntax-only cpu_features.c
 */
#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

unsigned refq4_cpu_features(void) {
    uint32_t a, b, c, d, b7, d7, a7_1 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* no OSXSAVE: XGETBV itself would fault */
    int fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d7)) return 0;
    if (a >= 1) {
        __get_cpuid_count(7, 1, &a, &b, &c, &d);
        a7_1 = a;
    }
    uint64_t saved = saved_registers();
    int ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xE6) == 0xE6, amx = (saved >> 17 & 3) == 3;
    int avx2 = ymm && fma && f16c && (b7 >> 5 & 1);
    int avx512 = avx2 && zmm && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);
    int bf16 = avx512 && (a7_1 >> 5 & 1);
    return (unsigned)(avx2 | avx512 << 1 | bf16 << 2 | (amx && (d7 >> 22 & 1)) << 3);
}
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
static unsigned has_fhm(void) { return getauxval(AT_HWCAP) >> 23 & 1; }   /* HWCAP_ASIMDFHM of <asm/hwcap.h> */
static unsigned has_bf16(void) { return getauxval(AT_HWCAP2) >> 14 & 1; } /* HWCAP2_BF16 */
#elif defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
static unsigned has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value == 1;
}
static unsigned has_fhm(void) { return has("hw.optional.arm.FEAT_FHM"); }
static unsigned has_bf16(void) { return has("hw.optional.arm.FEAT_BF16"); }
#else
static unsigned has_fhm(void) { return 0; }
static unsigned has_bf16(void) { return 0; }
#endif

unsigned refq4_cpu_features(void) { return 1u << 4 | has_fhm() << 5 | has_bf16() << 6; }
#else
unsigned refq4_cpu_features(void) { return 0; } /* the plain C tier */
#endif
