// The door to plans: steps, as tuples of numbers and of where a block holds its tensors, and the tensors of one call.
//
// Whoever calls has seen to it that the dispatcher has nothing to do.  None: one of the tensors is not plain memory of
// this process, of float32 and of the shape that the others ask for; then nothing was written.
#include <memory>
#include <new>
#include <vector>

#include "door.h"

namespace w8a8 {
namespace door {
namespace {

struct Weights {   // of a norm
  Ref weight, bias;
};

// What a call's tuples say, and the references that keep what is read alive.
struct Parsed {
  std::vector<w8a8_step> steps;
  std::vector<w8a8_slot> slots;
  std::vector<w8a8_mask> masks;
  std::vector<w8a8_layer> layers;
  std::vector<int32_t> out, activation;   // by layer; of an attention, its output
  std::unique_ptr<Buffers[]> buffers;
  std::unique_ptr<Weights[]> weights;
};

constexpr Py_ssize_t kStep = 8, kAttention = 10;   // fields

int32_t index(PyObject *tuple, Py_ssize_t i) { return static_cast<int32_t>(number(tuple, i)); }

bool held(PyObject *step, Py_ssize_t at, Ref *to) {   // (dictionary, name) or None
  PyObject *place = PyTuple_GetItem(step, at);
  if (place == Py_None) {
    Py_INCREF(Py_None);
    to->reset(Py_None);
    return true;
  }
  if (!PyTuple_Check(place) || PyTuple_Size(place) != 2 || !PyDict_Check(PyTuple_GetItem(place, 0)))
    return wrong("where a tensor is held is (dictionary, name)");
  to->reset(buffer(PyTuple_GetItem(place, 0), PyTuple_GetItem(place, 1)));
  return static_cast<bool>(*to);
}

Fit bad(const char *what) {   // a TypeError
  wrong(what);
  return Fit::kError;
}

// (kind, x, add, sum, normed, norm or None, layers, out) and for attention (kind, q, k, v, heads, shared, mask, scale,
// causal, out).
Fit step_of(PyObject *given, int i, Parsed *p, int *layer_count) {
  w8a8_step &s = p->steps[i];
  s = {};
  if (!PyTuple_Check(given) || PyTuple_Size(given) < 1) return bad("a step is a tuple that begins with its kind");
  s.kind = index(given, 0);
  if (PyErr_Occurred()) return Fit::kError;
  if (s.kind == W8A8_STEP_ATTEND) {
    if (PyTuple_Size(given) != kAttention)
      return bad("an attention is (kind, q, k, v, heads, shared, mask, scale, causal, out)");
    s.q = index(given, 1), s.k = index(given, 2), s.v = index(given, 3), s.heads = index(given, 4);
    s.shared = index(given, 5), s.mask = index(given, 6);
    s.scale = static_cast<float>(PyFloat_AsDouble(PyTuple_GetItem(given, 7)));
    s.causal = PyTuple_GetItem(given, 8) == Py_True;
    s.x = *layer_count;   // where its output is; the address is taken when the vectors have stopped growing
    p->out.push_back(index(given, 9)), p->activation.push_back(0), p->layers.push_back({});
    *layer_count += 1;
    return PyErr_Occurred() ? Fit::kError : Fit::kYes;
  }
  if (PyTuple_Size(given) != kStep)   // as `layers_in` counts them
    return bad("a step is (kind, x, add, sum, normed, norm, layers, out)");
  s.x = index(given, 1), s.add = index(given, 2), s.sum = index(given, 3), s.normed = index(given, 4);
  if (PyErr_Occurred()) return Fit::kError;
  PyObject *norm = PyTuple_GetItem(given, 5), *layers = PyTuple_GetItem(given, 6), *out = PyTuple_GetItem(given, 7);
  if (norm != Py_None) {
    if (!PyTuple_Check(norm) || PyTuple_Size(norm) != 4) return bad("a norm is (weight, bias, eps, width)");
    s.has_norm = 1;
    s.eps = static_cast<float>(PyFloat_AsDouble(PyTuple_GetItem(norm, 2)));
    const int64_t width = number(norm, 3);
    if (s.x < 0 || s.x >= static_cast<int32_t>(p->slots.size()) || width != p->slots[s.x].width)
      return bad("a norm is as wide as what it normalises");
    Weights &w = p->weights[i];
    if (!held(norm, 0, &w.weight) || !held(norm, 1, &w.bias)) return Fit::kError;
    float *weight, *bias;
    if (!plain_floats(w.weight.get(), width, true, &weight) || !plain_floats(w.bias.get(), width, true, &bias))
      return Fit::kLongWay;
    s.weight = weight, s.bias = bias;
  }
  if (!PyTuple_Check(layers) || !PyTuple_Check(out) || PyTuple_Size(layers) != PyTuple_Size(out))
    return bad("there is an output for each layer");
  s.count = static_cast<int32_t>(PyTuple_Size(layers));
  const int first = *layer_count;
  for (int j = 0; j < s.count; ++j) {
    w8a8_layer layer = {};
    int32_t activation = 0;
    Buffers &buffers = p->buffers[first + j];
    if (!layer_of(PyTuple_GetItem(layers, j), &layer, &buffers, &activation)) return Fit::kError;
    if (buffers.packed.none()) return Fit::kLongWay;
    const Fit fit = buffers.fill(&layer, true);
    if (fit != Fit::kYes) return fit;
    p->layers.push_back(layer), p->activation.push_back(activation), p->out.push_back(index(out, j));
  }
  *layer_count += s.count;
  return PyErr_Occurred() ? Fit::kError : Fit::kYes;
}

// How many layers, or outputs of attention, there are in all.
Py_ssize_t layers_in(PyObject *steps) {
  Py_ssize_t all = 0;
  for (Py_ssize_t i = 0; i < PyTuple_Size(steps); ++i) {
    PyObject *step = PyTuple_GetItem(steps, i);
    PyObject *layers = PyTuple_Check(step) && PyTuple_Size(step) == kStep ? PyTuple_GetItem(step, 6) : nullptr;
    all += layers && PyTuple_Check(layers) ? PyTuple_Size(layers) : 1;
  }
  return all;
}

PyObject *run_plan(PyObject *const *args) {
  PyObject *const widths = args[0], *const steps = args[1], *const inputs = args[2], *const masks = args[3],
           *const outputs = args[4];
  const auto slot_count = static_cast<int32_t>(PyTuple_Size(widths)), step_count = static_cast<int32_t>(PyTuple_Size(steps));
  const auto input_count = static_cast<int32_t>(PyTuple_Size(inputs)), mask_count = static_cast<int32_t>(PyTuple_Size(masks));
  const auto output_count = static_cast<int32_t>(PyTuple_Size(outputs));
  if (!torch.type || input_count < 1 || input_count > slot_count) Py_RETURN_NONE;
  const int64_t threads = integer_of(PyObject_CallNoArgs(given.threads));
  if (threads < 0) return nullptr;

  Parsed p;
  p.slots.resize(slot_count);
  for (int i = 0; i < slot_count; ++i) p.slots[i].width = number(widths, i);
  if (PyErr_Occurred()) return nullptr;
  View first;
  if (!look(torch, PyTuple_GetItem(inputs, 0), &first) || first.axes != 3) Py_RETURN_NONE;
  const int64_t batch = first.shape[0], length = first.shape[1];
  Ref result(PyTuple_New(output_count));
  if (!result) return nullptr;
  for (int i = 0; i < output_count; ++i) {
    const int64_t slot = number(outputs, i);
    if (slot < input_count || slot >= slot_count)
      return PyErr_Occurred() ? nullptr : wrong("an output is a slot that a step writes");
    Ref made(output_of(PyTuple_GetItem(inputs, 0), first, p.slots[slot].width));
    if (!made || PyTuple_SetItem(result.get(), i, made.release()) < 0) return nullptr;
  }

  const Py_ssize_t layers = layers_in(steps);
  p.steps.resize(step_count);
  p.layers.reserve(layers), p.out.reserve(layers), p.activation.reserve(layers);
  p.buffers.reset(new Buffers[layers]), p.weights.reset(new Weights[step_count]);
  std::vector<int> begins(step_count);
  int layer_count = 0;
  for (int i = 0; i < step_count; ++i) {
    begins[i] = layer_count;
    const Fit read = step_of(PyTuple_GetItem(steps, i), i, &p, &layer_count);
    if (read == Fit::kError) return nullptr;
    if (read == Fit::kLongWay) Py_RETURN_NONE;
  }
  for (int i = 0; i < step_count; ++i)
    p.steps[i].layers = p.layers.data() + begins[i], p.steps[i].out = p.out.data() + begins[i],
    p.steps[i].activation = p.activation.data() + begins[i];

  // looked at after the last code of others ran: what makes outputs, and what copies a layer's buffers
  for (int i = 0; i < input_count; ++i) {
    View v;
    PyObject *tensor = PyTuple_GetItem(inputs, i);
    if (!look(torch, tensor, &v) || v.dtype != W8A8_F32 || v.axes != 3 || v.count == 0 || !v.contiguous() ||
        negated(torch, tensor) || v.shape[0] != batch || v.shape[1] != length || v.shape[2] != p.slots[i].width)
      Py_RETURN_NONE;
    p.slots[i].given = static_cast<float *>(v.data);
  }
  p.masks.resize(mask_count);
  const int64_t seen[4] = {batch, 1, length, length};   // heads with masks of their own go the long way
  for (int i = 0; i < mask_count; ++i) {
    w8a8_mask &m = p.masks[i];
    if (!mask_of(PyTuple_GetItem(masks, i), seen, &m.data, &m.is_float, m.at)) Py_RETURN_NONE;
  }
  for (int i = 0; i < output_count; ++i) {
    w8a8_slot &slot = p.slots[number(outputs, i)];
    if (slot.wanted) return wrong("an output was asked for twice");
    if (!plain_floats(PyTuple_GetItem(result.get(), i), batch * length * slot.width, false, &slot.wanted)) Py_RETURN_NONE;
  }

  std::vector<int64_t> read(args[5] == Py_None ? 0 : static_cast<size_t>(PyTuple_Size(args[5])));
  for (size_t i = 0; i < read.size(); ++i) {
    read[i] = number(args[5], static_cast<Py_ssize_t>(i));
    if (read[i] < 0) read[i] += length;
    if (read[i] < 0 || read[i] >= length) Py_RETURN_NONE;   // whoever reads it says so
  }
  if (PyErr_Occurred()) return nullptr;
  const w8a8_plan plan = {batch, length, p.steps.data(), p.slots.data(), p.masks.data(), step_count, slot_count, mask_count,
                          args[5] != Py_None, read.data(), static_cast<int32_t>(read.size())};
  return given_back(result, "w8a8_run", [&] { return w8a8_run(&plan, static_cast<int32_t>(threads)); });
}

}  // namespace

// run(widths of the slots, steps, inputs, masks, outputs, read): the first slots are the inputs' (B, T, width), outputs are
// numbers of slots; read: None where padding is computed, else the tokens that are read whether they are padding or not
// -> a tuple of (B, T, width), or None
PyObject *run(PyObject *, PyObject *const *args, Py_ssize_t count) {
  bool fits = count == 6 && (args[5] == Py_None || PyTuple_Check(args[5]));
  for (int i = 0; fits && i < 5; ++i) fits = PyTuple_Check(args[i]);
  if (!fits) return wrong("run takes (widths, steps, inputs, masks, outputs, read)");
  try {
    return run_plan(args);
  } catch (const std::bad_alloc &) {
    return PyErr_NoMemory();
  }
}

}  // namespace door
}  // namespace w8a8
