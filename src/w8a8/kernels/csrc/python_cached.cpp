// The door to keys and values in int8 (w8a8/kernels/cached.py).
//
// Whoever calls has seen to it that the dispatcher has nothing to do.  None: one of the tensors is not plain memory of
// this process, of a type and shape that the kernel takes; then nothing was written.
#include "door.h"

namespace w8a8 {
namespace door {
namespace {

constexpr int kAxes = 4;

bool contiguous_of(PyObject *tensor, int dtype, const int64_t *shape, int axes, void **to) {
  View v;
  if (!look(torch, tensor, &v) || v.dtype != dtype || v.axes != axes || !v.contiguous()) return false;
  for (int i = 0; i < axes; ++i)
    if (v.shape[i] != shape[i]) return false;
  if (dtype == W8A8_F32 && negated(torch, tensor)) return false;
  *to = v.data;
  return true;
}

// w8a8.kernels.cached.Codes: (key codes, key scale, value codes, value scale, key dims, value dims)
bool take_codes(PyObject *codes, w8a8_cached *c) {
  if (!PyTuple_Check(codes) || PyTuple_Size(codes) != 6) return false;
  View scale;
  if (!look(torch, PyTuple_GetItem(codes, 1), &scale) || scale.axes != 3) return false;
  c->batch = scale.shape[0], c->heads = scale.shape[1], c->room = scale.shape[2];
  c->key_dims = PyLong_AsLongLong(PyTuple_GetItem(codes, 4)), c->value_dims = PyLong_AsLongLong(PyTuple_GetItem(codes, 5));
  if (PyErr_Occurred()) return no();
  if (c->key_dims < 1 || c->value_dims < 1 || c->room % 16) return false;
  const int64_t scales[3] = {c->batch, c->heads, c->room};
  const int64_t keys[6] = {c->batch, c->heads, c->room / 16, (c->key_dims + 1) / 2, 16, 2};
  const int64_t values[4] = {c->batch, c->heads, c->room, (c->value_dims + 15) / 16 * 16};
  void *at[4];
  if (!contiguous_of(PyTuple_GetItem(codes, 0), kInt8, keys, 6, &at[0]) ||
      !contiguous_of(PyTuple_GetItem(codes, 1), W8A8_F32, scales, 3, &at[1]) ||
      !contiguous_of(PyTuple_GetItem(codes, 2), kInt8, values, 4, &at[2]) ||
      !contiguous_of(PyTuple_GetItem(codes, 3), W8A8_F32, scales, 3, &at[3]))
    return false;
  c->keys = static_cast<int8_t *>(at[0]), c->key_scale = static_cast<float *>(at[1]);
  c->values = static_cast<int8_t *>(at[2]), c->value_scale = static_cast<float *>(at[3]);
  return true;
}

// What is kept: codes, or (keys, values) as they came, (P, H, C, D).
bool take_kept(PyObject *kept, w8a8_cached_attention *a) {
  if (!PyTuple_Check(kept) || PyTuple_Size(kept) != 2) return take_codes(kept, &a->cached);
  View k, v;
  if (!heads_of(PyTuple_GetItem(kept, 0), &k, a->keys_at) || !heads_of(PyTuple_GetItem(kept, 1), &v, a->values_at) ||
      k.dtype != a->dtype || v.dtype != a->dtype)
    return false;
  for (int i = 0; i < 3; ++i)
    if (k.shape[i] != v.shape[i]) return false;
  w8a8_cached *const c = &a->cached;
  c->batch = k.shape[0], c->heads = k.shape[1], c->room = k.shape[2], c->key_dims = k.shape[3], c->value_dims = v.shape[3];
  a->keys = k.data, a->values = v.data;
  return true;
}

// Keys and values of tokens that are to be written, and where to.
struct Tokens {
  w8a8_cached to = {};
  View keys, values;
  int64_t keys_at[3], values_at[3];

  bool take(PyObject *const *args) {
    return take_codes(args[0], &to) && heads_of(args[1], &keys, keys_at) && heads_of(args[2], &values, values_at);
  }
  // Whether they are of so many sequences, and as what is kept.
  bool fit(int64_t batch) const {
    return keys.dtype == values.dtype && keys.shape[0] == batch && keys.shape[1] == to.heads && keys.shape[3] == to.key_dims &&
           values.shape[0] == batch && values.shape[1] == to.heads && values.shape[2] == keys.shape[2] &&
           values.shape[3] == to.value_dims;
  }
};

// What attention looks at and is asked with; false where it is nothing for the kernel.
bool take_operands(PyObject *query, PyObject *kept, View *q, w8a8_cached_attention *a) {
  w8a8_cached *const c = &a->cached;
  if (!heads_of(query, q, a->q_at)) return false;
  a->dtype = q->dtype, a->q = q->data, a->queries = q->shape[2];
  if (!take_kept(kept, a) || c->heads < 1 || q->shape[1] % c->heads || q->shape[3] != c->key_dims) return false;
  a->shared = q->shape[1] / c->heads;
  return true;
}

// Attention as it is asked for in `a`, of which the operands were looked at once -> a tensor of this shape.
PyObject *attended(PyObject *query, PyObject *kept, const View &q, const int64_t *shape, int axes, PyObject *mask,
                   PyObject *ranges, PyObject *sinks, w8a8_cached_attention *a) {
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  Ref out(tensor_of(query, shape, axes, shape[axes - 1]));   // may run Python code, of a mode: all is looked at after it
  if (!out) return nullptr;
  View now;
  void *to, *of_sequences = nullptr, *scores = nullptr;
  const int64_t batch = q.shape[0], three[2] = {batch, 3}, seen[4] = {batch, q.shape[1], a->queries, a->end - a->start};
  if (!take_operands(query, kept, &now, a) || !now.same_shape(q) || now.dtype != q.dtype ||
      a->cached.value_dims != shape[axes - 1] || (!ranges && a->cached.batch != batch) ||
      !contiguous_of(out.get(), q.dtype, shape, axes, &to) || (ranges && !contiguous_of(ranges, kInt32, three, 2, &of_sequences)) ||
      (mask != Py_None && !mask_of(mask, seen, &a->mask, &a->mask_is_float, a->mask_at)) ||
      (sinks != Py_None && !contiguous_of(sinks, W8A8_F32, &q.shape[1], 1, &scores)))
    Py_RETURN_NONE;
  a->out = to, a->ranges = static_cast<int32_t *>(of_sequences), a->sinks = static_cast<float *>(scores);
  return given_back(out, "w8a8_cached_attend", [&] { return w8a8_cached_attend(a, static_cast<int32_t>(threads)); });
}

}  // namespace

// cached_deal(codes, keys (1, H, T, D), values, where (T, 2) int32) -> True or None
PyObject *cached_deal(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 4) return wrong("cached_deal takes (codes, keys, values, where)");
  if (!torch.type) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  Tokens t;
  if (!t.take(args) || !t.fit(1)) Py_RETURN_NONE;
  const int64_t tokens = t.keys.shape[2], pairs[2] = {tokens, 2};
  void *where;
  if (!contiguous_of(args[3], kInt32, pairs, 2, &where)) Py_RETURN_NONE;
  Ref done(PyBool_FromLong(1));
  return given_back(done, "w8a8_cached_deal", [&] {
    return w8a8_cached_deal(&t.to, t.keys.data, t.keys_at, t.values.data, t.values_at, t.keys.dtype,
                            static_cast<int32_t *>(where), tokens, static_cast<int32_t>(threads));
  });
}

// cached_append(codes, keys, values, at) -> True or None
PyObject *cached_append(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 4) return wrong("cached_append takes (codes, keys, values, at)");
  const int64_t at = PyLong_AsLongLong(args[3]);
  if (at == -1 && PyErr_Occurred()) return nullptr;
  if (!torch.type) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  Tokens t;
  if (!t.take(args) || !t.fit(t.to.batch)) Py_RETURN_NONE;
  Ref done(PyBool_FromLong(1));
  return given_back(done, "w8a8_cached_append", [&] {
    return w8a8_cached_append(&t.to, t.keys.data, t.keys_at, t.values.data, t.values_at, t.keys.dtype, at,
                              t.keys.shape[2], static_cast<int32_t>(threads));
  });
}

// cached_read(codes, start, whether keys, out) -> True or None
PyObject *cached_read(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 4) return wrong("cached_read takes (codes, start, keys, out)");
  const int64_t start = PyLong_AsLongLong(args[1]);
  if (start == -1 && PyErr_Occurred()) return nullptr;
  if (!torch.type) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  w8a8_cached c = {};
  View out;
  const bool keys = args[2] == Py_True;
  if (!take_codes(args[0], &c) || !look(torch, args[3], &out) || out.dtype < W8A8_F32 || out.dtype > W8A8_F16 ||
      out.axes != kAxes || !out.contiguous() || negated(torch, args[3]) || out.shape[0] != c.batch || out.shape[1] != c.heads ||
      out.shape[3] != (keys ? c.key_dims : c.value_dims))
    Py_RETURN_NONE;
  Ref done(PyBool_FromLong(1));
  return given_back(done, "w8a8_cached_read", [&] {
    return w8a8_cached_read(&c, keys, start, out.shape[2], out.dtype, out.data, static_cast<int32_t>(threads));
  });
}

// cached_attend(q (B, H, T, D), codes, start, end, scale, mask or None, causal, softcap or None, sinks or None)
//     -> (B, T, H, D) or None
PyObject *cached_attend(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 9) return wrong("cached_attend takes (q, codes, start, end, scale, mask, causal, softcap, sinks)");
  w8a8_cached_attention a = {};
  a.start = PyLong_AsLongLong(args[2]), a.end = PyLong_AsLongLong(args[3]);
  a.scale = static_cast<float>(PyFloat_AsDouble(args[4]));
  a.causal = args[6] == Py_True;
  a.softcap = args[7] == Py_None ? 0.0f : static_cast<float>(PyFloat_AsDouble(args[7]));
  if (PyErr_Occurred()) return nullptr;
  View q;
  if (!torch.type || !take_operands(args[0], args[1], &q, &a) || !a.cached.keys || a.cached.batch != q.shape[0])
    Py_RETURN_NONE;
  const int64_t shape[4] = {q.shape[0], a.queries, q.shape[1], a.cached.value_dims};
  return attended(args[0], args[1], q, shape, 4, args[5], nullptr, args[8], &a);
}

// cached_each(q (B, H, 1, D), codes or (keys, values), ranges (B, 3) int32, scale, softcap or None, sinks or None)
//     -> (B, H, D) or None
PyObject *cached_each(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 6) return wrong("cached_each takes (q, kept, ranges, scale, softcap, sinks)");
  w8a8_cached_attention a = {};
  a.scale = static_cast<float>(PyFloat_AsDouble(args[3]));
  a.softcap = args[4] == Py_None ? 0.0f : static_cast<float>(PyFloat_AsDouble(args[4]));
  if (PyErr_Occurred()) return nullptr;
  View q;
  if (!torch.type || !take_operands(args[0], args[1], &q, &a) || a.queries != 1) Py_RETURN_NONE;
  a.batch = q.shape[0];
  const int64_t shape[3] = {q.shape[0], q.shape[1], a.cached.value_dims};
  return attended(args[0], args[1], q, shape, 3, Py_None, args[2], args[5], &a);
}

}  // namespace door
}  // namespace w8a8
