/* The vector instructions, from the compiler, or emulated where the processor lacks them (REFQ4_EMULATED).
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only simd.h
 */
#ifndef SIMD_H
#define SIMD_H
#ifdef REFQ4_EMULATED
#ifdef REFQ4_NEON
#include "emulated_neon.h"
#else
#include "emulated_simd.h"
#endif
/* An emulated vector is in no register, and a loop around it that stays one compiles several times as fast. */
#define KEEP_IN_REGISTERS(...)
#define UNROLL
#else
#ifdef REFQ4_NEON
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif
/* Tells the compiler that these operands are needed in registers here. */
#define KEEP_IN_REGISTERS(...) __asm__ volatile("" : __VA_ARGS__)
/* Before a loop of a few known steps: all of them in a row, so that the vectors of an array are registers. */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#endif
#endif
