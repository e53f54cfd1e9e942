/* The vector instructions, from the compiler, or emulated where the processor lacks them (REFQ4_EMULATED).
 *
 * cc -O3 -mavx2 -mfma -mf16c -DREFQ4_AVX2 -fsyntax-only simd.h
 */
#ifndef SIMD_H
#define SIMD_H
#ifdef REFQ4_EMULATED
#include "emulated_simd.h"
/* An emulated vector is in no register, and a loop around it that stays one compiles several times as fast. */
#define KEEP_IN_REGISTERS(...)
#define UNROLL
#else
#include <immintrin.h>
/* Tells the compiler that these operands are needed in registers here. */
#define KEEP_IN_REGISTERS(...) __asm__ volatile("" : __VA_ARGS__)
/* Before a loop of a few known steps: all of them in a row, so that the vectors of an array are registers. */
#define UNROLL _Pragma("GCC unroll 16")
#endif
#endif
