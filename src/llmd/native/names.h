/* Naming prefixes: the theory is in `llmd.hashing`. */

#ifndef LLMD_NAMES_H
#define LLMD_NAMES_H

#include "numbers.h"

PyDoc_STRVAR(token_ids_doc,
"token_ids(tokens, out, /)\n--\n\nWrite a sequence of ints to a buffer of 8-byte items.");

static PyObject *
token_ids(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Numbers tokens;
    Py_buffer out;
    if (want_arguments("token_ids", given, 2) < 0 || numbers_open(&tokens, args[0]) < 0)
        return NULL;
    if (open_output(&out, args[1], tokens.count) < 0) {
        numbers_close(&tokens);
        return NULL;
    }
    uint64_t *written = out.buf;
    Py_ssize_t place = 0;
    while (place < tokens.count && numbers_at(&tokens, place, &written[place]) == 0)
        place++;
    int whole = place == tokens.count;
    PyBuffer_Release(&out);
    numbers_close(&tokens);
    return whole ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(beyond_doc,
"beyond(tokens, /)\n--\n\nSay whether a buffer of 8-byte items has one from 2**63 on.");

static PyObject *
beyond(PyObject *module, PyObject *from)
{
    Numbers tokens;
    if (numbers_open(&tokens, from) < 0)
        return NULL;
    uint64_t all = 0, token;
    if (tokens.items == NULL && tokens.stride == 8) {
        for (Py_ssize_t place = 0; place < tokens.count; place++)
            all |= ((const uint64_t *)tokens.view.buf)[place];
    } else {
        for (Py_ssize_t place = 0; place < tokens.count; place++) {
            if (numbers_at(&tokens, place, &token) < 0) {
                numbers_close(&tokens);
                return NULL;
            }
            all |= token;
        }
    }
    numbers_close(&tokens);
    return PyBool_FromLong(all >> 63);
}

PyDoc_STRVAR(fold_doc,
"fold(tokens, coefficients, start_tokens, start, block_tokens, out, /)\n--\n\n"
"Return the name of the prefix that *tokens* make longer, and write the name\n"
"behind each of their blocks to *out*, if it is not None.");

static PyObject *
fold(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Numbers tokens, weights;
    Py_buffer out = {0};
    PyObject *result = NULL;
    if (want_arguments("fold", given, 6) < 0)
        return NULL;
    Py_ssize_t first = PyLong_AsSsize_t(args[2]);
    Py_ssize_t block = PyLong_AsSsize_t(args[4]);
    uint64_t name;
    if (PyErr_Occurred() || number_of(args[3], &name) < 0)
        return NULL;
    if (numbers_open(&tokens, args[0]) < 0)
        return NULL;
    if (numbers_open(&weights, args[1]) < 0) {
        numbers_close(&tokens);
        return NULL;
    }
    if (first < 0 || block < 1 || weights.items != NULL || weights.stride != 8 ||
        weights.count - first < tokens.count) {
        PyErr_SetString(PyExc_ValueError, "want a coefficient for each token");
        goto done;
    }
    if (args[5] != Py_None && open_output(&out, args[5], tokens.count / block) < 0)
        goto done;
    const uint64_t *weight = (const uint64_t *)weights.view.buf + first;
    uint64_t *written = out.buf;
    Py_ssize_t left = block;
    if (tokens.items == NULL && tokens.stride == 8) {
        const uint64_t *token = tokens.view.buf;
        Py_ssize_t place = 0;
        for (Py_ssize_t end = block; end <= tokens.count; end += block) {
            for (; place < end; place++)
                name += weight[place] * (token[place] + 1);
            if (written != NULL)
                *written++ = name;
        }
        for (; place < tokens.count; place++)
            name += weight[place] * (token[place] + 1);
    } else {
        for (Py_ssize_t place = 0; place < tokens.count; place++) {
            uint64_t token;
            if (numbers_at(&tokens, place, &token) < 0)
                goto done;
            name += weight[place] * (token + 1);
            if (--left == 0) {
                left = block;
                if (written != NULL)
                    *written++ = name;
            }
        }
    }
    result = PyLong_FromUnsignedLongLong(name);
done:
    if (out.obj != NULL)
        PyBuffer_Release(&out);
    numbers_close(&weights);
    numbers_close(&tokens);
    return result;
}

#endif
