// The same call as an op that C++ registers, through torch's stable interface: for bench/dispatch.py only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "w8a8.h"

using torch::stable::Tensor;

using LinearFn = decltype(&w8a8_linear);
extern "C" W8A8_API LinearFn w8a8_linear_at;   // the address in the installed kernel, set by the bench
LinearFn w8a8_linear_at = nullptr;

Tensor linear(const Tensor &x, const Tensor &packed, const Tensor &scale, const Tensor &sums, int64_t n) {
  const int64_t k = x.size(-1), m = x.numel() / k;
  Tensor y = torch::stable::new_empty(x, {1, m, n});
  const w8a8_layer layer = {static_cast<int8_t *>(packed.data_ptr()), static_cast<float *>(scale.data_ptr()),
                            static_cast<int32_t *>(sums.data_ptr()), nullptr, n, k, 1, W8A8_TOKEN_SYM, 8, 0, 0.0f};
  w8a8_linear_at(&layer, x.data_ptr(), W8A8_F32, m, k, y.data_ptr(), n, 0);
  return y;
}

STABLE_TORCH_LIBRARY(w8a8_bench, m) {
  m.def("linear(Tensor x, Tensor packed, Tensor scale, Tensor sums, int n) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(w8a8_bench, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
