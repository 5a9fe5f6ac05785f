/* Messages from one process to another through memory that both map.
 *
 * Where they are, in a ring of a power of two of bytes from 192 on, each its length in
 * 8 bytes, itself, and zeros up to a multiple of 8:
 *
 *     0    bytes taken out so far, told by the reader alone
 *     64   bytes put in so far, told by the writer alone
 *     128  1 once the reader looks
 *
 * One writes and one reads, so no lock is needed: what is told is there before. */

#ifndef LLMD_RINGS_H
#define LLMD_RINGS_H

#include <sched.h>
#include <time.h>

#include "numbers.h"

#define RING_TAKEN 0
#define RING_PUT 64
#define RING_READER 128
#define RING_BEGIN 192

typedef struct {
    char *base;
    uint64_t bytes;
} Ring;

static int
ring_open(Ring *ring, PyObject *address, PyObject *bytes)
{
    ring->base = PyLong_AsVoidPtr(address);
    ring->bytes = PyLong_AsUnsignedLongLong(bytes);
    if (PyErr_Occurred())
        return -1;
    if (ring->bytes < 64 || (ring->bytes & (ring->bytes - 1)) != 0) {
        PyErr_SetString(PyExc_ValueError, "want a power of two of bytes");
        return -1;
    }
    return 0;
}

static uint64_t
ring_told(const Ring *ring, int where)
{
    return __atomic_load_n((uint64_t *)(ring->base + where), __ATOMIC_ACQUIRE);
}

static void
ring_tell(const Ring *ring, int where, uint64_t number)
{
    __atomic_store_n((uint64_t *)(ring->base + where), number, __ATOMIC_RELEASE);
}

/* Copy between the ring and somewhere else, around its end if need be. */
static void
ring_copy(const Ring *ring, uint64_t at, char *other, uint64_t count, int out)
{
    while (count > 0) {
        uint64_t begin = at & (ring->bytes - 1), some = ring->bytes - begin;
        char *here = ring->base + RING_BEGIN + begin;
        some = some < count ? some : count;
        memcpy(out ? other : here, out ? here : other, some);
        at += some, other += some, count -= some;
    }
}

static uint64_t
ring_room(uint64_t message)
{
    return 8 + ((message + 7) & ~(uint64_t)7);
}

PyDoc_STRVAR(ring_put_doc,
"ring_put(address, bytes, message, /)\n--\n\n"
"Put a message into a ring; say whether it has room and a reader.");

static PyObject *
ring_put(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Ring ring;
    Py_buffer message;
    if (want_arguments("ring_put", given, 3) < 0 ||
        ring_open(&ring, args[0], args[1]) < 0 ||
        PyObject_GetBuffer(args[2], &message, PyBUF_SIMPLE) < 0)
        return NULL;
    uint64_t length = (uint64_t)message.len, put = ring_told(&ring, RING_PUT);
    uint64_t taken = ring_told(&ring, RING_TAKEN), needs = ring_room(length);
    /* A reader that has lost its mind may tell anything. */
    uint64_t held = put - taken;
    int fits = ring_told(&ring, RING_READER) == 1 && held <= ring.bytes &&
               needs <= ring.bytes - held;
    if (fits) {
        ring_copy(&ring, put, (char *)&length, 8, 0);
        ring_copy(&ring, put + 8, message.buf, length, 0);
        ring_tell(&ring, RING_PUT, put + needs);
    }
    PyBuffer_Release(&message);
    return PyBool_FromLong(fits);
}

PyDoc_STRVAR(ring_take_doc,
"ring_take(address, bytes, /)\n--\n\n"
"Take the oldest message out of a ring; None if there is none.\n\n"
"Raises ValueError if what is in the ring makes no sense.");

static PyObject *
ring_take(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Ring ring;
    if (want_arguments("ring_take", given, 2) < 0 ||
        ring_open(&ring, args[0], args[1]) < 0)
        return NULL;
    uint64_t taken = ring_told(&ring, RING_TAKEN), length = 0;
    uint64_t held = ring_told(&ring, RING_PUT) - taken;
    if (held == 0)
        Py_RETURN_NONE;
    if (held >= 8 && held <= ring.bytes)
        ring_copy(&ring, taken, (char *)&length, 8, 1);
    if (held < 8 || held > ring.bytes || length > held - 8 ||
        ring_room(length) > held)
        return PyErr_Format(PyExc_ValueError, "not a ring of messages");
    PyObject *message = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (message != NULL) {
        ring_copy(&ring, taken + 8, PyBytes_AS_STRING(message), length, 1);
        ring_tell(&ring, RING_TAKEN, taken + ring_room(length));
    }
    return message;
}

static uint64_t
nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline void
breathe(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int
bell_open(Py_buffer *bell, PyObject *from)
{
    if (PyObject_GetBuffer(from, bell, PyBUF_WRITABLE) < 0)
        return -1;
    if (bell->len == 16)
        return 0;
    PyBuffer_Release(bell);
    PyErr_SetString(PyExc_ValueError, "want a bell of 16 bytes");
    return -1;
}

PyDoc_STRVAR(watch_doc,
"watch(words, bell, nanoseconds, /)\n--\n\n"
"Wait until a word of memory is not what it was, or the bell rings; say whether so.\n\n"
"words are pairs of an address and what was there, bell is how often it rang and how\n"
"often that was heard, 8 bytes each.  The thread keeps its core and leaves the\n"
"interpreter to others.");

static PyObject *
watch(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_buffer words, bell;
    if (want_arguments("watch", given, 3) < 0)
        return NULL;
    uint64_t most = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &words, PyBUF_SIMPLE) < 0)
        return NULL;
    if (bell_open(&bell, args[1]) < 0) {
        PyBuffer_Release(&words);
        return NULL;
    }
    const uint64_t *pairs = words.buf;
    uint64_t *rung = bell.buf, *heard = rung + 1;
    Py_ssize_t count = words.len / 16;
    int changed = 0;
    Py_BEGIN_ALLOW_THREADS
    uint64_t until = nanoseconds() + most;
    do {
        changed = __atomic_load_n(rung, __ATOMIC_ACQUIRE) != *heard;
        for (Py_ssize_t i = 0; i < count && !changed; i++) {
            const uint64_t *word = (const uint64_t *)(uintptr_t)pairs[2 * i];
            changed = __atomic_load_n(word, __ATOMIC_ACQUIRE) != pairs[2 * i + 1];
        }
        if (!changed)
            breathe();
    } while (!changed && nanoseconds() < until);
    Py_END_ALLOW_THREADS
    __atomic_store_n(heard, __atomic_load_n(rung, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
    PyBuffer_Release(&words);
    PyBuffer_Release(&bell);
    return PyBool_FromLong(changed);
}

PyDoc_STRVAR(ring_doc,
"ring(bell, nanoseconds, /)\n--\n\n"
"Ring, and leave the interpreter to who watches, for so long at most.\n\n"
"Otherwise that thread would have to wait until this one does something else.");

static PyObject *
ring(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_buffer bell;
    if (want_arguments("ring", given, 2) < 0)
        return NULL;
    uint64_t most = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || bell_open(&bell, args[0]) < 0)
        return NULL;
    uint64_t *rung = bell.buf, *heard = rung + 1;
    Py_BEGIN_ALLOW_THREADS
    uint64_t mine = __atomic_add_fetch(rung, 1, __ATOMIC_ACQ_REL);
    uint64_t until = nanoseconds() + most;
    while ((int64_t)(__atomic_load_n(heard, __ATOMIC_ACQUIRE) - mine) < 0 &&
           nanoseconds() < until)
        sched_yield(); /* who watches may wait for this core */
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&bell);
    Py_RETURN_NONE;
}

#endif
