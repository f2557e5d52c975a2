// Schemas of all operators (their gradients: autograd.cpp), and their CPU kernels: parallel over sequences and blocks of
// channels, vectorised over the channels of a block.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>

#include "ops.h"

namespace spikegpt {
namespace {

constexpr int LANES = 512;                 // channels of a block at most: whole rows are read faster than pieces
constexpr int64_t VECTORS = 64;            // blocks are multiples of this: four 512-bit registers of float32
constexpr int64_t WORTH_A_THREAD = 16384;  // numbers below which starting another thread costs more than it saves

// Blocks as wide as they can be while every thread has work.
int64_t block_width(int64_t B, int64_t T, int64_t C) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(1, B * T * C / WORTH_A_THREAD));
  const int64_t blocks = std::max<int64_t>(1, threads / std::max<int64_t>(B, 1));
  const int64_t width = (C / blocks + VECTORS - 1) / VECTORS * VECTORS;
  return std::clamp<int64_t>(width, VECTORS, LANES);
}

struct Cpu {
  // `numbers`: how many the kernel's scratch memory holds for each lane.
  template <class real, class Kernel>
  static void run(int64_t B, int64_t T, int64_t C, const Tensor&, const Kernel& kernel, int64_t numbers = 0) {
    const int64_t width = block_width(B, T, C), blocks = (C + width - 1) / width;
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / (T * width));
    at::parallel_for(0, B * blocks, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<real[]> memory(new real[numbers * width]);
      const Scratch<real> scratch = {memory.get(), width};
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / blocks, channel = i % blocks * width;
        kernel.template operator()<LANES>(b, channel, static_cast<int>(std::min(width, C - channel)), scratch);
      }
    });
  }

  // Mean and 1 / standard deviation of each row of x (B, T, C), each (B, T).
  static std::tuple<Tensor, Tensor> moments(const Tensor& x, double eps) {
    const int64_t C = x.size(2);
    Tensor mean = new_state(x, {x.size(0), x.size(1)}), rstd = at::empty_like(mean);
    DISPATCH(x, "moments", {
      const RowMoments<scalar_t, real> kernel = {x.const_data_ptr<scalar_t>(), C, static_cast<real>(eps),
                                                 mean.mutable_data_ptr<real>(), rstd.mutable_data_ptr<real>()};
      at::parallel_for(0, mean.numel(), std::max<int64_t>(1, WORTH_A_THREAD / C), [&](int64_t begin, int64_t end) {
        kernel.template operator()<1>(0, begin, static_cast<int>(end - begin), {});
      });
    });
    return {mean, rstd};
  }
};

}  // namespace
}  // namespace spikegpt

// The fields of NeuronParameters (spikegpt_lora/neurons/lif.py), in its order.
#define LIF_SETTINGS \
  "float tau, float v_threshold, float? v_reset, bool decay_input, float surrogate_alpha, bool detach_reset"

TORCH_LIBRARY(spikegpt_lora, library) {
  library.def("wkv(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? mask) -> (Tensor, Tensor)");
  library.def(
      "wkv_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? mask, Tensor grad_y, "
      "Tensor grad_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("lif(Tensor x, Tensor? membrane, Tensor? mask, " LIF_SETTINGS ") -> (Tensor, Tensor)");
  library.def(
      "lif_add(Tensor residual, Tensor x, Tensor? membrane, Tensor? mask, " LIF_SETTINGS ", Tensor? seed, float p) "
      "-> (Tensor, Tensor)");
  library.def(
      "lif_backward(Tensor x, Tensor? membrane, Tensor? mask, " LIF_SETTINGS ", Tensor grad_spikes, "
      "Tensor grad_membrane) -> (Tensor, Tensor)");
  library.def(
      "token_shift2(Tensor x, Tensor? gain, Tensor? bias, float eps, Tensor? last, Tensor? mask, Tensor a, Tensor b, "
      "ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "token_shift2_backward(Tensor x, Tensor? gain, Tensor? bias, Tensor mean, Tensor rstd, Tensor? last, Tensor? mask, "
      "Tensor a, Tensor b, Tensor grad_a, Tensor grad_b, Tensor grad_last, bool share_gradients) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "token_shift3(Tensor x, Tensor? gain, Tensor? bias, float eps, Tensor? last, Tensor? mask, Tensor a, Tensor b, "
      "Tensor c, ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "token_shift3_backward(Tensor x, Tensor? gain, Tensor? bias, Tensor mean, Tensor rstd, Tensor? last, Tensor? mask, "
      "Tensor a, Tensor b, Tensor c, Tensor grad_a, Tensor grad_b, Tensor grad_c, Tensor grad_last, "
      "bool share_gradients) -> (Tensor, Tensor, Tensor)");
  library.def("sigmoid_gate(Tensor r, Tensor y) -> Tensor");
  library.def("sigmoid_gate_backward(Tensor r, Tensor y, Tensor grad) -> (Tensor, Tensor)");
  library.def("squared_relu(Tensor k) -> Tensor");
  library.def("squared_relu_backward(Tensor k, Tensor grad) -> Tensor");
  library.def("integer_spikes(Tensor x, Tensor log_scale, Tensor most, bool has_sign, bool squares) -> Tensor");
  library.def(
      "integer_spikes_backward(Tensor x, Tensor log_scale, Tensor most, bool has_sign, bool squares, Tensor grad) "
      "-> (Tensor, Tensor)");
  library.def(
      "integer_rows(Tensor z, Tensor mean, Tensor rstd, Tensor vectors, Tensor? share, Tensor? last, Tensor? mask) "
      "-> (Tensor, Tensor)");
  library.def(
      "integer_rows_backward(Tensor z, Tensor mean, Tensor rstd, Tensor vectors, Tensor share, Tensor? last, "
      "Tensor? mask, Tensor grad_out, Tensor grad_last) -> (Tensor, Tensor, Tensor)");
  library.def(
      "integer_read(Tensor spikes, Tensor scaled, Tensor vectors, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
      "Tensor? passed, Tensor? normed, Tensor? b, float scaling, Tensor? share, Tensor? last, Tensor? mask) "
      "-> (Tensor, Tensor)");
  library.def("dropout(Tensor x, Tensor seed, float p) -> Tensor");
  library.def("adapter_in(Tensor x, Tensor a) -> (Tensor, Tensor)");
  library.def(
      "adapter_out(Tensor x, Tensor weight, Tensor? bias, Tensor passed, Tensor b, float scaling) -> Tensor");
  library.def("packed_linear(Tensor x, Tensor weight, Tensor? scale) -> Tensor");
  library.def(
      "block_step(Tensor x, Tensor[] state, Tensor[] vectors, Tensor[] shares, Tensor[] matrices, "
      "Tensor?[] scales, float eps, " LIF_SETTINGS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "integer_block_step(Tensor x, Tensor[] state, Tensor[] norms, Tensor[] time, Tensor[] shares, Tensor[] matrices, "
      "Tensor[] vectors, Tensor[] neurons, float eps, " LIF_SETTINGS ") "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(spikegpt_lora, CPU, library) {
  spikegpt::register_kernels<spikegpt::Cpu>(library);
  library.impl("packed_linear", &spikegpt::packed_linear<spikegpt::Cpu>);
  library.impl("block_step", &spikegpt::BlockStep<spikegpt::Cpu>::run);
  library.impl("integer_block_step", &spikegpt::IntegerBlockStep<spikegpt::Cpu>::run);
}
