/* The inner loops of an arrival, naming prefixes, sets of workers by name, and
 * what a prompt delays; and of a transfer, copies of blocks and what is said of them.
 *
 * All but the last has a twin in Python, `hashing.Hasher`,
 * `index.holders.PlainHolders`, `router.delay.LeastDelay`,
 * `adapters.nixl.blocks.copy_in_python` and `transport.frames.pack_in_python`, which
 * says what is meant, runs where no compiler was at hand, and is what the tests
 * compare with.  Without rings NIXL carries what is said.  Only the buffer protocol is
 * used, so building needs Python's own headers and no others.
 */

#define PY_SSIZE_T_CLEAN
#include "blocks.h"
#include "delays.h"
#include "depths.h"
#include "frames.h"
#include "names.h"
#include "rings.h"

static PyTypeObject TableType;

/* Depths --------------------------------------------------------------------- */

#define MOST_TABLES 8

/* Write *self* and *others* to *tables*; return how many, or -1. */
static Py_ssize_t
tables_of(Table *self, PyObject *others, Table **tables)
{
    if (!PyTuple_Check(others) || PyTuple_GET_SIZE(others) >= MOST_TABLES) {
        PyErr_Format(PyExc_TypeError, "want a tuple of under %d tables", MOST_TABLES);
        return -1;
    }
    tables[0] = self;
    for (Py_ssize_t other = 0; other < PyTuple_GET_SIZE(others); other++) {
        PyObject *table = PyTuple_GET_ITEM(others, other);
        if (!PyObject_TypeCheck(table, &TableType)) {
            PyErr_SetString(PyExc_TypeError, "others must be tables");
            return -1;
        }
        tables[other + 1] = (Table *)table;
    }
    return 1 + PyTuple_GET_SIZE(others);
}

PyDoc_STRVAR(raise_to_doc,
"raise_to($self, names, alive, others, held, rows, worth, fine, first, /)\n--\n\n"
"Raise held[rows[worker], first:] to what the worker's depth is worth: *worth* for\n"
"each of the first *fine* names, *fine* times as much for each that follows.");

static PyObject *
Table_raise_to(Table *self, PyObject *const *args, Py_ssize_t given)
{
    Table *tables[MOST_TABLES];
    Numbers names;
    Mask alive = {0};
    Py_buffer held = {0}, rows = {0};
    int failed = -1;
    if (want_arguments("raise_to", given, 8) < 0)
        return NULL;
    Py_ssize_t count = tables_of(self, args[2], tables);
    Goal goal = {.worth = PyLong_AsLongLong(args[5]),
                 .fine = PyLong_AsLongLong(args[6]),
                 .first = PyLong_AsSsize_t(args[7])};
    if (count < 0 || PyErr_Occurred() || numbers_open(&names, args[0]) < 0)
        return NULL;
    if (mask_open(&alive, args[1]) < 0 || open_output(&held, args[3], 0) < 0 ||
        PyObject_GetBuffer(args[4], &rows, PyBUF_CONTIG_RO) < 0)
        goto done;
    if (names.items != NULL) {
        PyErr_SetString(PyExc_TypeError, "want names as an array");
    } else if (held.ndim != 2 || rows.itemsize != 8 || goal.first < 0) {
        PyErr_SetString(PyExc_ValueError, "want held of (W, tiers) and rows of 8 bytes");
    } else {
        goal.held = held.buf, goal.rows = rows.buf, goal.seats = rows.len / 8;
        goal.workers = held.shape[0], goal.columns = held.shape[1];
        failed = raise_all(tables, count, &names, &alive, &goal);
    }
done:
    if (rows.obj != NULL)
        PyBuffer_Release(&rows);
    if (held.obj != NULL)
        PyBuffer_Release(&held);
    Py_XDECREF(alive.bytes);
    numbers_close(&names);
    return failed ? NULL : Py_NewRef(Py_None);
}

/* The type --------------------------------------------------------------------- */

PyDoc_STRVAR(add_doc,
"add($self, bit, names, /)\n--\n\n"
"Let the worker *bit* hold *names*; return those new to it, 8 bytes each.");

static PyObject *
Table_add(Table *self, PyObject *const *args, Py_ssize_t given)
{
    Numbers names;
    if (want_arguments("add", given, 2) < 0)
        return NULL;
    Py_ssize_t seat = seat_of(args[0]);
    if (seat < 0 || numbers_open(&names, args[1]) < 0)
        return NULL;
    PyObject *new = PyBytes_FromStringAndSize(NULL, 8 * names.count);
    Py_ssize_t fresh = 0;
    for (Py_ssize_t place = 0; new != NULL && place < names.count; place++) {
        uint64_t name;
        int added = -1;
        if (numbers_at(&names, place, &name) == 0)
            added = table_add(self, seat, name);
        if (added < 0)
            Py_CLEAR(new);
        else if (added)
            memcpy(PyBytes_AS_STRING(new) + 8 * fresh++, &name, 8);
    }
    if (new != NULL && fresh < names.count)
        _PyBytes_Resize(&new, 8 * fresh);
    numbers_close(&names);
    return new;
}

PyDoc_STRVAR(discard_doc,
"discard($self, bit, names, /)\n--\n\nLet the worker *bit* hold *names* no more.");

static PyObject *
Table_discard(Table *self, PyObject *const *args, Py_ssize_t given)
{
    Numbers names;
    if (want_arguments("discard", given, 2) < 0)
        return NULL;
    if (PyLong_Check(args[0]) && PyObject_Not(args[0]))
        return Py_NewRef(Py_None);
    Py_ssize_t seat = seat_of(args[0]);
    if (seat < 0 || numbers_open(&names, args[1]) < 0)
        return NULL;
    int failed = 0;
    for (Py_ssize_t place = 0; !failed && place < names.count; place++) {
        uint64_t name;
        failed = numbers_at(&names, place, &name) < 0 ||
                 table_discard(self, seat, name) < 0;
    }
    numbers_close(&names);
    return failed ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(kept_doc,
"kept($self, bit, names, /)\n--\n\n"
"Return those of *names*, each once, that the worker *bit* holds, 8 bytes each.");

static PyObject *
Table_kept(Table *self, PyObject *const *args, Py_ssize_t given)
{
    Numbers names;
    if (want_arguments("kept", given, 2) < 0)
        return NULL;
    Py_ssize_t seat = seat_of(args[0]), found = 0;
    if (seat < 0 || numbers_open(&names, args[1]) < 0)
        return NULL;
    uint64_t places = 64;
    while (places < 2 * (uint64_t)names.count)
        places *= 2;
    PyObject *kept = PyBytes_FromStringAndSize(NULL, 8 * names.count);
    uint32_t *seen = PyMem_Calloc(places, 4); /* place in *kept* + 1, by hash */
    if (kept == NULL || seen == NULL) {
        Py_CLEAR(kept);
        PyErr_NoMemory();
    }
    for (Py_ssize_t place = 0; kept != NULL && place < names.count; place++) {
        uint64_t name, other;
        if (numbers_at(&names, place, &name) < 0) {
            Py_CLEAR(kept);
            break;
        }
        if (seat >= 64 * self->sets.words ||
            !(row_of(&self->sets, set_of(self, name))[seat >> 6] >> (seat & 63) & 1))
            continue;
        char *into = PyBytes_AS_STRING(kept);
        uint64_t slot = (name * UINT64_C(0x9E3779B97F4A7C15)) >> 32 & (places - 1);
        for (; seen[slot]; slot = (slot + 1) & (places - 1)) {
            memcpy(&other, into + 8 * (Py_ssize_t)(seen[slot] - 1), 8);
            if (other == name)
                break;
        }
        if (!seen[slot]) {
            memcpy(into + 8 * found, &name, 8);
            seen[slot] = (uint32_t)++found;
        }
    }
    PyMem_Free(seen);
    numbers_close(&names);
    if (kept != NULL)
        _PyBytes_Resize(&kept, 8 * found);
    return kept;
}

PyDoc_STRVAR(find_doc,
"find($self, name, default, /)\n--\n\nReturn who holds *name*, as `dict.get` does.");

static PyObject *
Table_find(Table *self, PyObject *const *args, Py_ssize_t given)
{
    uint64_t name;
    if (want_arguments("find", given, 2) < 0 || number_of(args[0], &name) < 0)
        return NULL;
    uint32_t set = set_of(self, name);
    return set ? mask_of(row_of(&self->sets, set), self->sets.words) : Py_NewRef(args[1]);
}

PyDoc_STRVAR(trim_doc,
"trim($self, blocks, /)\n--\n\nDrop the oldest names until *blocks* are left.");

static PyObject *
Table_trim(Table *self, PyObject *blocks)
{
    Py_ssize_t keep = PyLong_AsSsize_t(blocks);
    if (keep == -1 && PyErr_Occurred())
        return NULL;
    for (uint32_t entry = 0; entry < self->count && self->live > keep; entry++) {
        uint32_t set = self->holders[entry];
        if (set) {
            table_delete(self, slot_of(self, self->names[entry]));
            sets_drop(&self->sets, set);
        }
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(items_doc,
"items($self, /)\n--\n\nReturn (name, holders) pairs, the oldest first.");

static PyObject *
Table_items(Table *self, PyObject *nothing)
{
    PyObject *items = PyList_New(0);
    for (uint32_t entry = 0; items != NULL && entry < self->count; entry++) {
        uint32_t set = self->holders[entry];
        unsigned long long name = self->names[entry];
        if (!set)
            continue;
        PyObject *mask = mask_of(row_of(&self->sets, set), self->sets.words);
        PyObject *pair = mask ? Py_BuildValue("(KN)", name, mask) : NULL;
        if (pair == NULL || PyList_Append(items, pair) < 0)
            Py_CLEAR(items);
        Py_XDECREF(pair);
    }
    return items;
}

PyDoc_STRVAR(state_doc,
"state($self, /)\n--\n\nReturn (words, sets, names, set of each name) for `restore`.");

static PyObject *
Table_state(Table *self, PyObject *nothing)
{
    if (table_grow(self) < 0) /* so that no entry is a removed one */
        return NULL;
    const Sets *sets = &self->sets;
    return Py_BuildValue("(ny#y#y#)", sets->words, (const char *)sets->rows,
                         8 * (Py_ssize_t)sets->count * sets->words,
                         (const char *)self->names, 8 * (Py_ssize_t)self->count,
                         (const char *)self->holders, 4 * (Py_ssize_t)self->count);
}

PyDoc_STRVAR(restore_doc,
"restore($self, state, /)\n--\n\nFill an empty table with the *state* of another.");

static PyObject *
Table_restore(Table *self, PyObject *state)
{
    Py_ssize_t words, rows_size, names_size, holders_size;
    const char *rows, *names, *holders;
    if (!PyArg_ParseTuple(state, "ny#y#y#", &words, &rows, &rows_size, &names,
                          &names_size, &holders, &holders_size))
        return NULL;
    Py_ssize_t count = names_size / 8, sets = words > 0 ? rows_size / 8 / words : 0;
    if (self->count || sets < 1 || sets > UINT32_MAX / 2 ||
        count > MOST_ENTRIES || holders_size != 4 * count) {
        PyErr_SetString(PyExc_ValueError, "not the state of a table");
        return NULL;
    }
    /* Entry by entry, so that a state that makes no sense does no harm. */
    for (Py_ssize_t entry = 0; entry < count; entry++) {
        uint64_t name, word;
        uint32_t set;
        memcpy(&name, names + 8 * entry, 8);
        memcpy(&set, holders + 4 * entry, 4);
        for (Py_ssize_t place = 0; set < sets && place < words; place++) {
            memcpy(&word, rows + 8 * (set * words + place), 8);
            for (; word; word &= word - 1)
                if (table_add(self, 64 * place + __builtin_ctzll(word), name) < 0)
                    return NULL;
        }
    }
    Py_RETURN_NONE;
}

static Py_ssize_t
Table_len(Table *self)
{
    return self->live;
}

static PyObject *
Table_new(PyTypeObject *type, PyObject *args, PyObject *names)
{
    Table *self = (Table *)type->tp_alloc(type, 0);
    if (self != NULL && (sets_resize(&self->sets, 16, 1) < 0 || table_grow(self) < 0))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void
Table_dealloc(Table *self)
{
    sets_free(&self->sets);
    PyMem_Free(self->names), PyMem_Free(self->holders), PyMem_Free(self->slots);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *
Table_sizeof(Table *self, PyObject *nothing)
{
    size_t size = sizeof(Table);
    size += 12 * (size_t)self->capacity + 4 * ((size_t)self->mask + 1);
    size += (size_t)self->sets.capacity * (8 * self->sets.words + 8);
    size += 4 * ((size_t)self->sets.mask + 1);
    return PyLong_FromSize_t(size);
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL

static PyMethodDef Table_methods[] = {
    {"add", FAST(Table_add), add_doc},
    {"discard", FAST(Table_discard), discard_doc},
    {"kept", FAST(Table_kept), kept_doc},
    {"find", FAST(Table_find), find_doc},
    {"raise_to", FAST(Table_raise_to), raise_to_doc},
    {"trim", (PyCFunction)Table_trim, METH_O, trim_doc},
    {"state", (PyCFunction)Table_state, METH_NOARGS, state_doc},
    {"restore", (PyCFunction)Table_restore, METH_O, restore_doc},
    {"items", (PyCFunction)Table_items, METH_NOARGS, items_doc},
    {"__sizeof__", (PyCFunction)Table_sizeof, METH_NOARGS, NULL},
    {NULL},
};

static PySequenceMethods Table_sequence = {.sq_length = (lenfunc)Table_len};

static PyTypeObject TableType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "llmd.native._loops.Table",
    .tp_doc = PyDoc_STR("Sets of workers, as bits of an int, by 64-bit name."),
    .tp_basicsize = sizeof(Table),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = Table_new,
    .tp_dealloc = (destructor)Table_dealloc,
    .tp_methods = Table_methods,
    .tp_as_sequence = &Table_sequence,
};

static PyMethodDef functions[] = {
    {"block_sums", FAST(block_sums), block_sums_doc},
    {"copy_blocks", FAST(copy_blocks), copy_blocks_doc},
    {"token_ids", FAST(token_ids), token_ids_doc},
    {"fold", FAST(fold), fold_doc},
    {"beyond", (PyCFunction)beyond, METH_O, beyond_doc},
    {"delays", FAST(delays), delays_doc},
    {"frame_pack", FAST(frame_pack), frame_pack_doc},
    {"frame_unpack", FAST(frame_unpack), frame_unpack_doc},
    {"ring_put", FAST(ring_put), ring_put_doc},
    {"ring_take", FAST(ring_take), ring_take_doc},
    {"watch", FAST(watch), watch_doc},
    {"ring", FAST(ring), ring_doc},
    {NULL},
};

static int
execute(PyObject *module)
{
    return PyModule_AddType(module, &TableType);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "llmd.native._loops",
    .m_doc = "The inner loops of an arrival.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__loops(void)
{
    return PyModuleDef_Init(&definition);
}
