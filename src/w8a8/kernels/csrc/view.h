// What a tensor is made of, seen from Python's stable interface: element type, shape, strides, and where its memory is.
//
// Everything that Python can put in a tensor's place is told apart here, before a byte is read: other types and their
// subclasses, whose memory may be elsewhere or nowhere, other devices, sparse and quantised layouts, wrappers of
// functorch, storages that were let go.
//
// torch tells all of it in one call of some thirty nanoseconds, where it has the table of functions that DLPack defines
// for this (`__dlpack_c_exchange_api__`); its public attributes tell the same, at a hundred for each.
#pragma once

#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

namespace w8a8 {

// An owned reference.
class Ref {
 public:
  explicit Ref(PyObject *p = nullptr) : p_(p) {}
  ~Ref() { Py_XDECREF(p_); }
  Ref(const Ref &) = delete;
  Ref &operator=(const Ref &) = delete;
  PyObject *get() const { return p_; }
  explicit operator bool() const { return p_ != nullptr; }
  bool none() const { return p_ == Py_None; }
  void reset(PyObject *p) {
    Py_XDECREF(p_);
    p_ = p;
  }
  PyObject *release() {
    PyObject *p = p_;
    p_ = nullptr;
    return p;
  }

 private:
  PyObject *p_;
};

// Element types: those of w8a8_dtype, then these.
enum : int { kInt8 = 3, kInt32 = 4, kBool = 5, kTypes = 6, kOtherType = -1 };

// The part of DLPack 1.x that is used, as its documentation lays it out.
namespace dlpack {
struct Tensor {
  void *data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  struct { uint32_t major, minor; } version;
  void *previous, *allocate, *take, *give;
  int (*describe)(void *object, Tensor *to);   // may be null
  void *stream;
};
constexpr int32_t kCpu = 1;
enum : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kTruth = 6 };
}  // namespace dlpack

// Given once, kept for the life of the process.
struct Tensors {
  PyObject *type = nullptr;            // torch.Tensor
  PyObject *parameter = nullptr;       // torch.nn.Parameter
  PyObject *dtypes[kTypes] = {};       // float32, bfloat16, float16, int8, int32, bool
  const dlpack::Exchange *exchange = nullptr;
  PyObject *dtype, *is_cpu, *shape, *stride, *data_ptr, *is_neg;   // interned
};

constexpr int kMaxAxes = 12;

struct View {
  void *data;
  int dtype, axes;
  int64_t shape[kMaxAxes], strides[kMaxAxes];
  int64_t count;   // elements

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = axes - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return count == 0;
      expected *= shape[i];
    }
    return true;
  }
  bool same_shape(const View &other) const {
    if (axes != other.axes) return false;
    for (int i = 0; i < axes; ++i)
      if (shape[i] != other.shape[i]) return false;
    return true;
  }
};

inline int type_of(const dlpack::Tensor &t) {
  if (t.dtype.lanes != 1) return kOtherType;
  switch (t.dtype.code << 8 | t.dtype.bits) {
    case dlpack::kFloat << 8 | 32: return 0;
    case dlpack::kBfloat << 8 | 16: return 1;
    case dlpack::kFloat << 8 | 16: return 2;
    case dlpack::kInt << 8 | 8: return kInt8;
    case dlpack::kInt << 8 | 32: return kInt32;
    case dlpack::kTruth << 8 | 8: return kBool;
    default: return kOtherType;
  }
}

// No error is left behind: a tensor that cannot say where its memory is has none that could be used.
inline bool no() {
  PyErr_Clear();
  return false;
}

inline bool integers(PyObject *sequence, int64_t *to, int *count) {
  const Ref held(sequence);
  const Py_ssize_t size = held ? PyTuple_Size(held.get()) : -1;
  if (size < 0 || size > kMaxAxes) return no();
  for (Py_ssize_t i = 0; i < size; ++i) to[i] = PyLong_AsLongLong(PyTuple_GetItem(held.get(), i));
  *count = static_cast<int>(size);
  return PyErr_Occurred() ? no() : true;
}

inline bool ask_attributes(const Tensors &torch, PyObject *tensor, View *to) {
  const Ref cpu(PyObject_GetAttr(tensor, torch.is_cpu)), dtype(PyObject_GetAttr(tensor, torch.dtype));
  if (!cpu || !dtype || cpu.get() != Py_True) return no();
  to->dtype = kOtherType;
  for (int i = 0; i < kTypes; ++i)
    if (dtype.get() == torch.dtypes[i]) to->dtype = i;
  int axes = 0;
  if (!integers(PyObject_GetAttr(tensor, torch.shape), to->shape, &to->axes) ||
      !integers(PyObject_CallMethodObjArgs(tensor, torch.stride, nullptr), to->strides, &axes) || axes != to->axes)
    return no();
  const Ref address(PyObject_CallMethodObjArgs(tensor, torch.data_ptr, nullptr));
  if (!address) return no();
  to->data = PyLong_AsVoidPtr(address.get());
  return PyErr_Occurred() ? no() : true;
}

inline bool ask_exchange(const Tensors &torch, PyObject *tensor, View *to) {
  dlpack::Tensor t;
  if (torch.exchange->describe(tensor, &t) != 0) return no();
  if (t.device.type != dlpack::kCpu || t.ndim < 0 || t.ndim > kMaxAxes) return false;
  to->data = static_cast<char *>(t.data) + t.byte_offset;
  to->dtype = type_of(t), to->axes = t.ndim;
  for (int i = 0; i < t.ndim; ++i) to->shape[i] = t.shape[i], to->strides[i] = t.strides[i];
  return true;
}

// Whether this is plain memory of this process: an object of torch.Tensor itself, strided, on the CPU, with its values
// behind its address.  The view holds as long as no other Python code runs.
inline bool look(const Tensors &torch, PyObject *tensor, View *to, bool or_parameter = false) {
  PyObject *const type = reinterpret_cast<PyObject *>(Py_TYPE(tensor));
  if (type != torch.type && !(or_parameter && type == torch.parameter)) return false;
  if (!(torch.exchange ? ask_exchange(torch, tensor, to) : ask_attributes(torch, tensor, to))) return false;
  to->count = 1;
  for (int i = 0; i < to->axes; ++i)
    if (to->shape[i] < 0 || __builtin_mul_overflow(to->count, to->shape[i], &to->count)) return false;
  return to->data || to->count == 0;
}

// Whether the values are the negatives of what the memory holds, as those of a conjugate's imaginary part are; floats only.
// An error counts as that too.
inline bool negated(const Tensors &torch, PyObject *tensor) {
  const Ref truth(PyObject_CallMethodObjArgs(tensor, torch.is_neg, nullptr));
  if (!truth) return !no();
  return truth.get() != Py_False;
}

}  // namespace w8a8
