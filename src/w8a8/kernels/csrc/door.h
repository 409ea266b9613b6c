// What the functions of the door share: what torch is, and how a call's tensors are looked at.
#pragma once

#include "view.h"

#include <initializer_list>

#include "w8a8.h"

namespace w8a8 {
namespace door {

// malloc hands out new pages for tensors of this size again and again, and large pages are taken faster; of still larger
// ones the kernel's free large pages run out of those that were used lately, and behind a hypervisor that takes idle
// memory back each is expensive (bench/linear.py, 11008 x 4096 at 2048 rows)
constexpr int64_t kFreshMemory = int64_t{4} << 20;
constexpr int64_t kColdMemory = int64_t{48} << 20;

// Given once by `prepare`, kept for the life of the process.
inline Tensors torch;
struct Given {
  PyObject *threads, *grad_enabled, *dispatch_modes, *tracing;   // functions of torch
  PyObject *forward_ad;             // the names of torch.autograd.forward_ad: the level of forward-mode derivatives is one
  PyObject *plain_float, *refuse;   // of w8a8.kernels.native
};
inline Given given;

// A TypeError.
inline PyObject *wrong(const char *what) {
  PyErr_SetString(PyExc_TypeError, what);
  return nullptr;
}

// Lets other Python threads run while a function of w8a8.h does: `result`, or an error, or None where grids differ now, as a
// buffer was replaced.
template <class Run>
PyObject *given_back(Ref &result, const char *function, const Run &run) {
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = run();
  Py_END_ALLOW_THREADS;
  if (status == W8A8_OK) return result.release();
  if (status == W8A8_NO_MEMORY) return PyErr_NoMemory();
  if (status == W8A8_BAD_ARGUMENT) Py_RETURN_NONE;
  PyErr_Format(PyExc_AssertionError, "%s: %d", function, status);
  return nullptr;
}

// Interned.
struct Names {
  PyObject *requires_grad, *new_empty, *current_level;
  PyObject *packed_weight, *weight_scale, *weight_sum, *bias, *input_scale, *input_zero_point;
};
inline Names names;

// 1, 0, or -1 with an exception; `truth` is consumed.
inline int truth_of(PyObject *truth) {
  if (!truth) return -1;
  const Ref held(truth);
  return PyObject_IsTrue(truth);
}

// The number, or -1 with an exception; `number` is consumed.
inline int64_t integer_of(PyObject *number) {
  if (!number) return -1;
  const Ref held(number);
  return PyLong_AsLongLong(number);
}

// A buffer of the layer, None where it has none.  One that was taken away, as a parametrisation does, is an error: it would
// count as a bias that is not there.
inline PyObject *buffer(PyObject *buffers, PyObject *name) {
  PyObject *found = PyDict_GetItemWithError(buffers, name);
  if (!found && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, name);
  Py_XINCREF(found);   // held while other Python threads run
  return found;
}

inline int wants_gradient(PyObject *tensor) {
  return tensor == Py_None ? 0 : truth_of(PyObject_GetAttr(tensor, names.requires_grad));
}

// Whether PyTorch's dispatcher has to see this call: 1, 0, or -1 with an exception.
inline int watched(PyObject *x, PyObject *scale, PyObject *bias) {
  const int enabled = truth_of(PyObject_CallNoArgs(given.grad_enabled));
  if (enabled < 0) return -1;
  if (enabled)
    for (PyObject *tensor : {x, bias, scale}) {
      const int wanted = wants_gradient(tensor);
      if (wanted != 0) return wanted;
    }
  PyObject *level = PyDict_GetItemWithError(given.forward_ad, names.current_level);
  if (!level) return PyErr_Occurred() ? -1 : 1;
  const long depth = PyLong_AsLong(level);
  if (depth != -1) return 1;
  if (PyErr_Occurred()) return -1;
  const int modes = truth_of(PyObject_CallNoArgs(given.dispatch_modes));
  if (modes != 0) return modes;
  return truth_of(PyObject_CallNoArgs(given.tracing));
}

struct Input {
  View view;
  int64_t rows, stride;
};

// Whether the kernel takes this input.
inline bool take_input(PyObject *x, int64_t k, Input *in) {
  View &v = in->view;
  if (!look(torch, x, &v) || v.dtype < W8A8_F32 || v.dtype > W8A8_F16 || v.axes < 1 || v.shape[v.axes - 1] != k)
    return false;
  if (v.count == 0) return false;
  in->rows = v.count / k, in->stride = k;
  if (v.contiguous()) return true;
  in->stride = v.strides[0];
  return v.axes == 2 && (v.strides[1] == 1 || k == 1) && in->stride >= 0;   // rows apart, each of them whole
}

// kLongWay: the dispatcher may know what to do with such a tensor.  kAgain: a copy took its place, and was made by Python
// code, which may have changed what was looked at before.
enum class Fit { kYes, kAgain, kLongWay, kError };

inline Fit refuse(PyObject *name, PyObject *tensor, const char *dtype, int64_t count) {
  const Ref raised(PyObject_CallFunction(given.refuse, "OOsL", name, tensor, dtype, static_cast<long long>(count)));
  if (raised) PyErr_SetString(PyExc_AssertionError, "refuse raises");
  return Fit::kError;
}

// A buffer's address.  A tensor that is not plain memory is the dispatcher's, if it has not seen this call.
inline Fit integers_of(PyObject *name, PyObject *tensor, int dtype, int64_t count, bool direct, void **to) {
  View v;
  if (!look(torch, tensor, &v))
    return direct && tensor != Py_None ? Fit::kLongWay : refuse(name, tensor, dtype == kInt8 ? "int8" : "int32", count);
  if (v.dtype != dtype || v.count != count || !v.contiguous())
    return refuse(name, tensor, dtype == kInt8 ? "int8" : "int32", count);
  *to = v.data;
  return Fit::kYes;
}

// The same of floats: others than float32, and those that do not lie in a row, are copied for this call, once.
inline Fit floats_of(PyObject *name, Ref &tensor, int64_t count, bool direct, bool copies, void **to) {
  View v;
  if (!look(torch, tensor.get(), &v))
    return direct && !tensor.none() ? Fit::kLongWay : refuse(name, tensor.get(), "float32", count);
  if (v.count == count && v.dtype == W8A8_F32 && v.contiguous() && !negated(torch, tensor.get())) {
    *to = v.data;
    return Fit::kYes;
  }
  if (v.count != count || !copies) return refuse(name, tensor.get(), "float32", count);
  PyObject *plain = PyObject_CallFunctionObjArgs(given.plain_float, name, tensor.get(), nullptr);
  if (!plain) return Fit::kError;
  tensor.reset(plain);
  return Fit::kAgain;
}

// A new tensor like x of another shape: axes 0..axes-2 of `shape`, then n.
inline PyObject *tensor_of(PyObject *like, const int64_t *shape, int axes, int64_t n) {
  const Ref sizes(PyTuple_New(axes));
  if (!sizes) return nullptr;
  for (int i = 0; i < axes; ++i) {
    PyObject *size = PyLong_FromLongLong(i + 1 < axes ? shape[i] : n);
    if (!size || PyTuple_SetItem(sizes.get(), i, size) < 0) return nullptr;
  }
  return PyObject_CallMethodObjArgs(like, names.new_empty, sizes.get(), nullptr);
}

inline PyObject *output_of(PyObject *x, const View &v, int64_t n) { return tensor_of(x, v.shape, v.axes, n); }

// The addresses of a layer's buffers.
struct Buffers {
  Ref packed, sums, scale, bias, x_scale, x_zero_point;

  bool take(PyObject *all) {
    packed.reset(buffer(all, names.packed_weight)), sums.reset(buffer(all, names.weight_sum));
    scale.reset(buffer(all, names.weight_scale)), bias.reset(buffer(all, names.bias));
    x_scale.reset(buffer(all, names.input_scale)), x_zero_point.reset(buffer(all, names.input_zero_point));
    return packed && sums && scale && bias && x_scale && x_zero_point;
  }

  Fit fill(w8a8_layer *layer, bool direct) {
    // each float buffer may be copied once, and then all are looked at again
    for (int left = 3; left >= 0; --left) {
      const Fit fit = fill_once(layer, direct, left > 0);
      if (fit != Fit::kAgain) return fit;
    }
    return Fit::kLongWay;   // never: without copies nothing is done again
  }

 private:
  Fit fill_once(w8a8_layer *layer, bool direct, bool copies) {
    const int64_t n = layer->n, scales = layer->scale_stride ? n : 1;
    void *at[6] = {};
    Fit fit = integers_of(names.packed_weight, packed.get(), kInt8, w8a8_packed_bytes(n, layer->k), direct, &at[0]);
    if (fit == Fit::kYes) fit = integers_of(names.weight_sum, sums.get(), kInt32, n, direct, &at[1]);
    if (fit == Fit::kYes) fit = floats_of(names.weight_scale, scale, scales, direct, copies, &at[2]);
    if (fit == Fit::kYes && !bias.none()) fit = floats_of(names.bias, bias, n, direct, copies, &at[3]);
    if (fit == Fit::kYes && layer->mode >= W8A8_STATIC_SYM)
      fit = floats_of(names.input_scale, x_scale, 1, direct, copies, &at[4]);
    if (fit == Fit::kYes && layer->mode == W8A8_STATIC_ASYM)
      fit = integers_of(names.input_zero_point, x_zero_point.get(), kInt32, 1, direct, &at[5]);
    if (fit != Fit::kYes) return fit;
    layer->packed = static_cast<int8_t *>(at[0]), layer->colsum = static_cast<int32_t *>(at[1]);
    layer->scale = static_cast<float *>(at[2]), layer->bias = static_cast<float *>(at[3]);
    if (at[4]) layer->x_scale = *static_cast<float *>(at[4]);
    if (at[5]) layer->x_zero_point = *static_cast<int32_t *>(at[5]);
    return fit;
  }
};

// A contiguous float32 tensor of `count` values, or null for None.
inline bool plain_floats(PyObject *tensor, int64_t count, bool optional, float **to) {
  *to = nullptr;
  if (tensor == Py_None) return optional;
  View v;
  if (!look(torch, tensor, &v, true) || v.dtype != W8A8_F32 || v.count != count || !v.contiguous() || negated(torch, tensor))
    return false;
  *to = static_cast<float *>(v.data);
  return true;
}

// (B, H, T, D) of a float type, with an inner stride of one; whatever the others.
inline bool heads_of(PyObject *tensor, View *v, int64_t *at) {
  if (!look(torch, tensor, v) || v->dtype < W8A8_F32 || v->dtype > W8A8_F16 || v->axes != 4 || v->count == 0 ||
      negated(torch, tensor))
    return false;
  if (v->strides[3] != 1 && v->shape[3] != 1) return false;
  for (int i = 0; i < 3; ++i) {
    at[i] = v->strides[i];
    if (at[i] < 0) return false;
  }
  return true;
}

// A mask that broadcasts to the four axes of `shape`: where it is, and its strides there.
inline bool mask_of(PyObject *tensor, const int64_t *shape, const void **data, int32_t *is_float, int64_t *at) {
  View v;
  if (!look(torch, tensor, &v) || (v.dtype != W8A8_F32 && v.dtype != kBool) || v.axes > 4 || v.axes < 2) return false;
  if (v.dtype == W8A8_F32 && negated(torch, tensor)) return false;
  for (int i = 0; i < 4; ++i) {
    const int own = i - (4 - v.axes);
    const bool spread = own < 0 || v.shape[own] == 1;
    if (spread ? i == 3 && shape[3] != 1 : v.shape[own] != shape[i]) return false;
    at[i] = spread ? 0 : v.strides[own];
  }
  *data = v.data, *is_float = v.dtype == W8A8_F32;
  return true;
}

inline int64_t number(PyObject *tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GetItem(tuple, i)); }

constexpr int kMost = 8;   // layers of one input

// (buffers, n, k, per_channel, mode, bits, activation): what of a layer's call never changes, and where its buffers are.
// False with an exception.
inline bool layer_of(PyObject *given, w8a8_layer *layer, Buffers *buffers, int32_t *activation) {
  if (!PyTuple_Check(given) || PyTuple_Size(given) != 7 || !PyDict_Check(PyTuple_GetItem(given, 0)))
    return wrong("a layer is (buffers, n, k, per_channel, mode, bits, activation)");
  layer->n = number(given, 1), layer->k = number(given, 2), layer->scale_stride = number(given, 3) != 0;
  layer->mode = static_cast<int32_t>(number(given, 4)), layer->bits = static_cast<int32_t>(number(given, 5));
  *activation = static_cast<int32_t>(number(given, 6));
  return !PyErr_Occurred() && buffers->take(PyTuple_GetItem(given, 0));
}

using Function = PyObject *(PyObject *, PyObject *const *args, Py_ssize_t count);
Function fused, normalize, attend;                                                   // python_fused.cpp
Function run;                                                                        // python_plan.cpp
Function cached_append, cached_read, cached_attend, cached_deal, cached_each;        // python_cached.cpp

}  // namespace door
}  // namespace w8a8
