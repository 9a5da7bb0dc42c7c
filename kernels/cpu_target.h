// Lets one file of a library use instructions that the library as a whole must not assume.
//
//   BEITV2_FAST_TARGET_BEGIN("avx2,fma")
//   ... code ...
//   BEITV2_FAST_TARGET_END
//
// Inside, include nothing but headers of this folder: an inline function of the standard library compiled here with
// wider instructions could be the copy that the linker keeps for everybody.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define BEITV2_FAST_X86 1
#ifndef __clang__  // GCC 12 warns about its own _mm512_undefined_*: gcc.gnu.org/PR105593
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#else
#define BEITV2_FAST_X86 0
#endif

#if defined(__clang__)
#define BEITV2_FAST_COMPILES_AVX512 (BEITV2_FAST_X86 && __clang_major__ >= 9)
#define BEITV2_FAST_COMPILES_VNNI (BEITV2_FAST_X86 && __clang_major__ >= 9)
#define BEITV2_FAST_PRAGMA(text) _Pragma(#text)
#define BEITV2_FAST_TARGET_BEGIN(features) \
  BEITV2_FAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BEITV2_FAST_TARGET_END _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define BEITV2_FAST_COMPILES_AVX512 (BEITV2_FAST_X86 && __GNUC__ >= 8)
#define BEITV2_FAST_COMPILES_VNNI (BEITV2_FAST_X86 && __GNUC__ >= 8)
#define BEITV2_FAST_PRAGMA(text) _Pragma(#text)
#define BEITV2_FAST_TARGET_BEGIN(features) _Pragma("GCC push_options") BEITV2_FAST_PRAGMA(GCC target(features))
#define BEITV2_FAST_TARGET_END _Pragma("GCC pop_options")
#else
#define BEITV2_FAST_COMPILES_AVX512 0
#define BEITV2_FAST_COMPILES_VNNI 0
#endif
