/* From a name to a set of workers.
 *
 * Entries stand in the order in which they came, as in a dict, so that the
 * oldest can go; a removed one keeps its place, with the empty set, until the
 * next growth.
 */

#ifndef LLMD_TABLE_H
#define LLMD_TABLE_H

#include "sets.h"

typedef struct {
    PyObject_HEAD
    Sets sets;
    uint64_t *names;
    uint32_t *holders;
    uint32_t *slots; /* entry + 1 by hash, linear probing; 0: empty */
    uint32_t count, capacity, live, mask;
} Table;

#define MOST_ENTRIES (UINT32_C(1) << 31)

static inline uint32_t
home_of(const Table *table, uint64_t name)
{
    return (uint32_t)((name * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & table->mask;
}

/* Return the slot of *name*, or the empty one where it would stand. */
static inline uint32_t
slot_of(const Table *table, uint64_t name)
{
    uint32_t slot = home_of(table, name), entry;
    while ((entry = table->slots[slot]) && table->names[entry - 1] != name)
        slot = (slot + 1) & table->mask;
    return slot;
}

static inline uint32_t
set_of(const Table *table, uint64_t name)
{
    uint32_t entry = table->slots[slot_of(table, name)];
    return entry ? table->holders[entry - 1] : 0;
}

/* Drop removed entries, and make room for a half more than is left. */
static int
table_grow(Table *table)
{
    uint64_t capacity = (uint64_t)table->live + table->live / 2 + 32, places = 64;
    while (places < capacity + capacity / 3)
        places *= 2;
    if (capacity > MOST_ENTRIES) {
        PyErr_SetString(PyExc_MemoryError, "too many names");
        return -1;
    }
    uint64_t *names = PyMem_Malloc(8 * capacity);
    uint32_t *holders = PyMem_Malloc(4 * capacity);
    uint32_t *slots = PyMem_Calloc(places, 4);
    if (names == NULL || holders == NULL || slots == NULL) {
        PyMem_Free(names), PyMem_Free(holders), PyMem_Free(slots);
        PyErr_NoMemory();
        return -1;
    }
    uint32_t kept = 0;
    for (uint32_t entry = 0; entry < table->count; entry++)
        if (table->holders[entry]) {
            names[kept] = table->names[entry];
            holders[kept++] = table->holders[entry];
        }
    PyMem_Free(table->names), PyMem_Free(table->holders), PyMem_Free(table->slots);
    table->names = names, table->holders = holders, table->slots = slots;
    table->count = kept, table->capacity = (uint32_t)capacity;
    table->mask = (uint32_t)places - 1;
    for (uint32_t entry = 0; entry < kept; entry++)
        slots[slot_of(table, names[entry])] = entry + 1;
    return 0;
}

static int
table_reserve(Table *table, Py_ssize_t seat)
{
    Sets *sets = &table->sets;
    Py_ssize_t words = seat / 64 + 1 > sets->words ? seat / 64 + 1 : sets->words;
    if (words > sets->words || (!sets->free_count && sets->count == sets->capacity)) {
        uint32_t capacity = sets->capacity + sets->capacity / 2 + 16;
        if (sets_resize(sets, capacity, words) < 0)
            return -1;
    }
    return table->count == table->capacity ? table_grow(table) : 0;
}

/* Return whether *name* was not held by *seat* before; -1 on failure. */
static int
table_add(Table *table, Py_ssize_t seat, uint64_t name)
{
    Sets *sets = &table->sets;
    if (table_reserve(table, seat) < 0)
        return -1;
    uint32_t slot = slot_of(table, name), entry = table->slots[slot], old = 0;
    if (entry) {
        old = table->holders[entry - 1];
        if (row_of(sets, old)[seat >> 6] >> (seat & 63) & 1)
            return 0;
    } else {
        entry = table->slots[slot] = ++table->count;
        table->names[entry - 1] = name;
        table->live++;
    }
    uint32_t set = sets_change(sets, old, seat, 1);
    sets->uses[set]++;
    table->holders[entry - 1] = set;
    if (old)
        sets_drop(sets, old);
    return 1;
}

static void
table_delete(Table *table, uint32_t hole)
{
    table->holders[table->slots[hole] - 1] = 0;
    table->live--;
    for (uint32_t next = (hole + 1) & table->mask; table->slots[next];
         next = (next + 1) & table->mask) {
        uint32_t home = home_of(table, table->names[table->slots[next] - 1]);
        if (((next - home) & table->mask) >= ((next - hole) & table->mask)) {
            table->slots[hole] = table->slots[next];
            hole = next;
        }
    }
    table->slots[hole] = 0;
}

static int
table_discard(Table *table, Py_ssize_t seat, uint64_t name)
{
    Sets *sets = &table->sets;
    if (seat >= 64 * sets->words)
        return 0;
    if (table_reserve(table, seat) < 0)
        return -1;
    uint32_t slot = slot_of(table, name), entry = table->slots[slot];
    if (!entry)
        return 0;
    uint32_t old = table->holders[entry - 1];
    if (!(row_of(sets, old)[seat >> 6] >> (seat & 63) & 1))
        return 0;
    uint32_t set = sets_change(sets, old, seat, 0);
    if (set) {
        sets->uses[set]++;
        table->holders[entry - 1] = set;
    } else {
        table_delete(table, slot);
    }
    sets_drop(sets, old);
    return 1;
}

#endif
