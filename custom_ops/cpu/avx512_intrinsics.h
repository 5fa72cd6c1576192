// The intrinsics, for the files that are compiled for AVX-512.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// Their own "undefined" values look uninitialized to GCC 12 (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>
