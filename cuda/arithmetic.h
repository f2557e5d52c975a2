// What the kernels are written in: plain functions of numbers, compiled alike for the CPU and for CUDA.
//
// A kernel is a struct whose operator() runs through the time steps of `n` neighbouring channels of one sequence. The
// CPU calls it with LANES channels at once, and the loops over them become vector instructions; CUDA calls it with one
// channel a thread. The compiler is told never to fuse a * b + c by itself: multiply_add is where it may. So both
// processors do the same operations in the same order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define INDEPENDENT
#elif defined(__clang__)
#define HOST_DEVICE inline __attribute__((always_inline))
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

// A loop over neighbouring channels. INDEPENDENT tells the compiler what it cannot see: that nothing written overlaps
// anything read.
#define FOR_LANES(c, n) INDEPENDENT for (int c = 0; c < (n); c++)

namespace spikegpt {

// How a kernel walks through (B, T, C): which steps exist (mask (B, T), null: all), and where their numbers stand.
struct Steps {
  int64_t T, C;
  const bool* mask;
  HOST_DEVICE bool real_token(int64_t b, int64_t t) const { return mask == nullptr || mask[b * T + t]; }
  HOST_DEVICE int64_t at(int64_t b, int64_t t, int64_t channel) const { return (b * T + t) * C + channel; }
};

// Memory of a backward kernel for what it computes on its way forward: some numbers for each time step and lane.
template <class real>
struct Scratch {
  real* data;
  int64_t stride;  // from one number of a lane to its next
  HOST_DEVICE real* operator()(int64_t i) const { return data + i * stride; }
};

// One rounding where the processor has the instruction, two where it would be a slow library call.
template <class real>
HOST_DEVICE real multiply_add(real a, real b, real c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x <= 0 to the last place; 0 below -87, NaN for NaN. No branch, no table: x = n ln 2 + r, e^x = 2^n e^r, and
// e^r = 1 + r + r^2 q(r) with q a minimax polynomial of degree 4 on |r| <= ln 2 / 2 (relative error 3e-9).
HOST_DEVICE float exp_nonpositive(float x) {
  const float lowest = -87.0f, rounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float inside = x < lowest ? lowest : x;
  const float shifted = multiply_add(inside, 1.44269504f, rounder);
  const float n = shifted - rounder;
  float r = multiply_add(n, -0.693145752f, inside);  // ln 2 in two parts; n times the first is exact
  r = multiply_add(n, -1.42860677e-6f, r);
  float q = 1.38145394e-3f;
  q = multiply_add(q, r, 8.36874518e-3f);
  q = multiply_add(q, r, 4.16683908e-2f);
  q = multiply_add(q, r, 0.166665204f);
  q = multiply_add(q, r, 0.499999934f);
  const float power_of_e = 1.0f + multiply_add(q * r, r, r);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // n, moved into the exponent field: 2^n
  float power_of_2;
  std::memcpy(&power_of_2, &bits, sizeof power_of_2);
  return x < lowest ? 0.0f : power_of_e * power_of_2;
}

HOST_DEVICE double exp_nonpositive(double x) { return std::exp(x); }

template <class real>
HOST_DEVICE real sigmoid(real x) {
  const real e = exp_nonpositive(x < 0 ? x : -x);
  return (x < 0 ? e : real(1)) / (real(1) + e);
}

}  // namespace spikegpt
