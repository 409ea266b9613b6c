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
#include "door.h"

using namespace w8a8;
using namespace w8a8::door;

namespace {

// linear(x, buffers, n, k, per_channel, mode, bits, direct) -> y or None; w8a8/kernels/native.py says what they are.
PyObject *linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 8 || !PyDict_Check(args[1])) return wrong("linear takes (x, buffers, n, k, per_channel, mode, bits, direct)");
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

// prepare(Tensor, Parameter, dtypes in the order of view.h, DLPack's table or None, get_num_threads, is_grad_enabled,
//         dispatch modes, is_tracing, the names of forward_ad, plain_float, refuse)
PyObject *prepare(PyObject *, PyObject *args) {
  Tensors tensors = torch;
  auto functions = given;
  PyObject *table;
  if (!PyArg_ParseTuple(args, "OO(OOOOOO)OOOOOO!OO", &tensors.type, &tensors.parameter, &tensors.dtypes[0], &tensors.dtypes[1],
                        &tensors.dtypes[2], &tensors.dtypes[3], &tensors.dtypes[4], &tensors.dtypes[5], &table, &functions.threads,
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

PyMethodDef fast(const char *name, Function *function, const char *about) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, about};
}

PyMethodDef methods[] = {
    fast("linear", linear, "The layer's output, or None: take the long way."),
    fast("fused", fused, "The outputs of layers that read one input, and what stands before and behind them; or None."),
    fast("normalize", normalize, "A sum and its LayerNorm, or None."),
    fast("attend", attend, "Attention, (B, T, H, D), or None."),
    fast("cached_append", cached_append, "Keys and values, quantised into their places; True, or None."),
    fast("cached_read", cached_read, "Keys or values, dequantised; True, or None."),
    fast("cached_attend", cached_attend, "Attention over keys and values in int8, (B, T, H, D), or None."),
    fast("cached_deal", cached_deal, "Tokens of several sequences, quantised into their places; True, or None."),
    fast("cached_each", cached_each,
         "Attention of one query of each of several sequences over its own past, (B, H, D), or None."),
    fast("run", run, "Many steps over matrices of a row per token: the outputs, or None."),
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
