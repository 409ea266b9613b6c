// The door from Python: one call, from a layer's tensors to its output.
//
// A small layer's product takes a few microseconds, and taking its tensors apart in Python takes three times as long
// (bench/overhead.py).  So this is done here, through Python's stable interface: neither torch's headers nor its C++ are
// needed, and one build serves every Python.
//
// Whatever comes in, each tensor is looked at (view.h) before its memory is: type, device, dtype, size and strides, at
// every call, since a layer's buffers may be replaced or changed between two.  `linear` answers None where the caller has
// to take the long way: PyTorch's dispatcher has something to do, or x is not what the kernel takes.  A buffer that does
// not belong to such a layer is an error, raised by `refuse`.
#include "view.h"

#include <cmath>
#include <initializer_list>

#include "w8a8.h"

using namespace w8a8;

namespace {

// malloc hands out new pages for tensors of this size again and again, and large pages are taken faster; of still larger
// ones the kernel's free large pages run out of those that were used lately, and behind a hypervisor that takes idle
// memory back each is expensive (bench/linear.py, 11008 x 4096 at 2048 rows)
constexpr int64_t kFreshMemory = int64_t{4} << 20;
constexpr int64_t kColdMemory = int64_t{48} << 20;

// Given once by `prepare`, kept for the life of the process.
Tensors torch;
struct {
  PyObject *threads, *grad_enabled, *dispatch_modes, *tracing;   // functions of torch
  PyObject *forward_ad;             // the names of torch.autograd.forward_ad: the level of forward-mode derivatives is one
  PyObject *plain_float, *refuse;   // of w8a8.kernels.native
} given;

// Interned.
struct {
  PyObject *requires_grad, *new_empty, *current_level;
  PyObject *packed_weight, *weight_scale, *weight_sum, *bias, *input_scale, *input_zero_point;
} names;

// 1, 0, or -1 with an exception; `truth` is consumed.
int truth_of(PyObject *truth) {
  if (!truth) return -1;
  const Ref held(truth);
  return PyObject_IsTrue(truth);
}

// The number, or -1 with an exception; `number` is consumed.
int64_t integer_of(PyObject *number) {
  if (!number) return -1;
  const Ref held(number);
  return PyLong_AsLongLong(number);
}

// A buffer of the layer, None where it has none.  One that was taken away, as a parametrisation does, is an error: it would
// count as a bias that is not there.
PyObject *buffer(PyObject *buffers, PyObject *name) {
  PyObject *found = PyDict_GetItemWithError(buffers, name);
  if (!found && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, name);
  Py_XINCREF(found);   // held while other Python threads run
  return found;
}

int wants_gradient(PyObject *tensor) {
  return tensor == Py_None ? 0 : truth_of(PyObject_GetAttr(tensor, names.requires_grad));
}

// Whether PyTorch's dispatcher has to see this call: 1, 0, or -1 with an exception.
int watched(PyObject *x, PyObject *scale, PyObject *bias) {
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
bool take_input(PyObject *x, int64_t k, Input *in) {
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

Fit refuse(PyObject *name, PyObject *tensor, const char *dtype, int64_t count) {
  const Ref raised(PyObject_CallFunction(given.refuse, "OOsL", name, tensor, dtype, static_cast<long long>(count)));
  if (raised) PyErr_SetString(PyExc_AssertionError, "refuse raises");
  return Fit::kError;
}

// A buffer's address.  A tensor that is not plain memory is the dispatcher's, if it has not seen this call.
Fit integers_of(PyObject *name, PyObject *tensor, int dtype, int64_t count, bool direct, void **to) {
  View v;
  if (!look(torch, tensor, &v))
    return direct && tensor != Py_None ? Fit::kLongWay : refuse(name, tensor, dtype == kInt8 ? "int8" : "int32", count);
  if (v.dtype != dtype || v.count != count || !v.contiguous())
    return refuse(name, tensor, dtype == kInt8 ? "int8" : "int32", count);
  *to = v.data;
  return Fit::kYes;
}

// The same of floats: others than float32, and those that do not lie in a row, are copied for this call, once.
Fit floats_of(PyObject *name, Ref &tensor, int64_t count, bool direct, bool copies, void **to) {
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

PyObject *output_of(PyObject *x, const View &v, int64_t n) {
  const Ref shape(PyTuple_New(v.axes));
  if (!shape) return nullptr;
  for (int i = 0; i < v.axes; ++i) {
    PyObject *size = PyLong_FromLongLong(i + 1 < v.axes ? v.shape[i] : n);
    if (!size || PyTuple_SetItem(shape.get(), i, size) < 0) return nullptr;
  }
  return PyObject_CallMethodObjArgs(x, names.new_empty, shape.get(), nullptr);
}

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

// linear(x, buffers, n, k, per_channel, mode, bits, direct) -> y or None; w8a8/kernels/native.py says what they are.
PyObject *linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 8 || !PyDict_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "linear takes (x, buffers, n, k, per_channel, mode, bits, direct)");
    return nullptr;
  }
  PyObject *const x = args[0];
  w8a8_layer layer = {};
  layer.n = PyLong_AsLongLong(args[2]), layer.k = PyLong_AsLongLong(args[3]);
  const long per_channel = PyLong_AsLong(args[4]), mode = PyLong_AsLong(args[5]), bits = PyLong_AsLong(args[6]);
  if (PyErr_Occurred()) return nullptr;
  layer.scale_stride = per_channel != 0;
  layer.mode = static_cast<int32_t>(mode), layer.bits = static_cast<int32_t>(bits);
  const bool direct = args[7] == Py_True;
  if (!torch.type || layer.n < 1 || layer.k < 1) Py_RETURN_NONE;

  Input in;
  Buffers buffers;
  if (!take_input(x, layer.k, &in) || negated(torch, x)) Py_RETURN_NONE;
  if (!buffers.take(args[1])) return nullptr;
  if (buffers.packed.none()) Py_RETURN_NONE;
  if (direct) {
    const int seen = watched(x, buffers.scale.get(), buffers.bias.get());
    if (seen < 0) return nullptr;
    if (seen) Py_RETURN_NONE;
  }
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;
  Ref y(output_of(x, in.view, layer.n));
  if (!y) return nullptr;

  // Making y, or a copy, may have run Python code, of a mode that is active: so memory is looked at after it, x once more.
  const Fit fit = buffers.fill(&layer, direct);
  if (fit == Fit::kError) return nullptr;
  if (fit == Fit::kLongWay) Py_RETURN_NONE;
  Input now;
  View out;
  if (!take_input(x, layer.k, &now) || !now.view.same_shape(in.view)) Py_RETURN_NONE;
  if (!look(torch, y.get(), &out) || out.dtype != now.view.dtype || out.count != now.rows * layer.n || !out.contiguous())
    Py_RETURN_NONE;

  int status;
  Py_BEGIN_ALLOW_THREADS;
  const int64_t bytes = out.count * (out.dtype == W8A8_F32 ? 4 : 2);
  if (bytes >= kFreshMemory && bytes < kColdMemory) w8a8_advise_huge(out.data, bytes);
  status = w8a8_linear(&layer, now.view.data, out.dtype, now.rows, now.stride, out.data, layer.n,
                       static_cast<int32_t>(threads));
  Py_END_ALLOW_THREADS;
  if (status == W8A8_NO_MEMORY) return PyErr_NoMemory();
  if (status != W8A8_OK) {
    PyErr_Format(PyExc_AssertionError, "w8a8_linear: %d", status);
    return nullptr;
  }
  return y.release();
}

// prepare(Tensor, dtypes in the order of view.h, DLPack's table or None, get_num_threads, is_grad_enabled,
//         dispatch modes, is_tracing, the names of forward_ad, plain_float, refuse)
PyObject *prepare(PyObject *, PyObject *args) {
  Tensors tensors = torch;
  auto functions = given;
  PyObject *table;
  if (!PyArg_ParseTuple(args, "O(OOOOO)OOOOOO!OO", &tensors.type, &tensors.dtypes[0], &tensors.dtypes[1],
                        &tensors.dtypes[2], &tensors.dtypes[3], &tensors.dtypes[4], &table, &functions.threads,
                        &functions.grad_enabled, &functions.dispatch_modes, &functions.tracing, &PyDict_Type,
                        &functions.forward_ad, &functions.plain_float, &functions.refuse))
    return nullptr;
  tensors.exchange = nullptr;
  if (table != Py_None) {
    const void *found = PyCapsule_GetPointer(table, "dlpack_exchange_api");
    if (!found) return nullptr;
    const auto *exchange = static_cast<const dlpack::Exchange *>(found);
    if (exchange->version.major == 1 && exchange->describe) tensors.exchange = exchange;
  }
  Py_INCREF(args);   // and with it all that it holds
  torch = tensors, given = functions;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL,
     "The layer's output, or None: take the long way."},
    {"prepare", prepare, METH_VARARGS, "Tell the module what torch is."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "w8a8.kernels._native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  const struct {
    PyObject **name;
    const char *text;
  } all[] = {
      {&torch.dtype, "dtype"},
      {&torch.is_cpu, "is_cpu"},
      {&torch.shape, "shape"},
      {&torch.stride, "stride"},
      {&torch.data_ptr, "data_ptr"},
      {&torch.is_neg, "is_neg"},
      {&names.requires_grad, "requires_grad"},
      {&names.new_empty, "new_empty"},
      {&names.current_level, "_current_level"},
      {&names.packed_weight, "packed_weight"},
      {&names.weight_scale, "weight_scale"},
      {&names.weight_sum, "weight_sum"},
      {&names.bias, "bias"},
      {&names.input_scale, "input_scale"},
      {&names.input_zero_point, "input_zero_point"},
  };
  for (const auto &entry : all)
    if (!(*entry.name = PyUnicode_InternFromString(entry.text))) return nullptr;
  return PyModule_Create(&module);
}
