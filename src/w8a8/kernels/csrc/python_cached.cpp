// The door to keys and values in int8 (w8a8/kernels/cached.py).
//
// Whoever calls has seen to it that the dispatcher has nothing to do.  None: one of the tensors is not plain memory of
// this process, of a type and shape that the kernel takes; then nothing was written.
#include "door.h"

namespace w8a8 {
namespace door {
namespace {

constexpr int kAxes = 4;

// (B, H, T, D) of a float type, with an inner stride of one; whatever the others.
bool floats_by_head(PyObject *tensor, View *v, int64_t *at) {
  if (!look(torch, tensor, v) || v->dtype < W8A8_F32 || v->dtype > W8A8_F16 || v->axes != kAxes || v->count == 0 ||
      negated(torch, tensor))
    return false;
  if (v->strides[3] != 1 && v->shape[3] != 1) return false;
  for (int i = 0; i < 3; ++i) {
    at[i] = v->strides[i];
    if (at[i] < 0) return false;
  }
  return true;
}

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

// A mask that broadcasts to the shape: its strides there.
bool take_mask(PyObject *tensor, const int64_t *shape, w8a8_cached_attention *a) {
  View v;
  if (!look(torch, tensor, &v) || (v.dtype != W8A8_F32 && v.dtype != kBool) || v.axes != kAxes) return false;
  if (v.dtype == W8A8_F32 && negated(torch, tensor)) return false;
  for (int i = 0; i < kAxes; ++i) {
    if (v.shape[i] != shape[i] && (v.shape[i] != 1 || i == 3)) return false;
    a->mask_at[i] = v.shape[i] == 1 && i != 3 ? 0 : v.strides[i];
  }
  a->mask = v.data, a->mask_is_float = v.dtype == W8A8_F32;
  return true;
}

bool takes(PyObject *const *, Py_ssize_t count, Py_ssize_t wanted, const char *what) {
  if (count == wanted) return true;
  PyErr_SetString(PyExc_TypeError, what);
  return false;
}

// Whether keys and values are so many sequences of what is kept.
bool fit(const w8a8_cached &c, const View &k, const View &v, int64_t batch) {
  return k.dtype == v.dtype && k.shape[0] == batch && k.shape[1] == c.heads && k.shape[3] == c.key_dims && v.shape[0] == batch &&
         v.shape[1] == c.heads && v.shape[2] == k.shape[2] && v.shape[3] == c.value_dims;
}

// What is kept: codes, or (keys, values) as they came, (P, H, C, D).
bool take_kept(PyObject *kept, w8a8_cached_attention *a) {
  if (!PyTuple_Check(kept) || PyTuple_Size(kept) != 2) return take_codes(kept, &a->cached);
  View k, v;
  if (!floats_by_head(PyTuple_GetItem(kept, 0), &k, a->keys_at) || !floats_by_head(PyTuple_GetItem(kept, 1), &v, a->values_at) ||
      k.dtype != a->dtype || v.dtype != a->dtype)
    return false;
  for (int i = 0; i < 3; ++i)
    if (k.shape[i] != v.shape[i]) return false;
  w8a8_cached *const c = &a->cached;
  c->batch = k.shape[0], c->heads = k.shape[1], c->room = k.shape[2], c->key_dims = k.shape[3], c->value_dims = v.shape[3];
  a->keys = k.data, a->values = v.data;
  return true;
}

// True, or None; or an error.
PyObject *done(int status) {
  if (status == W8A8_NO_MEMORY) return PyErr_NoMemory();
  if (status != W8A8_OK) Py_RETURN_NONE;
  Py_RETURN_TRUE;
}

}  // namespace

// cached_deal(codes, keys (1, H, T, D), values, where (T, 2) int32) -> True or None
PyObject *cached_deal(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (!takes(args, count, 4, "cached_deal takes (codes, keys, values, where)")) return nullptr;
  if (!torch.type) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  w8a8_cached c = {};
  View k, v;
  int64_t keys_at[3], values_at[3];
  void *where;
  if (!take_codes(args[0], &c) || !floats_by_head(args[1], &k, keys_at) || !floats_by_head(args[2], &v, values_at) || !fit(c, k, v, 1))
    Py_RETURN_NONE;
  const int64_t pairs[2] = {k.shape[2], 2};
  if (!contiguous_of(args[3], kInt32, pairs, 2, &where)) Py_RETURN_NONE;
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = w8a8_cached_deal(&c, k.data, keys_at, v.data, values_at, k.dtype, static_cast<int32_t *>(where), k.shape[2],
                            static_cast<int32_t>(threads));
  Py_END_ALLOW_THREADS;
  return done(status);
}

// cached_append(codes, keys, values, at) -> True or None
PyObject *cached_append(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (!takes(args, count, 4, "cached_append takes (codes, keys, values, at)")) return nullptr;
  const int64_t at = PyLong_AsLongLong(args[3]);
  if (at == -1 && PyErr_Occurred()) return nullptr;
  if (!torch.type) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  w8a8_cached c = {};
  View k, v;
  int64_t keys_at[3], values_at[3];
  if (!take_codes(args[0], &c) || !floats_by_head(args[1], &k, keys_at) || !floats_by_head(args[2], &v, values_at))
    Py_RETURN_NONE;
  if (!fit(c, k, v, c.batch)) Py_RETURN_NONE;
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = w8a8_cached_append(&c, k.data, keys_at, v.data, values_at, k.dtype, at, k.shape[2], static_cast<int32_t>(threads));
  Py_END_ALLOW_THREADS;
  return done(status);
}

// cached_read(codes, start, whether keys, out) -> True or None
PyObject *cached_read(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (!takes(args, count, 4, "cached_read takes (codes, start, keys, out)")) return nullptr;
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
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = w8a8_cached_read(&c, keys, start, out.shape[2], out.dtype, out.data, static_cast<int32_t>(threads));
  Py_END_ALLOW_THREADS;
  return done(status);
}

// cached_attend(q (B, H, T, D), codes, start, end, scale, mask or None, causal, softcap or None, sinks or None)
//     -> (B, T, H, D) or None
PyObject *cached_attend(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (!takes(args, count, 9, "cached_attend takes (q, codes, start, end, scale, mask, causal, softcap, sinks)")) return nullptr;
  w8a8_cached_attention a = {};
  a.start = PyLong_AsLongLong(args[2]), a.end = PyLong_AsLongLong(args[3]);
  a.scale = static_cast<float>(PyFloat_AsDouble(args[4]));
  a.causal = args[6] == Py_True;
  a.softcap = args[7] == Py_None ? 0.0f : static_cast<float>(PyFloat_AsDouble(args[7]));
  if (PyErr_Occurred()) return nullptr;
  if (!torch.type) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  View q;
  if (!floats_by_head(args[0], &q, a.q_at)) Py_RETURN_NONE;
  w8a8_cached *const c = &a.cached;
  if (!take_codes(args[1], c) || c->batch != q.shape[0] || c->heads < 1 || q.shape[1] % c->heads || q.shape[3] != c->key_dims)
    Py_RETURN_NONE;
  a.shared = q.shape[1] / c->heads, a.queries = q.shape[2], a.dtype = q.dtype;
  const int64_t shape[4] = {q.shape[0], a.queries, q.shape[1], c->value_dims};
  Ref out(tensor_of(args[0], shape, kAxes, c->value_dims));   // may run Python code, of a mode: all is looked at after it
  if (!out) return nullptr;
  View now;
  void *to, *sinks = nullptr;
  if (!floats_by_head(args[0], &now, a.q_at) || !now.same_shape(q) || now.dtype != q.dtype || !take_codes(args[1], c) ||
      c->batch * c->heads * a.shared != q.shape[0] * q.shape[1] || c->key_dims != q.shape[3] || c->value_dims != shape[3] ||
      !contiguous_of(out.get(), q.dtype, shape, kAxes, &to))
    Py_RETURN_NONE;
  const int64_t full[4] = {q.shape[0], q.shape[1], a.queries, a.end - a.start};
  if (args[5] != Py_None && !take_mask(args[5], full, &a)) Py_RETURN_NONE;
  if (args[8] != Py_None && !contiguous_of(args[8], W8A8_F32, &q.shape[1], 1, &sinks)) Py_RETURN_NONE;
  a.q = now.data, a.out = to, a.sinks = static_cast<float *>(sinks);
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = w8a8_cached_attend(&a, static_cast<int32_t>(threads));
  Py_END_ALLOW_THREADS;
  if (status == W8A8_NO_MEMORY) return PyErr_NoMemory();
  if (status != W8A8_OK) Py_RETURN_NONE;
  return out.release();
}

// cached_each(q (B, H, 1, D), codes or (keys, values), ranges (B, 3) int32, scale, softcap or None, sinks or None)
//     -> (B, H, D) or None
PyObject *cached_each(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (!takes(args, count, 6, "cached_each takes (q, kept, ranges, scale, softcap, sinks)")) return nullptr;
  w8a8_cached_attention a = {};
  a.scale = static_cast<float>(PyFloat_AsDouble(args[3]));
  a.softcap = args[4] == Py_None ? 0.0f : static_cast<float>(PyFloat_AsDouble(args[4]));
  if (PyErr_Occurred()) return nullptr;
  if (!torch.type) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  View q;
  w8a8_cached *const c = &a.cached;
  if (!floats_by_head(args[0], &q, a.q_at)) Py_RETURN_NONE;
  a.dtype = q.dtype, a.batch = q.shape[0], a.queries = 1;
  if (!take_kept(args[1], &a) || c->heads < 1 || q.shape[1] % c->heads || q.shape[2] != 1 || q.shape[3] != c->key_dims) Py_RETURN_NONE;
  const int64_t shape[3] = {q.shape[0], q.shape[1], c->value_dims}, three[2] = {q.shape[0], 3};
  Ref out(tensor_of(args[0], shape, 3, c->value_dims));   // may run Python code, of a mode: all is looked at after it
  if (!out) return nullptr;
  View now;
  void *to, *ranges, *sinks = nullptr;
  if (!floats_by_head(args[0], &now, a.q_at) || !now.same_shape(q) || now.dtype != q.dtype || !take_kept(args[1], &a) ||
      c->heads < 1 || q.shape[1] % c->heads || c->key_dims != q.shape[3] || c->value_dims != shape[2] ||
      !contiguous_of(out.get(), q.dtype, shape, 3, &to) || !contiguous_of(args[2], kInt32, three, 2, &ranges))
    Py_RETURN_NONE;
  if (args[5] != Py_None && !contiguous_of(args[5], W8A8_F32, &q.shape[1], 1, &sinks)) Py_RETURN_NONE;
  a.shared = q.shape[1] / c->heads, a.ranges = static_cast<int32_t *>(ranges);
  a.q = now.data, a.out = to, a.sinks = static_cast<float *>(sinks);
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = w8a8_cached_attend(&a, static_cast<int32_t>(threads));
  Py_END_ALLOW_THREADS;
  if (status == W8A8_NO_MEMORY) return PyErr_NoMemory();
  if (status != W8A8_OK) Py_RETURN_NONE;
  return out.release();
}

}  // namespace door
}  // namespace w8a8
