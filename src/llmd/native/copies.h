/* Copies of a block. */

#ifndef LLMD_COPIES_H
#define LLMD_COPIES_H

#include "numbers.h"

#ifdef __SSE2__
#include <emmintrin.h>

/* Past the cache, whose lines a plain copy reads before it overwrites them.  The
 * one to read the block next is another core, which finds it in memory sooner than
 * in the cache of this one. */
static void
copy_block(char *to, const char *from, size_t bytes)
{
    if (bytes % 64 != 0 || (uintptr_t)to % 16 != 0) {
        memcpy(to, from, bytes);
        return;
    }
    for (size_t i = 0; i < bytes; i += 64) {
        const __m128i *line = (const __m128i *)(from + i);
        __m128i *into = (__m128i *)(to + i);
        __m128i parts[4] = {_mm_loadu_si128(line), _mm_loadu_si128(line + 1),
                            _mm_loadu_si128(line + 2), _mm_loadu_si128(line + 3)};
        for (int part = 0; part < 4; part++)
            _mm_stream_si128(into + part, parts[part]);
    }
}

/* What was written so is there before what is written later. */
static void
copied(void)
{
    _mm_sfence();
}

#else
#define copy_block memcpy
#define copied()
#endif

#endif
