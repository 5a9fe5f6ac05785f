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
    long long bit = PyLong_AsLongLongAndOverflow(mask, &overflow);
    if (bit == -1 && PyErr_Occurred())
        return -1;
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

/* Write *mask* to *row*, what goes beyond it left out. */
static int
read_mask(PyObject *mask, uint64_t *row, Py_ssize_t words)
{
    memset(row, 0, 8 * words);
    unsigned long long low = PyLong_AsUnsignedLongLong(mask);
    if (low != (unsigned long long)-1 || !PyErr_Occurred()) {
        if (words)
            row[0] = low;
        return 0;
    }
    if (!PyErr_ExceptionMatches(PyExc_OverflowError))
        return -1;
    PyErr_Clear();
    Py_ssize_t seat = seat_of(mask);
    if (seat < 0)
        return -1;
    PyObject *raw =
        PyObject_CallMethod(mask, "to_bytes", "ns", (seat / 64 + 1) * 8, "little");
    if (raw == NULL)
        return -1;
    Py_ssize_t size = PyBytes_GET_SIZE(raw);
    memcpy(row, PyBytes_AS_STRING(raw), size < 8 * words ? size : 8 * words);
    Py_DECREF(raw);
    return 0;
}

#endif
