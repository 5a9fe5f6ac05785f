/* Checksums of a block: XXH3, 64 bits, of more than 240 bytes, without a seed.
 *
 * After the specification, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md;
 * the package xxhash says the same, block by block, and is what the tests compare with. */

#ifndef LLMD_CHECKS_H
#define LLMD_CHECKS_H

#include "copies.h"

#define STRIPE 64
#define SECRET 192
#define LEAST_BYTES 241

static const uint8_t secret[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21,
    0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4,
    0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a,
    0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e,
    0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3,
    0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97,
    0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa,
    0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16,
    0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc,
    0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16,
    0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

#define PRIME32_1 UINT64_C(0x9E3779B1)
#define PRIME32_2 UINT64_C(0x85EBCA77)
#define PRIME32_3 UINT64_C(0xC2B2AE3D)
#define PRIME64_1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME64_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define PRIME64_3 UINT64_C(0x165667B19E3779F9)
#define PRIME64_4 UINT64_C(0x85EBCA77C2B2AE63)
#define PRIME64_5 UINT64_C(0x27D4EB2F165667C5)
#define AVALANCHE UINT64_C(0x165667919E3779F9)

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    uint64_t lane[8];
} __attribute__((aligned(32))) Sums;

/* Add 64 bytes to the lanes: to each what is read for its neighbour, and the product of
 * the halves of its own, which a key has been mixed into. */
typedef void Add(Sums *, const uint8_t *, const uint8_t *);

static uint64_t
read64(const uint8_t *from)
{
    uint64_t word;
    memcpy(&word, from, 8);
    return word;
}

/* Copy what is checksummed to *to*, if that is anywhere, as long as it is near. */
INLINE uint64_t
checksum_by(const uint8_t *from, size_t bytes, char *to, Add add)
{
    const size_t stripes = (SECRET - STRIPE) / 8;
    const uint8_t *end = from + bytes, *last = end - STRIPE;
    size_t left = (bytes - 1) / STRIPE;
    Sums sums = {{PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2,
                  PRIME64_5, PRIME32_1}};
    for (; left >= stripes; left -= stripes) {
        for (size_t i = 0; i < stripes; i++, from += STRIPE) {
            __builtin_prefetch(from + 24 * STRIPE);
            add(&sums, from, secret + 8 * i);
        }
        for (int i = 0; i < 8; i++) {
            uint64_t lane = sums.lane[i] ^ sums.lane[i] >> 47;
            lane ^= read64(secret + SECRET - STRIPE + 8 * i);
            sums.lane[i] = lane * PRIME32_1;
        }
        if (to != NULL) {
            copy_block(to, (const char *)from - stripes * STRIPE, stripes * STRIPE);
            to += stripes * STRIPE;
        }
    }
    if (to != NULL)
        copy_block(to, (const char *)from, (size_t)(end - from));
    for (size_t i = 0; i < left; i++, from += STRIPE)
        add(&sums, from, secret + 8 * i);
    add(&sums, last, secret + SECRET - STRIPE - 7);
    uint64_t sum = bytes * PRIME64_1;
    for (int i = 0; i < 8; i += 2) {
        unsigned __int128 product = sums.lane[i] ^ read64(secret + 11 + 8 * i);
        product *= sums.lane[i + 1] ^ read64(secret + 19 + 8 * i);
        sum += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    sum = (sum ^ sum >> 37) * AVALANCHE;
    return sum ^ sum >> 32;
}

#ifdef __x86_64__
#include <immintrin.h>

INLINE void
add_128(Sums *sums, const uint8_t *from, const uint8_t *key)
{
    for (int i = 0; i < 4; i++) {
        __m128i *lanes = (__m128i *)sums->lane + i;
        __m128i data = _mm_loadu_si128((const __m128i *)from + i);
        __m128i own = _mm_xor_si128(data, _mm_loadu_si128((const __m128i *)key + i));
        own = _mm_mul_epu32(own, _mm_srli_epi64(own, 32));
        data = _mm_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        *lanes = _mm_add_epi64(*lanes, _mm_add_epi64(own, data));
    }
}

__attribute__((target("avx2"))) INLINE void
add_256(Sums *sums, const uint8_t *from, const uint8_t *key)
{
    for (int i = 0; i < 2; i++) {
        __m256i *lanes = (__m256i *)sums->lane + i;
        __m256i data = _mm256_loadu_si256((const __m256i *)from + i);
        __m256i own = _mm256_loadu_si256((const __m256i *)key + i);
        own = _mm256_xor_si256(own, data);
        own = _mm256_mul_epu32(own, _mm256_srli_epi64(own, 32));
        data = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        *lanes = _mm256_add_epi64(*lanes, _mm256_add_epi64(own, data));
    }
}

__attribute__((target("avx2"))) static uint64_t
checksum_256(const uint8_t *from, size_t bytes, char *to)
{
    if (to == NULL)
        return checksum_by(from, bytes, NULL, add_256);
    return checksum_by(from, bytes, to, add_256);
}

static uint64_t
checksum(const uint8_t *from, size_t bytes, char *to)
{
    if (__builtin_cpu_supports("avx2"))
        return checksum_256(from, bytes, to);
    return checksum_by(from, bytes, to, add_128);
}

#else

INLINE void
add_64(Sums *sums, const uint8_t *from, const uint8_t *key)
{
    for (int i = 0; i < 8; i++) {
        uint64_t data = read64(from + 8 * i), own = data ^ read64(key + 8 * i);
        sums->lane[i ^ 1] += data;
        sums->lane[i] += (own & 0xFFFFFFFF) * (own >> 32);
    }
}

static uint64_t
checksum(const uint8_t *from, size_t bytes, char *to)
{
    return checksum_by(from, bytes, to, add_64);
}

#endif

#endif
