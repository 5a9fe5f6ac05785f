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
        for (Py_ssize_t word = 0; word < sets->words && word < all->words; word++)
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

/* Takes a group of workers and the leading names that they hold. */
typedef int (*Emit)(void *to, const uint64_t *row, Py_ssize_t words, Py_ssize_t depth);

#define MOST_STEPS 64 /* halvings of what fits in memory */

/* Bisect for the depths at which the set of holders shrinks: `at` holds the
 * names up to *low*, `right` those up to *high*; what was seen further right
 * waits on a stack. */
static int
search(const Union *all, const Numbers *names, uint64_t *scratch, Emit emit, void *to)
{
    Py_ssize_t words = all->words, low = 0, high = names->count - 1, ahead = 0;
    uint64_t *at = scratch, *right = at + words, *middle = right + words,
             *stack = middle + words, name;
    Py_ssize_t places[MOST_STEPS];
    if (numbers_at(names, 0, &name) < 0)
        return -1;
    find_in(all, name, at, middle);
    memcpy(at, middle, 8 * words);
    if (numbers_at(names, high, &name) < 0)
        return -1;
    find_in(all, name, at, right);
    while (!empty(at, words)) {
        while (high - low > 1 && !same(at, right, words)) {
            Py_ssize_t half = (low + high) >> 1;
            if (numbers_at(names, half, &name) < 0)
                return -1;
            find_in(all, name, at, middle);
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
            if (emit(to, middle, words, low + 1) < 0)
                return -1;
            memcpy(at, right, 8 * words);
        }
        low = high;
        if (!ahead)
            break;
        high = places[--ahead];
        for (Py_ssize_t word = 0; word < words; word++)
            right[word] = stack[ahead * words + word] & at[word];
    }
    return empty(at, words) ? 0 : emit(to, at, words, names->count);
}

/* Search *names* among the workers *alive*, in *self* and *others*. */
static int
depths_in(Table *self, PyObject *from, PyObject *alive, PyObject *others,
          PyTypeObject *type, Emit emit, void *to)
{
    Table *tables[8] = {self};
    if (!PyTuple_Check(others) || PyTuple_GET_SIZE(others) > 7) {
        PyErr_SetString(PyExc_TypeError, "want a tuple of at most 7 tables");
        return -1;
    }
    Numbers names;
    Mask mask;
    if (mask_open(&mask, alive) < 0)
        return -1;
    if (numbers_open(&names, from) < 0) {
        Py_XDECREF(mask.bytes);
        return -1;
    }
    /* What is below runs no Python before the first group is told, so that the
     * tables stay as they are; its memory is its own, as a group may be told to
     * one who looks again. */
    int failed = -1;
    Union all = {tables, 1, self->sets.words};
    for (Py_ssize_t other = 0; other < PyTuple_GET_SIZE(others); other++) {
        PyObject *table = PyTuple_GET_ITEM(others, other);
        if (!PyObject_TypeCheck(table, type)) {
            PyErr_SetString(PyExc_TypeError, "others must be tables");
            goto done;
        }
        tables[all.count++] = (Table *)table;
        if (((Table *)table)->sets.words > all.words)
            all.words = ((Table *)table)->sets.words;
    }
    uint64_t few[4 * (3 + MOST_STEPS)], *scratch = few;
    if (all.words > 4)
        scratch = PyMem_Malloc(8 * (3 + MOST_STEPS) * all.words);
    if (scratch == NULL) {
        PyErr_NoMemory();
    } else if (names.items != NULL) { /* whose __index__ might come back here */
        PyErr_SetString(PyExc_TypeError, "want names as an array");
    } else {
        mask_read(&mask, scratch, all.words);
        failed = names.count ? search(&all, &names, scratch, emit, to) : 0;
    }
    if (scratch != few)
        PyMem_Free(scratch);
done:
    numbers_close(&names);
    Py_XDECREF(mask.bytes);
    return failed;
}

#endif
