/* Copies of scattered blocks, without the interpreter's lock. */

#ifndef LLMD_COPIES_H
#define LLMD_COPIES_H

#include "numbers.h"

#ifdef __SSE2__
#include <emmintrin.h>

/* Past the cache, whose lines a plain copy reads before it overwrites them.  The
 * one to read the block next is another core, which finds it in memory sooner than
 * in the cache of this one. */
static void
copy_block(char *to, const char *from, size_t bytes)
{
    if (bytes % 64 != 0 || (uintptr_t)to % 16 != 0) {
        memcpy(to, from, bytes);
        return;
    }
    for (size_t i = 0; i < bytes; i += 64) {
        const __m128i *line = (const __m128i *)(from + i);
        __m128i *into = (__m128i *)(to + i);
        __m128i parts[4] = {_mm_loadu_si128(line), _mm_loadu_si128(line + 1),
                            _mm_loadu_si128(line + 2), _mm_loadu_si128(line + 3)};
        for (int part = 0; part < 4; part++)
            _mm_stream_si128(into + part, parts[part]);
    }
}

/* What was written so is there before what is written later. */
static void
copied(void)
{
    _mm_sfence();
}

#else
#define copy_block memcpy
#define copied()
#endif

PyDoc_STRVAR(copy_blocks_doc,
"copy_blocks(source, target, source_blocks, target_blocks, block_bytes, limit, /)\n"
"--\n\n"
"Copy blocks between two places in memory that do not overlap.\n\n"
"The places are the addresses of block 0; the caller keeps both mapped.  The\n"
"blocks are two buffers of as many 32-bit integers; nothing is copied if one of\n"
"the target's is not below limit, or negative.");

static int
within(const int32_t *blocks, Py_ssize_t count, long long limit)
{
    for (Py_ssize_t i = 0; i < count; i++)
        if (blocks[i] < 0 || blocks[i] >= limit)
            return 0;
    return 1;
}

static PyObject *
copy_blocks(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 6) {
        PyErr_SetString(PyExc_TypeError, "copy_blocks takes 6 arguments");
        return NULL;
    }
    const char *source = PyLong_AsVoidPtr(args[0]);
    char *target = PyLong_AsVoidPtr(args[1]);
    size_t bytes = PyLong_AsSize_t(args[4]);
    long long limit = PyLong_AsLongLong(args[5]);
    if (PyErr_Occurred())
        return NULL;
    Py_buffer from, to;
    if (PyObject_GetBuffer(args[2], &from, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[3], &to, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&from);
        return NULL;
    }
    const int32_t *come = from.buf, *go = to.buf;
    Py_ssize_t count = from.len / (Py_ssize_t)sizeof(int32_t);
    if (from.len != to.len || from.len % sizeof(int32_t) != 0)
        PyErr_SetString(PyExc_ValueError, "want two buffers of as many blocks");
    else if (!within(go, count, limit))
        PyErr_Format(PyExc_ValueError, "a block is not one of %lld", limit);
    else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++)
            copy_block(target + (size_t)go[i] * bytes,
                       source + (size_t)come[i] * bytes, bytes);
        copied();
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

#endif
