// Schemas of all operators, and their CPU kernels: parallel over sequences and blocks of channels, vectorised over the
// channels of a block.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops.h"

namespace spikegpt {
namespace {

constexpr int LANES = 64;                  // channels of a block: four 512-bit registers of float32 in flight
constexpr int64_t WORTH_A_THREAD = 16384;  // numbers below which starting another thread costs more than it saves

struct Cpu {
  template <class real, int SCRATCH, class Kernel>
  static void run(int64_t B, int64_t T, int64_t C, const Tensor&, const Kernel& kernel) {
    const int64_t blocks = (C + LANES - 1) / LANES;
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / (T * LANES));
    at::parallel_for(0, B * blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<real> memory(SCRATCH * T * LANES);
      const Scratch<real> scratch = {memory.data(), LANES};
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / blocks, channel = i % blocks * LANES;
        if (channel + LANES <= C) {
          kernel.template operator()<LANES>(b, channel, LANES, scratch);
        } else {
          kernel.template operator()<LANES>(b, channel, static_cast<int>(C - channel), scratch);
        }
      }
    });
  }
};

}  // namespace
}  // namespace spikegpt

TORCH_LIBRARY(spikegpt_lora, library) {
  library.def("wkv(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? mask) -> (Tensor, Tensor)");
  library.def(
      "wkv_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? mask, Tensor grad_y, "
      "Tensor grad_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "lif(Tensor x, Tensor? membrane, Tensor? mask, float tau, float v_threshold, float? v_reset, bool decay_input, "
      "float alpha, bool detach_reset) -> (Tensor, Tensor)");
  library.def(
      "lif_backward(Tensor x, Tensor? membrane, Tensor? mask, float tau, float v_threshold, float? v_reset, "
      "bool decay_input, float alpha, bool detach_reset, Tensor grad_spikes, Tensor grad_membrane) -> (Tensor, Tensor)");
  library.def(
      "token_shift2(Tensor x, Tensor? last, Tensor? mask, Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)");
  library.def(
      "token_shift2_backward(Tensor x, Tensor? last, Tensor? mask, Tensor a, Tensor b, Tensor grad_a, Tensor grad_b, "
      "Tensor grad_last, bool share_gradients) -> (Tensor, Tensor, Tensor)");
  library.def(
      "token_shift3(Tensor x, Tensor? last, Tensor? mask, Tensor a, Tensor b, Tensor c) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "token_shift3_backward(Tensor x, Tensor? last, Tensor? mask, Tensor a, Tensor b, Tensor c, Tensor grad_a, "
      "Tensor grad_b, Tensor grad_c, Tensor grad_last, bool share_gradients) -> (Tensor, Tensor, Tensor)");
  library.def("gate(Tensor r, Tensor y) -> Tensor");
  library.def("gate_backward(Tensor r, Tensor y, Tensor grad) -> (Tensor, Tensor)");
  library.def("squared_relu(Tensor k) -> Tensor");
  library.def("squared_relu_backward(Tensor k, Tensor grad) -> Tensor");
  library.def("dropout(Tensor x, Tensor seed, float p) -> Tensor");
}

TORCH_LIBRARY_IMPL(spikegpt_lora, CPU, library) { spikegpt::register_kernels<spikegpt::Cpu>(library); }
