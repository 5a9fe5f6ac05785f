/* Sets of workers.
 *
 * A set is a row of `words` 64-bit words, a bit for each worker.  There are few
 * different ones, so each is kept once, counted, and known by its number; 0 is
 * the empty set.
 */

#ifndef LLMD_SETS_H
#define LLMD_SETS_H

#include "numbers.h"

typedef struct {
    uint64_t *rows;
    uint32_t *uses;
    uint32_t *free; /* numbers to use again */
    uint32_t *slots; /* number by hash, linear probing; 0: empty */
    uint32_t count, capacity, free_count, mask;
    Py_ssize_t words;
    /* What was joined last, as the blocks of a prompt are alike. */
    uint32_t from, to;
    Py_ssize_t seat;
    int adds;
} Sets;

static inline uint64_t *
row_of(const Sets *sets, uint32_t set)
{
    return sets->rows + (size_t)set * sets->words;
}

static uint64_t
row_hash(const uint64_t *row, Py_ssize_t words)
{
    uint64_t hash = 0;
    for (Py_ssize_t word = 0; word < words; word++) {
        hash = (hash ^ row[word]) * UINT64_C(0x9E3779B97F4A7C15);
        hash = (hash ^ (hash >> 32)) * UINT64_C(0xD6E8FEB86659FD93);
        hash ^= hash >> 32; /* so that high bits, of high seats, count as well */
    }
    return hash;
}

static void
sets_place(Sets *sets, uint32_t set)
{
    uint32_t slot = row_hash(row_of(sets, set), sets->words) & sets->mask;
    while (sets->slots[slot])
        slot = (slot + 1) & sets->mask;
    sets->slots[slot] = set;
}

/* Make room for *capacity* sets of *words* words. */
static int
sets_resize(Sets *sets, uint32_t capacity, Py_ssize_t words)
{
    uint32_t places = 16;
    while (places < 2 * (uint64_t)capacity)
        places *= 2;
    uint64_t *rows = PyMem_Calloc((size_t)capacity * words, 8);
    uint32_t *uses = PyMem_Calloc(capacity, 4);
    uint32_t *unused = PyMem_Calloc(capacity, 4);
    uint32_t *slots = PyMem_Calloc(places, 4);
    if (rows == NULL || uses == NULL || unused == NULL || slots == NULL) {
        PyMem_Free(rows), PyMem_Free(uses), PyMem_Free(unused), PyMem_Free(slots);
        PyErr_NoMemory();
        return -1;
    }
    for (uint32_t set = 0; set < sets->count; set++) {
        memcpy(rows + (size_t)set * words, row_of(sets, set), 8 * sets->words);
        uses[set] = sets->uses[set];
    }
    if (sets->free_count)
        memcpy(unused, sets->free, 4 * (size_t)sets->free_count);
    PyMem_Free(sets->rows), PyMem_Free(sets->uses);
    PyMem_Free(sets->free), PyMem_Free(sets->slots);
    sets->rows = rows, sets->uses = uses, sets->free = unused, sets->slots = slots;
    sets->capacity = capacity, sets->words = words, sets->mask = places - 1;
    if (sets->count == 0)
        sets->count = 1; /* the empty set */
    for (uint32_t set = 1; set < sets->count; set++)
        if (uses[set])
            sets_place(sets, set);
    return 0;
}

static void
sets_free(Sets *sets)
{
    PyMem_Free(sets->rows), PyMem_Free(sets->uses);
    PyMem_Free(sets->free), PyMem_Free(sets->slots);
}

/* Return the number of *set* with, or without, the worker *seat*; `sets` has
 * room for one more. */
static uint32_t
sets_change(Sets *sets, uint32_t set, Py_ssize_t seat, int adds)
{
    if (sets->from == set && sets->seat == seat && sets->adds == adds && sets->to)
        return sets->to;
    uint32_t fresh = sets->free_count ? sets->free[sets->free_count - 1] : sets->count;
    uint64_t *row = row_of(sets, fresh);
    memcpy(row, row_of(sets, set), 8 * sets->words);
    uint64_t bit = UINT64_C(1) << (seat & 63);
    if (adds)
        row[seat >> 6] |= bit;
    else
        row[seat >> 6] &= ~bit;
    uint64_t hash = row_hash(row, sets->words);
    if (hash == 0 && memcmp(row, row_of(sets, 0), 8 * sets->words) == 0)
        return 0;
    uint32_t slot = hash & sets->mask, found;
    while ((found = sets->slots[slot])) {
        if (memcmp(row_of(sets, found), row, 8 * sets->words) == 0)
            break;
        slot = (slot + 1) & sets->mask;
    }
    if (!found) {
        sets->slots[slot] = found = fresh;
        sets->uses[found] = 0;
        if (sets->free_count)
            sets->free_count--;
        else
            sets->count++;
    }
    sets->from = set, sets->seat = seat, sets->adds = adds, sets->to = found;
    return found;
}

static void
sets_drop(Sets *sets, uint32_t set)
{
    if (--sets->uses[set])
        return;
    uint32_t hole = row_hash(row_of(sets, set), sets->words) & sets->mask;
    while (sets->slots[hole] != set)
        hole = (hole + 1) & sets->mask;
    for (uint32_t next = (hole + 1) & sets->mask; sets->slots[next];
         next = (next + 1) & sets->mask) {
        uint32_t home =
            row_hash(row_of(sets, sets->slots[next]), sets->words) & sets->mask;
        if (((next - home) & sets->mask) >= ((next - hole) & sets->mask)) {
            sets->slots[hole] = sets->slots[next];
            hole = next;
        }
    }
    sets->slots[hole] = 0;
    sets->free[sets->free_count++] = set;
    sets->to = 0;
}

#endif
