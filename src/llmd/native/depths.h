/* Who holds how much of a prompt, by bisection.
 *
 * Whoever holds a prefix holds all shorter ones, so the set of holders only
 * shrinks along a prompt.
 */

#ifndef LLMD_DEPTHS_H
#define LLMD_DEPTHS_H

#include "masks.h"
#include "table.h"

/* Several tables that count as one. */
typedef struct {
    Table **tables;
    Py_ssize_t count, words;
} Union;

static void
find_in(const Union *all, uint64_t name, const uint64_t *within, uint64_t *row)
{
    const Sets *sets = &all->tables[0]->sets;
    const uint64_t *first = row_of(sets, set_of(all->tables[0], name));
    for (Py_ssize_t word = 0; word < all->words; word++)
        row[word] = word < sets->words ? first[word] : 0;
    for (Py_ssize_t other = 1; other < all->count; other++) {
        sets = &all->tables[other]->sets;
        first = row_of(sets, set_of(all->tables[other], name));
        for (Py_ssize_t word = 0; word < sets->words; word++)
            row[word] |= first[word];
    }
    for (Py_ssize_t word = 0; word < all->words; word++)
        row[word] &= within[word];
}

static inline int
same(const uint64_t *left, const uint64_t *right, Py_ssize_t words)
{
    return memcmp(left, right, 8 * words) == 0;
}

static inline int
empty(const uint64_t *row, Py_ssize_t words)
{
    for (Py_ssize_t word = 0; word < words; word++)
        if (row[word])
            return 0;
    return 1;
}

/* Where depths are written, and what they are worth. */
typedef struct {
    int64_t *held;       /* (workers, columns) */
    const int64_t *rows; /* of each worker in it; below 0: not wanted */
    Py_ssize_t workers, columns, seats, first;
    int64_t worth, fine;
} Goal;

/* Raise the workers *row* to what *depth* names are worth. */
static void
raise_row(const Goal *goal, const uint64_t *row, Py_ssize_t words, Py_ssize_t depth)
{
    int64_t coarse = depth > goal->fine ? depth - goal->fine : 0;
    int64_t worth = goal->worth * (depth - coarse + coarse * goal->fine);
    for (Py_ssize_t word = 0; word < words; word++)
        for (uint64_t bits = row[word]; bits; bits &= bits - 1) {
            Py_ssize_t seat = 64 * word + __builtin_ctzll(bits);
            int64_t place = seat < goal->seats ? goal->rows[seat] : -1;
            if (place < 0 || place >= goal->workers)
                continue;
            int64_t *held = goal->held + place * goal->columns;
            for (Py_ssize_t column = goal->first; column < goal->columns; column++)
                if (held[column] < worth)
                    held[column] = worth;
        }
}

#define MOST_STEPS 64 /* halvings of what fits in memory */

static inline uint64_t
name_at(const Numbers *names, Py_ssize_t place)
{
    uint64_t name;
    memcpy(&name, (const char *)names->view.buf + place * names->stride, 8);
    return name;
}

/* Bisect for the depths at which the set of holders shrinks: `at` holds the
 * names up to *low*, `right` those up to *high*; what was seen further right
 * waits on a stack. */
static void
search(const Union *all, const Numbers *names, uint64_t *scratch, const Goal *goal)
{
    Py_ssize_t words = all->words, low = 0, high = names->count - 1, ahead = 0;
    uint64_t *at = scratch, *right = at + words, *middle = right + words,
             *stack = middle + words;
    Py_ssize_t places[MOST_STEPS];
    find_in(all, name_at(names, 0), at, middle);
    memcpy(at, middle, 8 * words);
    find_in(all, name_at(names, high), at, right);
    while (!empty(at, words)) {
        while (high - low > 1 && !same(at, right, words)) {
            Py_ssize_t half = (low + high) >> 1;
            find_in(all, name_at(names, half), at, middle);
            if (same(middle, at, words)) {
                low = half;
                continue;
            }
            memcpy(stack + ahead * words, right, 8 * words);
            places[ahead++] = high;
            memcpy(right, middle, 8 * words);
            high = half;
        }
        if (!same(at, right, words)) {
            for (Py_ssize_t word = 0; word < words; word++)
                middle[word] = at[word] & ~right[word];
            raise_row(goal, middle, words, low + 1);
            memcpy(at, right, 8 * words);
        }
        low = high;
        if (!ahead)
            break;
        high = places[--ahead];
        for (Py_ssize_t word = 0; word < words; word++)
            right[word] = stack[ahead * words + word] & at[word];
    }
    raise_row(goal, at, words, names->count);
}

/* Search *names* among the workers *alive* in *tables*, *count* of them.  Runs no
 * Python, so the tables stay as they are. */
static int
raise_all(Table **tables, Py_ssize_t count, const Numbers *names, const Mask *alive,
          const Goal *goal)
{
    Union all = {tables, count, 0};
    for (Py_ssize_t table = 0; table < count; table++)
        if (tables[table]->sets.words > all.words)
            all.words = tables[table]->sets.words;
    uint64_t few[4 * (3 + MOST_STEPS)], *scratch = few;
    if (all.words > 4)
        scratch = PyMem_Malloc(8 * (3 + MOST_STEPS) * all.words);
    if (scratch == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    mask_read(alive, scratch, all.words);
    if (names->count)
        search(&all, names, scratch, goal);
    if (scratch != few)
        PyMem_Free(scratch);
    return 0;
}

#endif
