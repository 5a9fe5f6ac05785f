/* What a prompt delays at each worker: the twin of `LeastDelay._in_numpy`. */

#ifndef LLMD_DELAYS_H
#define LLMD_DELAYS_H

#include <math.h>

#include "numbers.h"

/* Of a machine, and of the router: in the order of `LeastDelay._figures`. */
typedef struct {
    double per_token, floor, graph_tokens, graph_floor, knee, attention, prefix;
    double per_request, per_context_token;
    double always, waiting_here, waiting_anywhere, answering_here, step_tokens;
} Figures;

/* Its floors are given to the power of its knee. */
static double
prefill_s(const Figures *of, double tokens, double context)
{
    double floor = tokens <= of->graph_tokens ? of->graph_floor : of->floor;
    double joined = pow(of->per_token * tokens, of->knee) + floor;
    return pow(joined, 1.0 / of->knee) +
           tokens * (context + tokens * 0.5) * of->attention + context * of->prefix;
}

PyDoc_STRVAR(delays_doc,
"delays(loads, held, prompt_tokens, figures, out, /)\n--\n\n"
"Write what `LeastDelay` weighs to *out*, (8, W), from loads, (4, W), and held,\n"
"(W, tiers); return whether a worker holds more in slower tiers than in the first.");

static PyObject *
delays(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Figures of;
    if (want_arguments("delays", given, 5) < 0)
        return NULL;
    double prompt = PyFloat_AsDouble(args[2]);
    if ((prompt == -1.0 && PyErr_Occurred()) ||
        !PyArg_ParseTuple(args[3], "dddddddddddddd", &of.per_token, &of.floor,
                          &of.graph_tokens, &of.graph_floor, &of.knee, &of.attention,
                          &of.prefix, &of.per_request, &of.per_context_token,
                          &of.always, &of.waiting_here, &of.waiting_anywhere,
                          &of.answering_here, &of.step_tokens))
        return NULL;
    Py_buffer loads = {0}, held = {0}, out = {0};
    PyObject *result = NULL;
    if (PyObject_GetBuffer(args[0], &loads, PyBUF_ND) < 0 ||
        PyObject_GetBuffer(args[1], &held, PyBUF_ND) < 0 ||
        PyObject_GetBuffer(args[4], &out, PyBUF_ND | PyBUF_WRITABLE) < 0)
        goto done;
    Py_ssize_t workers = loads.ndim == 2 ? loads.shape[1] : -1;
    if (workers < 0 || loads.shape[0] != 4 || held.ndim != 2 || out.ndim != 2 ||
        held.shape[0] != workers || out.shape[1] != workers || out.shape[0] != 8 ||
        held.shape[1] < 1 || loads.itemsize != 8 || held.itemsize != 8 ||
        out.itemsize != 8) {
        PyErr_SetString(PyExc_ValueError, "loads, held and out do not fit together");
        goto done;
    }
    const int64_t *running = loads.buf, *waiting = running + workers,
                  *queued = waiting + workers, *context = queued + workers,
                  *cached = held.buf;
    Py_ssize_t tiers = held.shape[1];
    double *row = out.buf, anywhere = 0.0;
    of.floor = pow(of.floor, of.knee);
    of.graph_floor = pow(of.graph_floor, of.knee);
    double step_s = prefill_s(&of, of.step_tokens, 0.0);
    int slower = 0;
    for (Py_ssize_t worker = 0; worker < workers; worker++)
        anywhere += waiting[worker];
    anywhere *= workers ? of.waiting_anywhere / workers : 0.0;
    for (Py_ssize_t worker = 0; worker < workers; worker++, row++) {
        const int64_t *own_held = cached + worker * tiers;
        double wait = waiting[worker], run = running[worker], queue = queued[worker];
        double known = own_held[tiers - 1], own = fmax(prompt - known, 1.0);
        double own_s = prefill_s(&of, own, known), queued_s = 0.0;
        if (queue > 0.0 && wait > 0.0)
            queued_s = prefill_s(&of, queue / wait, 0.0) * fmax(wait - 0.5, 0.0);
        double decoding = context[worker] * of.per_context_token + run * of.per_request;
        double others = of.always + anywhere + of.waiting_here * wait +
                        of.answering_here * (run - wait);
        slower |= own_held[tiers - 1] != own_held[0];
        row[0 * workers] = queue;
        row[1 * workers] = own;
        row[2 * workers] = context[worker];
        row[3 * workers] = wait;
        row[4 * workers] = queued_s;
        row[5 * workers] = own_s;
        row[6 * workers] = (queued_s + own_s) * decoding / step_s;
        row[7 * workers] = own_s * others;
    }
    result = PyBool_FromLong(slower);
done:
    if (out.obj != NULL)
        PyBuffer_Release(&out);
    if (held.obj != NULL)
        PyBuffer_Release(&held);
    if (loads.obj != NULL)
        PyBuffer_Release(&loads);
    return result;
}

#endif
