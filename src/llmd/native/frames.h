/* Frames of a transfer between bytes and a named tuple; see `transport/frames.py`. */

#ifndef LLMD_FRAMES_H
#define LLMD_FRAMES_H

#include "numbers.h"

/* As it is sent; little endian. */
typedef struct __attribute__((packed)) {
    uint8_t kind, version;
    uint16_t attempt, layer, layers;
    uint32_t start, blocks;
    uint64_t generation;
    uint16_t request_bytes;
    uint32_t text_bytes, values;
} FrameHead;

/* Of a `Frame`, in its order. */
enum { FRAME_KIND, FRAME_ID, FRAME_LAYER, FRAME_ATTEMPT, FRAME_START, FRAME_VALUES,
       FRAME_TEXT, FRAME_LAYERS, FRAME_BLOCKS, FRAME_FIELDS };

/* Return a field of *tuple* that must be from 0 to *most*; sets an error if not. */
static uint64_t
frame_number(PyObject *tuple, Py_ssize_t field, uint64_t most)
{
    if (PyErr_Occurred())
        return 0;
    PyObject *item = PyNumber_Index(PyTuple_GET_ITEM(tuple, field));
    if (item == NULL)
        return 0;
    uint64_t number = PyLong_AsUnsignedLongLong(item);
    Py_DECREF(item);
    if (number > most && !PyErr_Occurred())
        PyErr_Format(PyExc_OverflowError, "a frame's field %zd is too large", field);
    return number;
}

PyDoc_STRVAR(frame_pack_doc,
"frame_pack(frame, version, /)\n--\n\n"
"Return the bytes of a frame.\n\n"
"Raises OverflowError if a number does not fit.");

static PyObject *
frame_pack(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    if (want_arguments("frame_pack", given, 2) < 0)
        return NULL;
    PyObject *frame = args[0], *id;
    if (!PyTuple_Check(frame) || PyTuple_GET_SIZE(frame) != FRAME_FIELDS ||
        !PyTuple_Check(id = PyTuple_GET_ITEM(frame, FRAME_ID)) ||
        PyTuple_GET_SIZE(id) != 2 || !PyUnicode_Check(PyTuple_GET_ITEM(id, 0)) ||
        !PyBytes_Check(PyTuple_GET_ITEM(frame, FRAME_TEXT)) ||
        !PyBytes_Check(PyTuple_GET_ITEM(frame, FRAME_VALUES)))
        return PyErr_Format(PyExc_TypeError, "want a frame");
    PyObject *text = PyTuple_GET_ITEM(frame, FRAME_TEXT);
    PyObject *values = PyTuple_GET_ITEM(frame, FRAME_VALUES);
    Py_ssize_t length, texts = PyBytes_GET_SIZE(text);
    Py_ssize_t bytes = PyBytes_GET_SIZE(values);
    const char *request = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(id, 0), &length);
    if (request == NULL)
        return NULL;
    if (length > UINT16_MAX || (uint64_t)texts > UINT32_MAX ||
        (uint64_t)bytes / 8 > UINT32_MAX)
        return PyErr_Format(PyExc_OverflowError, "a frame's name or text is too long");
    FrameHead head = {
        .kind = (uint8_t)frame_number(frame, FRAME_KIND, UINT8_MAX),
        .version = (uint8_t)PyLong_AsUnsignedLongLong(args[1]),
        .attempt = (uint16_t)frame_number(frame, FRAME_ATTEMPT, UINT16_MAX),
        .layer = (uint16_t)frame_number(frame, FRAME_LAYER, UINT16_MAX),
        .layers = (uint16_t)frame_number(frame, FRAME_LAYERS, UINT16_MAX),
        .start = (uint32_t)frame_number(frame, FRAME_START, UINT32_MAX),
        .blocks = (uint32_t)frame_number(frame, FRAME_BLOCKS, UINT32_MAX),
        .generation = frame_number(id, 1, UINT64_MAX),
        .request_bytes = (uint16_t)length,
        .text_bytes = (uint32_t)texts,
        .values = (uint32_t)(bytes / 8),
    };
    if (PyErr_Occurred())
        return NULL;
    Py_ssize_t all = (Py_ssize_t)sizeof(head) + length + texts + bytes;
    PyObject *packed = PyBytes_FromStringAndSize(NULL, all);
    if (packed != NULL) {
        char *to = PyBytes_AS_STRING(packed);
        memcpy(to, &head, sizeof(head)), to += sizeof(head);
        memcpy(to, request, (size_t)length), to += length;
        memcpy(to, PyBytes_AS_STRING(text), (size_t)texts), to += texts;
        memcpy(to, PyBytes_AS_STRING(values), (size_t)bytes);
    }
    return packed;
}

/* Return a tuple of *type*, which may be a named one, and take over *items*. */
static PyObject *
named(PyObject *type, PyObject *const *items, Py_ssize_t count)
{
    PyObject *made = NULL;
    int whole = 1;
    for (Py_ssize_t i = 0; i < count; i++)
        whole &= items[i] != NULL;
    if (whole)
        made = ((PyTypeObject *)type)->tp_alloc((PyTypeObject *)type, count);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (made != NULL)
            PyTuple_SET_ITEM(made, i, items[i]);
        else
            Py_XDECREF(items[i]);
    }
    return made;
}

PyDoc_STRVAR(frame_unpack_doc,
"frame_unpack(body, version, kinds, frame, id, /)\n--\n\n"
"Return the frame that was packed, as the types frame and id are; None if its version\n"
"is another or its kind not one of kinds, by number.\n\n"
"Raises ValueError if it is none.");

static PyObject *
frame_unpack(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    if (want_arguments("frame_unpack", given, 5) < 0)
        return NULL;
    PyObject *body = args[0], *kinds = args[2];
    uint64_t version = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    for (int i = 3; i < 5; i++)
        if (!PyType_Check(args[i]) ||
            !PyType_IsSubtype((PyTypeObject *)args[i], &PyTuple_Type))
            return PyErr_Format(PyExc_TypeError, "want types of tuples");
    if (!PyBytes_Check(body) || !PyTuple_Check(kinds))
        return PyErr_Format(PyExc_TypeError, "want bytes, and a tuple of kinds");
    FrameHead head;
    Py_ssize_t size = PyBytes_GET_SIZE(body), left = size - (Py_ssize_t)sizeof(head);
    if (left < 0)
        return PyErr_Format(PyExc_ValueError, "%zd bytes are no frame", size);
    const char *from = PyBytes_AS_STRING(body);
    memcpy(&head, from, sizeof(head)), from += sizeof(head);
    PyObject *kind = Py_None;
    if (head.kind < PyTuple_GET_SIZE(kinds))
        kind = PyTuple_GET_ITEM(kinds, head.kind);
    if (head.version != version || kind == Py_None)
        Py_RETURN_NONE;
    uint64_t told = (uint64_t)head.request_bytes + head.text_bytes;
    if ((uint64_t)left != told + 8 * (uint64_t)head.values)
        return PyErr_Format(PyExc_ValueError, "%zd bytes of another frame", size);
    const char *text = from + head.request_bytes, *values = text + head.text_bytes;
    PyObject *const name[] = {
        PyUnicode_DecodeUTF8(from, head.request_bytes, NULL),
        PyLong_FromUnsignedLongLong(head.generation),
    };
    Py_INCREF(kind);
    PyObject *const fields[FRAME_FIELDS] = {
        [FRAME_KIND] = kind,
        [FRAME_ID] = named(args[4], name, 2),
        [FRAME_LAYER] = PyLong_FromLong(head.layer),
        [FRAME_ATTEMPT] = PyLong_FromLong(head.attempt),
        [FRAME_START] = PyLong_FromUnsignedLong(head.start),
        [FRAME_VALUES] = PyBytes_FromStringAndSize(values, 8 * (Py_ssize_t)head.values),
        [FRAME_TEXT] = PyBytes_FromStringAndSize(text, head.text_bytes),
        [FRAME_LAYERS] = PyLong_FromLong(head.layers),
        [FRAME_BLOCKS] = PyLong_FromUnsignedLong(head.blocks),
    };
    return named(args[3], fields, FRAME_FIELDS);
}

#endif
