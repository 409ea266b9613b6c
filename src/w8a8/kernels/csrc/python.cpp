// The door from Python: one call, from a layer's tensors to its output.
//
// A small layer's product takes a few microseconds, and taking its tensors apart in Python takes three times as long
// (bench/overhead.py).  So this is done here, through Python's stable interface: neither torch's headers nor its C++ are
// needed, and one build serves every Python.  What a tensor is asked for are its public attributes.
//
// `linear` answers None where the caller has to take the long way: PyTorch's dispatcher has something to do, or the
// operands are not what the kernel takes.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <initializer_list>

#include "w8a8.h"

namespace {

// malloc hands out new pages for tensors of this size again and again, and large pages are taken faster; of still larger
// ones the kernel's free large pages run out of those that were used lately, and behind a hypervisor that takes idle
// memory back each is expensive (bench/linear.py, 11008 x 4096 at 2048 rows)
constexpr int64_t kFreshMemory = int64_t{4} << 20;
constexpr int64_t kColdMemory = int64_t{48} << 20;

// Given once by `prepare`, kept for the life of the process.
struct Torch {
  PyObject *tensor, *dtypes[3];                        // float32, bfloat16, float16, in the order of w8a8_dtype
  PyObject *threads, *grad_enabled, *dispatch_modes, *tracing;
} torch;

// Interned: attributes of tensors, and the names of a layer's buffers.
struct Names {
  PyObject *dtype, *is_cpu, *requires_grad, *is_contiguous, *shape, *stride, *data_ptr, *new_empty, *to_float;
  PyObject *packed_weight, *weight_scale, *weight_sum, *bias, *input_scale, *input_zero_point;
} names;

// An owned reference.
class Ref {
 public:
  explicit Ref(PyObject *p) : p_(p) {}
  ~Ref() { Py_XDECREF(p_); }
  Ref(const Ref &) = delete;
  Ref &operator=(const Ref &) = delete;
  PyObject *get() const { return p_; }
  explicit operator bool() const { return p_ != nullptr; }
  bool none() const { return p_ == Py_None; }
  PyObject *release() {
    PyObject *p = p_;
    p_ = nullptr;
    return p;
  }

 private:
  PyObject *p_;
};

PyObject *attribute(PyObject *o, PyObject *name) { return PyObject_GetAttr(o, name); }
PyObject *method(PyObject *o, PyObject *name) { return PyObject_CallMethodObjArgs(o, name, nullptr); }

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

bool address_of(PyObject *tensor, void **to) {
  const Ref address(method(tensor, names.data_ptr));
  if (!address) return false;
  *to = PyLong_AsVoidPtr(address.get());
  return !PyErr_Occurred();
}

// A buffer of the layer, None where it has none.
PyObject *buffer(PyObject *buffers, PyObject *name) {
  PyObject *found = PyDict_GetItemWithError(buffers, name);
  if (!found && PyErr_Occurred()) return nullptr;
  if (!found) found = Py_None;
  Py_INCREF(found);   // held while other Python threads run
  return found;
}

// The tensor in float32: itself, or a copy.  None stays None.
PyObject *in_float32(PyObject *tensor) {
  if (!tensor || tensor == Py_None) return tensor;
  const Ref held(tensor);
  const Ref dtype(attribute(tensor, names.dtype));
  if (!dtype) return nullptr;
  if (dtype.get() != torch.dtypes[W8A8_F32]) return method(tensor, names.to_float);
  Py_INCREF(tensor);
  return tensor;
}

// Whether PyTorch's dispatcher has to see this call: 1, 0, or -1 with an exception.
int watched(PyObject *x) {
  const int wants_gradient = truth_of(attribute(x, names.requires_grad));
  if (wants_gradient < 0) return -1;
  if (wants_gradient) {
    const int enabled = truth_of(PyObject_CallNoArgs(torch.grad_enabled));
    if (enabled != 0) return enabled;
  }
  const int modes = truth_of(PyObject_CallNoArgs(torch.dispatch_modes));
  if (modes != 0) return modes;
  return truth_of(PyObject_CallNoArgs(torch.tracing));
}

struct Input {
  void *data;
  int64_t rows, stride;
  int32_t dtype;
};

// 1: the kernel takes this input; 0: it does not; -1: an exception.  `output` becomes the shape of y.
int take_input(PyObject *x, int64_t n, int64_t k, bool direct, Input *in, PyObject **output) {
  if (direct && reinterpret_cast<PyObject *>(Py_TYPE(x)) != torch.tensor) return 0;
  const Ref dtype(attribute(x, names.dtype));
  if (!dtype) return -1;
  for (in->dtype = W8A8_F32; in->dtype <= W8A8_F16; ++in->dtype)
    if (dtype.get() == torch.dtypes[in->dtype]) break;
  if (in->dtype > W8A8_F16) return 0;
  const int cpu = truth_of(attribute(x, names.is_cpu));
  if (cpu <= 0) return cpu;
  const int seen = direct ? watched(x) : 0;
  if (seen != 0) return seen < 0 ? -1 : 0;

  const Ref shape(attribute(x, names.shape));
  if (!shape) return -1;
  const Py_ssize_t axes = PyTuple_Size(shape.get());
  if (axes < 1) return axes < 0 ? -1 : 0;
  const int64_t last = PyLong_AsLongLong(PyTuple_GetItem(shape.get(), axes - 1));
  if (last == -1 && PyErr_Occurred()) return -1;
  if (last != k) return 0;
  in->stride = k;
  const int contiguous = truth_of(method(x, names.is_contiguous));
  if (contiguous < 0) return -1;
  if (!contiguous) {   // rows apart from each other, each of them whole
    if (axes != 2) return 0;
    const Ref strides(method(x, names.stride));
    if (!strides) return -1;
    in->stride = PyLong_AsLongLong(PyTuple_GetItem(strides.get(), 0));
    const int64_t inner = PyLong_AsLongLong(PyTuple_GetItem(strides.get(), 1));
    if (PyErr_Occurred()) return -1;
    if (inner != 1) return 0;
  }

  Ref y_shape(PyTuple_New(axes));
  if (!y_shape) return -1;
  in->rows = 1;
  for (Py_ssize_t i = 0; i < axes; ++i) {
    PyObject *size = i + 1 < axes ? PyTuple_GetItem(shape.get(), i) : nullptr;
    if (i + 1 < axes) {
      Py_XINCREF(size);
      const int64_t value = size ? PyLong_AsLongLong(size) : -1;
      if (value == -1 && PyErr_Occurred()) return -1;
      in->rows *= value;
    } else {
      size = PyLong_FromLongLong(n);
    }
    if (!size || PyTuple_SetItem(y_shape.get(), i, size) < 0) return -1;
  }
  if (in->rows == 0) return 0;
  if (!address_of(x, &in->data)) return -1;
  *output = y_shape.release();
  return 1;
}

// linear(x, buffers, n, k, per_channel, mode, bits, direct) -> y or None; w8a8/kernels/native.py says what they are.
PyObject *linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 8 || !PyDict_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "linear takes (x, buffers, n, k, per_channel, mode, bits, direct)");
    return nullptr;
  }
  PyObject *const x = args[0], *const buffers = args[1];
  const int64_t n = PyLong_AsLongLong(args[2]), k = PyLong_AsLongLong(args[3]);
  const long per_channel = PyLong_AsLong(args[4]), mode = PyLong_AsLong(args[5]), bits = PyLong_AsLong(args[6]);
  if (PyErr_Occurred()) return nullptr;
  if (!torch.tensor) Py_RETURN_NONE;

  Input in;
  PyObject *shape = nullptr;
  const int taken = take_input(x, n, k, args[7] == Py_True, &in, &shape);
  if (taken < 0) return nullptr;
  if (taken == 0) Py_RETURN_NONE;
  const Ref y_shape(shape);

  const Ref packed(buffer(buffers, names.packed_weight));
  const Ref sums(buffer(buffers, names.weight_sum));
  const Ref scale(in_float32(buffer(buffers, names.weight_scale)));
  const Ref bias(in_float32(buffer(buffers, names.bias)));
  const Ref input_scale(in_float32(buffer(buffers, names.input_scale)));
  const Ref input_zero_point(buffer(buffers, names.input_zero_point));
  if (!packed || !sums || !scale || !bias || !input_scale || !input_zero_point) return nullptr;
  if (packed.none()) Py_RETURN_NONE;

  void *packed_data, *scale_data, *sums_data, *bias_data = nullptr, *grid;
  if (!address_of(packed.get(), &packed_data) || !address_of(scale.get(), &scale_data) ||
      !address_of(sums.get(), &sums_data) || (!bias.none() && !address_of(bias.get(), &bias_data)))
    return nullptr;
  w8a8_layer layer = {static_cast<int8_t *>(packed_data), static_cast<float *>(scale_data),
                      static_cast<int32_t *>(sums_data), static_cast<float *>(bias_data), n, k,
                      static_cast<int32_t>(per_channel), static_cast<int32_t>(mode), static_cast<int32_t>(bits), 0, 0.0f};
  if (!input_scale.none()) {
    if (!address_of(input_scale.get(), &grid)) return nullptr;
    layer.x_scale = *static_cast<float *>(grid);
  }
  if (!input_zero_point.none()) {
    if (!address_of(input_zero_point.get(), &grid)) return nullptr;
    layer.x_zero_point = *static_cast<int32_t *>(grid);
  }

  const int64_t threads = integer_of(PyObject_CallNoArgs(torch.threads));
  if (threads < 0) return nullptr;
  Ref y(PyObject_CallMethodObjArgs(x, names.new_empty, y_shape.get(), nullptr));
  void *y_data;
  if (!y || !address_of(y.get(), &y_data)) return nullptr;

  int status;
  Py_BEGIN_ALLOW_THREADS;
  const int64_t bytes = in.rows * n * (in.dtype == W8A8_F32 ? 4 : 2);
  if (bytes >= kFreshMemory && bytes < kColdMemory) w8a8_advise_huge(y_data, bytes);
  status = w8a8_linear(&layer, in.data, in.dtype, in.rows, in.stride, y_data, n, static_cast<int32_t>(threads));
  Py_END_ALLOW_THREADS;
  if (status == W8A8_NO_MEMORY) return PyErr_NoMemory();
  if (status != W8A8_OK) {
    PyErr_Format(PyExc_AssertionError, "w8a8_linear: %d", status);
    return nullptr;
  }
  return y.release();
}

// prepare(Tensor, (float32, bfloat16, float16), get_num_threads, is_grad_enabled, dispatch modes, is_tracing)
PyObject *prepare(PyObject *, PyObject *args) {
  Torch given;
  if (!PyArg_ParseTuple(args, "O(OOO)OOOO", &given.tensor, &given.dtypes[0], &given.dtypes[1], &given.dtypes[2],
                        &given.threads, &given.grad_enabled, &given.dispatch_modes, &given.tracing))
    return nullptr;
  for (PyObject *o : {given.tensor, given.dtypes[0], given.dtypes[1], given.dtypes[2], given.threads,
                      given.grad_enabled, given.dispatch_modes, given.tracing})
    Py_INCREF(o);
  torch = given;
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
      {&names.dtype, "dtype"},
      {&names.is_cpu, "is_cpu"},
      {&names.requires_grad, "requires_grad"},
      {&names.is_contiguous, "is_contiguous"},
      {&names.shape, "shape"},
      {&names.stride, "stride"},
      {&names.data_ptr, "data_ptr"},
      {&names.new_empty, "new_empty"},
      {&names.to_float, "float"},
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
