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

/* Return the bytes of *mask*, lowest first, whole words of them. */
static PyObject *
mask_bytes(PyObject *mask)
{
    if (!PyLong_CheckExact(mask)) {
        PyErr_SetString(PyExc_TypeError, "workers are an int");
        return NULL;
    }
    int overflow;
    long long low = PyLong_AsLongLongAndOverflow(mask, &overflow);
    if (overflow == 0 && low >= 0) {
        uint64_t word = (uint64_t)low;
        return PyBytes_FromStringAndSize((const char *)&word, 8);
    }
    if (overflow <= 0) {
        PyErr_SetString(PyExc_ValueError, "workers are bits, not below 0");
        return NULL;
    }
    Py_ssize_t seat = seat_of(mask);
    if (seat < 0)
        return NULL;
    return PyObject_CallMethod(mask, "to_bytes", "ns", (seat / 64 + 1) * 8, "little");
}

#endif
