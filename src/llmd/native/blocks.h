/* Scattered blocks are copied and checksummed, without the interpreter's lock. */

#ifndef LLMD_BLOCKS_H
#define LLMD_BLOCKS_H

#include "checks.h"

/* Blocks of some layers. */
typedef struct {
    Py_buffer bases; /* addresses of block 0, 8 bytes each */
    Py_buffer blocks; /* which, 4 bytes each */
    Py_ssize_t layers, count;
} Blocks;

static int
blocks_open(Blocks *blocks, PyObject *bases, PyObject *numbers)
{
    if (PyObject_GetBuffer(bases, &blocks->bases, PyBUF_ND) < 0)
        return -1;
    if (PyObject_GetBuffer(numbers, &blocks->blocks, PyBUF_ND) < 0) {
        PyBuffer_Release(&blocks->bases);
        return -1;
    }
    if (blocks->bases.itemsize != 8 || blocks->blocks.itemsize != 4) {
        PyErr_SetString(PyExc_TypeError, "want bases of 8 bytes and blocks of 4");
        PyBuffer_Release(&blocks->blocks);
        PyBuffer_Release(&blocks->bases);
        return -1;
    }
    blocks->layers = blocks->bases.len / 8;
    blocks->count = blocks->blocks.len / 4;
    return 0;
}

static void
blocks_close(Blocks *blocks)
{
    PyBuffer_Release(&blocks->bases);
    PyBuffer_Release(&blocks->blocks);
}

static int
blocks_within(const Blocks *blocks, long long limit)
{
    const int32_t *block = blocks->blocks.buf;
    for (Py_ssize_t i = 0; i < blocks->count; i++)
        if (block[i] < 0 || block[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "a block is not one of %lld", limit);
            return 0;
        }
    return 1;
}

static char *
block_at(const Blocks *blocks, Py_ssize_t layer, Py_ssize_t i, size_t bytes)
{
    uint64_t base = ((const uint64_t *)blocks->bases.buf)[layer];
    int32_t block = ((const int32_t *)blocks->blocks.buf)[i];
    return (char *)(uintptr_t)base + (size_t)block * bytes;
}

/* Return the checksums, layer by layer; None if there are to be none. */
static PyObject *
go_over(const Blocks *from, const Blocks *to, size_t bytes, int summed)
{
    PyObject *sums = Py_NewRef(Py_None);
    char *into = NULL;
    if (summed) {
        Py_SETREF(sums, PyBytes_FromStringAndSize(NULL, 8 * from->layers * from->count));
        if (sums == NULL)
            return NULL;
        into = PyBytes_AS_STRING(sums);
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t layer = 0; layer < from->layers; layer++)
        for (Py_ssize_t i = 0; i < from->count; i++) {
            const char *block = block_at(from, layer, i, bytes);
            char *target = to ? block_at(to, layer, i, bytes) : NULL;
            if (summed) {
                uint64_t sum = checksum((const uint8_t *)block, bytes, target);
                memcpy(into, &sum, 8);
                into += 8;
            } else
                copy_block(target, block, bytes);
        }
    copied();
    Py_END_ALLOW_THREADS
    return sums;
}

static int
long_enough(size_t bytes)
{
    if (bytes < LEAST_BYTES)
        PyErr_Format(PyExc_ValueError, "blocks of %zu bytes are too short", bytes);
    return bytes >= LEAST_BYTES;
}

PyDoc_STRVAR(block_sums_doc,
"block_sums(bases, blocks, block_bytes, limit, /)\n--\n\n"
"Return checksums of blocks of each layer, layer by layer, 8 bytes each.\n\n"
"bases are addresses of block 0, 8 bytes each; blocks are 32-bit integers, each below\n"
"limit, or ValueError is raised; block_bytes is at least 241.  The caller keeps the\n"
"memory mapped.");

static PyObject *
block_sums(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Blocks blocks;
    if (want_arguments("block_sums", given, 4) < 0)
        return NULL;
    size_t bytes = PyLong_AsSize_t(args[2]);
    if (PyErr_Occurred())
        return NULL;
    long long limit = PyLong_AsLongLong(args[3]);
    if (PyErr_Occurred() || blocks_open(&blocks, args[0], args[1]) < 0)
        return NULL;
    PyObject *sums = NULL;
    if (long_enough(bytes) && blocks_within(&blocks, limit))
        sums = go_over(&blocks, NULL, bytes, 1);
    blocks_close(&blocks);
    return sums;
}

PyDoc_STRVAR(copy_blocks_doc,
"copy_blocks(bases, blocks, to_bases, to_blocks, block_bytes, limit, summed, /)\n"
"--\n\n"
"Copy blocks of each layer; return their checksums if they are to be summed.\n\n"
"Arguments are those of block_sums, where block_bytes may be anything unless summed.\n"
"Nothing is copied if one of to_blocks is not below limit, or negative.");

static PyObject *
copy_blocks(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Blocks from, to;
    if (want_arguments("copy_blocks", given, 7) < 0)
        return NULL;
    size_t bytes = PyLong_AsSize_t(args[4]);
    if (PyErr_Occurred())
        return NULL;
    long long limit = PyLong_AsLongLong(args[5]);
    if (PyErr_Occurred())
        return NULL;
    int summed = PyObject_IsTrue(args[6]);
    if (summed < 0 || blocks_open(&from, args[0], args[1]) < 0)
        return NULL;
    if (blocks_open(&to, args[2], args[3]) < 0) {
        blocks_close(&from);
        return NULL;
    }
    PyObject *sums = NULL;
    if (from.layers != to.layers || from.count != to.count)
        PyErr_SetString(PyExc_ValueError, "want as many blocks here as there");
    else if ((!summed || long_enough(bytes)) && blocks_within(&to, limit))
        sums = go_over(&from, &to, bytes, summed);
    blocks_close(&from);
    blocks_close(&to);
    return sums;
}

#endif
