// CUDA kernels of the operators whose schemas are in ops.cpp: one thread for each channel of each sequence, neighbouring
// threads on neighbouring channels, a loop over time inside. No limit on T, no demand on C.

#include <ATen/ops/var_mean.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops.h"

namespace spikegpt {
namespace {

constexpr int THREADS = 128;

template <class real, class Kernel>
__global__ void __launch_bounds__(THREADS, 1) each_channel(int64_t count, int64_t C, real* scratch, Kernel kernel) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i < count) kernel.template operator()<1>(i / C, i % C, 1, Scratch<real>{scratch + i, count});
}

struct Cuda {
  template <class real, class Kernel>
  static void run(int64_t B, int64_t T, int64_t C, const Tensor& input, const Kernel& kernel, int64_t numbers = 0) {
    const int64_t count = B * C;
    if (count == 0) return;
    const c10::cuda::CUDAGuard device(input.device());
    const Tensor scratch = new_state(input, {numbers, count});
    const auto blocks = static_cast<unsigned int>((count + THREADS - 1) / THREADS);
    each_channel<real, Kernel><<<blocks, THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
        count, C, scratch.template mutable_data_ptr<real>(), kernel);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Mean and 1 / standard deviation of each row of x (B, T, C), each (B, T).
  static std::tuple<Tensor, Tensor> moments(const Tensor& x, double eps) {
    const auto [variance, mean] = at::var_mean(x.to(state_dtype(x)), at::IntArrayRef{2}, /*unbiased=*/false);
    return {mean, variance.add(eps).rsqrt()};
  }
};

}  // namespace
}  // namespace spikegpt

TORCH_LIBRARY_IMPL(spikegpt_lora, CUDA, library) { spikegpt::register_kernels<spikegpt::Cuda>(library); }
