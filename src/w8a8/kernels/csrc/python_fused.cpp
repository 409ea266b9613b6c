// The door to what is done in one pass with a product, and between products (w8a8/kernels/fused.py).
//
// Whoever calls has seen to it that the dispatcher has nothing to do.  None: one of the tensors is not plain memory of
// this process, of float32 and of the shape that the others ask for; then nothing was written.
#include "door.h"

namespace w8a8 {
namespace door {
namespace {

bool plain_rows(PyObject *x, View *v) {
  return look(torch, x, v) && v->dtype == W8A8_F32 && v->axes >= 1 && v->count > 0 && v->contiguous() &&
         !negated(torch, x);
}

// (add, weight, bias, eps, wants the sum): what stands before; the norm's output is always made.
struct Before {
  w8a8_norm norm = {};
  Ref sum, out;
  bool there = false;

  // 1, 0: the long way, -1: an error.  Makes what it writes.
  int take(PyObject *given, PyObject *x, const View &v) {
    if (given == Py_None) return 1;
    PyObject *add, *weight, *bias;
    int wants_sum;
    if (!PyArg_ParseTuple(given, "OOOfp", &add, &weight, &bias, &norm.eps, &wants_sum)) return -1;
    const int64_t k = v.shape[v.axes - 1];
    there = true;
    out.reset(output_of(x, v, k));
    if (!out) return -1;
    if (wants_sum) {
      sum.reset(output_of(x, v, k));
      if (!sum) return -1;
    }
    float *found[5];
    if (!plain_floats(add, v.count, true, &found[0]) || !plain_floats(weight, k, true, &found[1]) ||
        !plain_floats(bias, k, true, &found[2]) || !plain_floats(out.get(), v.count, false, &found[3]) ||
        !plain_floats(sum ? sum.get() : Py_None, v.count, true, &found[4]))
      return 0;
    norm.add = found[0], norm.weight = found[1], norm.bias = found[2], norm.out = found[3], norm.sum = found[4];
    return 1;
  }

  // (sum, norm, ...), each or None, with room for what comes behind them.
  PyObject *results(int more) {
    PyObject *const all = PyTuple_New(2 + more);
    for (int i = 0; all && i < 2; ++i) {
      Ref &made = i ? out : sum;
      if (!made) Py_INCREF(Py_None);
      PyTuple_SetItem(all, i, made ? made.release() : Py_None);
    }
    return all;
  }
};

}  // namespace

// fused(x, before or None, ((buffers, n, k, per_channel, mode, bits, activation), ...)) -> (sum, norm, y, ...) or None
PyObject *fused(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(args[2])) return wrong("fused takes (x, before, layers)");
  PyObject *const x = args[0];
  const int layers = static_cast<int>(PyTuple_Size(args[2]));
  View v;
  if (!torch.type || layers < 1 || layers > kMost || !plain_rows(x, &v)) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;

  w8a8_layer layer[kMost] = {};
  const w8a8_layer *all[kMost];
  int32_t activation[kMost];
  Buffers buffers[kMost];
  Ref y[kMost];
  void *data[kMost];
  int64_t ld[kMost];
  for (int i = 0; i < layers; ++i) {
    if (!layer_of(PyTuple_GetItem(args[2], i), &layer[i], &buffers[i], &activation[i])) return nullptr;
    if (layer[i].k != v.shape[v.axes - 1]) Py_RETURN_NONE;
    ld[i] = layer[i].n;
    if (buffers[i].packed.none()) Py_RETURN_NONE;
    y[i].reset(output_of(x, v, layer[i].n));
    if (!y[i]) return nullptr;
    all[i] = &layer[i];
  }
  Before before;
  const int taken = before.take(args[1], x, v);
  if (taken < 0) return nullptr;
  if (taken == 0) Py_RETURN_NONE;
  for (int i = 0; i < layers; ++i) {
    const Fit fit = buffers[i].fill(&layer[i], true);
    if (fit == Fit::kError) return nullptr;
    float *to;
    if (fit != Fit::kYes || !plain_floats(y[i].get(), v.count / layer[i].k * layer[i].n, false, &to)) Py_RETURN_NONE;
    data[i] = to;
  }

  Ref result(before.results(layers));
  if (!result) return nullptr;
  for (int i = 0; i < layers; ++i) PyTuple_SetItem(result.get(), i + 2, y[i].release());
  return given_back(result, "w8a8_linear_fused", [&] {
    const int64_t k = layer[0].k, m = v.count / k;
    for (int i = 0; i < layers; ++i)
      if (4 * m * ld[i] >= kFreshMemory && 4 * m * ld[i] < kColdMemory) w8a8_advise_huge(data[i], 4 * m * ld[i]);
    return w8a8_linear_fused(before.there ? &before.norm : nullptr, all, layers, v.data, W8A8_F32, m, k, data, ld,
                             activation, static_cast<int32_t>(threads));
  });
}

// normalize(x, before) -> (sum, norm) or None
PyObject *normalize(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 2) return wrong("normalize takes (x, before)");
  View v;
  if (!torch.type || !plain_rows(args[0], &v)) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  Before before;
  const int taken = before.take(args[1], args[0], v);
  if (taken < 0) return nullptr;
  if (taken == 0 || !before.there) Py_RETURN_NONE;
  Ref result(before.results(0));
  if (!result) return nullptr;
  return given_back(result, "w8a8_normalize", [&] {
    const int64_t k = v.shape[v.axes - 1];
    return w8a8_normalize(&before.norm, static_cast<float *>(v.data), v.count / k, k, static_cast<int32_t>(threads));
  });
}

// attend(q (B, H, Tq, D), k (B, Hk, Tk, D), v likewise, mask or None, scale, causal) -> (B, Tq, H, D) or None
PyObject *attend(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 6) return wrong("attend takes (q, k, v, mask, scale, causal)");
  if (!torch.type) Py_RETURN_NONE;
  View q, k, v;
  w8a8_attention a = {};
  a.scale = static_cast<float>(PyFloat_AsDouble(args[4]));
  a.causal = args[5] == Py_True;
  if (PyErr_Occurred()) return nullptr;
  if (!heads_of(args[0], &q, a.q_at) || !heads_of(args[1], &k, a.k_at) || !heads_of(args[2], &v, a.v_at))
    Py_RETURN_NONE;
  if (q.dtype != W8A8_F32 || k.dtype != W8A8_F32 || v.dtype != W8A8_F32) Py_RETURN_NONE;
  if (k.shape[0] != q.shape[0] || v.shape[0] != q.shape[0] || k.shape[1] != v.shape[1] || k.shape[2] != v.shape[2] ||
      k.shape[3] != q.shape[3] || v.shape[3] != q.shape[3] || q.shape[1] % k.shape[1])
    Py_RETURN_NONE;
  const int64_t full[4] = {q.shape[0], q.shape[1], q.shape[2], k.shape[2]};
  if (args[3] != Py_None && !mask_of(args[3], full, &a.mask, &a.mask_is_float, a.mask_at)) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  a.batch = q.shape[0], a.heads = q.shape[1], a.queries = q.shape[2], a.dims = q.shape[3];
  a.keys = k.shape[2], a.shared = q.shape[1] / k.shape[1];
  const int64_t shape[4] = {a.batch, a.queries, a.heads, a.dims};
  Ref out(tensor_of(args[0], shape, 4, a.dims));
  if (!out) return nullptr;
  float *to;
  if (!plain_floats(out.get(), q.count, false, &to)) Py_RETURN_NONE;
  a.q = static_cast<float *>(q.data), a.k = static_cast<float *>(k.data), a.v = static_cast<float *>(v.data), a.out = to;
  a.out_at[0] = a.queries * a.heads * a.dims, a.out_at[1] = a.dims, a.out_at[2] = a.heads * a.dims;
  return given_back(out, "w8a8_attend", [&] { return w8a8_attend(&a, static_cast<int32_t>(threads)); });
}

}  // namespace door
}  // namespace w8a8
