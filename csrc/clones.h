#pragma once

// A wheel must run on every x86-64, so the inner loops are compiled once per instruction set and chosen when loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FASTM3AE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTM3AE_CLONES
#endif
