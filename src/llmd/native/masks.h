/* Sets of workers as Python's ints, a bit for each. */

#ifndef LLMD_MASKS_H
#define LLMD_MASKS_H

#include "numbers.h"

static PyObject *
mask_of(const uint64_t *row, Py_ssize_t words)
{
    while (words > 1 && !row[words - 1])
        words--;
    if (words < 2)
        return PyLong_FromUnsignedLongLong(words ? row[0] : 0);
    return PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "y#s",
                               (const char *)row, 8 * words, "little");
}

/* Return the highest bit set in *mask*; -1 with an error for 0 and below. */
static Py_ssize_t
seat_of(PyObject *mask)
{
    int overflow;
    if (!PyLong_CheckExact(mask)) { /* whose methods might do anything */
        PyErr_SetString(PyExc_TypeError, "a worker is an int, a bit above 0");
        return -1;
    }
    long long bit = PyLong_AsLongLongAndOverflow(mask, &overflow);
    if (overflow > 0) {
        PyObject *length = PyObject_CallMethod(mask, "bit_length", NULL);
        Py_ssize_t seat = length ? PyLong_AsSsize_t(length) - 1 : -1;
        Py_XDECREF(length);
        return seat;
    }
    if (bit > 0)
        return 63 - __builtin_clzll(bit);
    PyErr_SetString(PyExc_ValueError, "a worker is a bit above 0");
    return -1;
}

/* Workers as words, lowest first: those of a small int lie here, others in the
 * bytes that Python made of them. */
typedef struct {
    uint64_t word;
    PyObject *bytes; /* NULL: `word` is all */
} Mask;

static int
mask_open(Mask *mask, PyObject *from)
{
    int overflow;
    mask->bytes = NULL;
    if (!PyLong_CheckExact(from)) { /* whose methods might do anything */
        PyErr_SetString(PyExc_TypeError, "workers are an int");
        return -1;
    }
    long long low = PyLong_AsLongLongAndOverflow(from, &overflow);
    if (overflow < 0 || (overflow == 0 && low < 0)) {
        PyErr_SetString(PyExc_ValueError, "workers are bits, not below 0");
        return -1;
    }
    mask->word = (uint64_t)low;
    if (overflow == 0)
        return 0;
    Py_ssize_t words = seat_of(from) / 64 + 1;
    mask->bytes = PyObject_CallMethod(from, "to_bytes", "ns", 8 * words, "little");
    return mask->bytes == NULL ? -1 : 0;
}

/* Write *mask* to a row, what goes beyond it left out. */
static void
mask_read(const Mask *mask, uint64_t *row, Py_ssize_t words)
{
    Py_ssize_t room = 8 * words, given = 8;
    const char *from = (const char *)&mask->word;
    if (mask->bytes != NULL) {
        from = PyBytes_AS_STRING(mask->bytes);
        given = PyBytes_GET_SIZE(mask->bytes);
    }
    memset(row, 0, room);
    memcpy(row, from, given < room ? given : room);
}

#endif
