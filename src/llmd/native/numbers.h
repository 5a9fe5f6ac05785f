/* Arguments: sequences of 64-bit numbers, and places to write them to. */

#ifndef LLMD_NUMBERS_H
#define LLMD_NUMBERS_H

#include <Python.h>
#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for GCC and Clang on little-endian machines"
#endif

/* A list or tuple of ints, or a buffer of 8-byte items with any stride. */
typedef struct {
    Py_buffer view;
    PyObject *items; /* a list or tuple; NULL: the buffer is used */
    Py_ssize_t count;
    Py_ssize_t stride;
} Numbers;

static int
numbers_open(Numbers *numbers, PyObject *from)
{
    if (PyObject_CheckBuffer(from)) {
        if (PyObject_GetBuffer(from, &numbers->view, PyBUF_STRIDED_RO) < 0)
            return -1;
        if (numbers->view.itemsize != 8 || numbers->view.ndim != 1) {
            PyBuffer_Release(&numbers->view);
            PyErr_SetString(PyExc_TypeError, "want one dimension of 8-byte items");
            return -1;
        }
        numbers->items = NULL;
        numbers->count = numbers->view.shape[0];
        numbers->stride = numbers->view.strides[0];
        return 0;
    }
    numbers->items = PySequence_Fast(from, "want a sequence of ints");
    if (numbers->items == NULL)
        return -1;
    numbers->count = PySequence_Fast_GET_SIZE(numbers->items);
    return 0;
}

static void
numbers_close(Numbers *numbers)
{
    if (numbers->items == NULL)
        PyBuffer_Release(&numbers->view);
    else
        Py_DECREF(numbers->items);
}

/* Most token ids fit in the one digit of a small int. */
static inline int
is_small(PyObject *item, uint64_t *number)
{
    if (!PyLong_CheckExact(item))
        return 0;
#if PY_VERSION_HEX >= 0x030C0000
    if (!PyUnstable_Long_IsCompact((PyLongObject *)item))
        return 0;
    Py_ssize_t value = PyUnstable_Long_CompactValue((PyLongObject *)item);
    *number = (uint64_t)value;
    return value >= 0;
#else
    *number = ((PyLongObject *)item)->ob_digit[0];
    return Py_SIZE(item) == 1;
#endif
}

static int
number_of(PyObject *item, uint64_t *number)
{
    if (is_small(item, number))
        return 0;
    PyObject *index = PyNumber_Index(item);
    if (index == NULL)
        return -1;
    *number = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    return *number == UINT64_MAX && PyErr_Occurred() ? -1 : 0;
}

static inline int
numbers_at(const Numbers *numbers, Py_ssize_t place, uint64_t *number)
{
    if (numbers->items == NULL) {
        memcpy(number, (char *)numbers->view.buf + place * numbers->stride, 8);
        return 0;
    }
    /* An item's __index__ may have shortened the list meanwhile. */
    if (place >= PySequence_Fast_GET_SIZE(numbers->items)) {
        PyErr_SetString(PyExc_RuntimeError, "the sequence shrank");
        return -1;
    }
    return number_of(PySequence_Fast_GET_ITEM(numbers->items, place), number);
}

/* Take a writable buffer of at least *count* 8-byte items. */
static int
open_output(Py_buffer *view, PyObject *from, Py_ssize_t count)
{
    if (PyObject_GetBuffer(from, view, PyBUF_ND | PyBUF_WRITABLE) < 0)
        return -1;
    if (view->itemsize != 8 || view->len < 8 * count) {
        PyBuffer_Release(view);
        PyErr_SetString(PyExc_ValueError, "the output is too short");
        return -1;
    }
    return 0;
}

static int
want_arguments(const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s wants %zd arguments, not %zd", name, wanted, given);
    return -1;
}

#endif
