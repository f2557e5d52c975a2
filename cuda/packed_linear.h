// y = x W^T for a few rows of x and a matrix W held in few bytes: float32, bfloat16, or int8 with one scale an output. A
// token that is generated reads every weight once, so it takes as long as reading the matrices does.
//
//   y[r][o] = scale[o] sum_i x[r][i] W[o][i]                     the sum in float32; without scale: times 1
//
// Each output is summed in the same order, whatever the number of rows and of threads.
#pragma once

#include "arithmetic.h"

namespace spikegpt {

struct BFloat16Bits {  // the upper half of a float32
  uint16_t bits;
};

HOST_DEVICE float unpacked(float weight) { return weight; }
HOST_DEVICE float unpacked(int8_t weight) { return static_cast<float>(weight); }
HOST_DEVICE float unpacked(BFloat16Bits weight) {
  const uint32_t bits = static_cast<uint32_t>(weight.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class weight>
struct PackedLinear {
  static constexpr int PARTS = 32;  // sums of an output that wait for nothing but themselves
  static constexpr int VECTOR = 8;  // of them in a loop: with more, compilers widen int8 by way of int16, which is slower

  const float* x;      // (rows, inputs)
  const weight* w;     // (outputs, inputs)
  const float* scale;  // (outputs,) or null
  float* y;            // (rows, outputs)
  int64_t rows, inputs, outputs;

  // n outputs from `start` on, of two rows of x at a time: what is unpacked serves both.
  template <int LANES>
  HOST_DEVICE void operator()(int64_t, int64_t start, int n, Scratch<float>) const {
    for (int64_t o = start; o < start + n; o++) {
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) output<2>(o, r);
      if (r < rows) output<1>(o, r);
    }
  }

 private:
  template <int ROWS>
  HOST_DEVICE void output(int64_t o, int64_t r) const {
    float sum[ROWS][PARTS];
    for (int j = 0; j < ROWS; j++) FOR_LANES(c, PARTS) sum[j][c] = 0;
    int64_t i = 0;
    for (; i + PARTS <= inputs; i += PARTS) {
      for (int part = 0; part < PARTS; part += VECTOR) add<ROWS>(sum, o, r, i, part, VECTOR);
    }
    for (int part = 0; i + part < inputs; part += VECTOR) {
      add<ROWS>(sum, o, r, i, part, static_cast<int>(inputs - i - part < VECTOR ? inputs - i - part : VECTOR));
    }
    for (int j = 0; j < ROWS; j++) {
      for (int half = PARTS / 2; half > 0; half /= 2) FOR_LANES(c, half) sum[j][c] += sum[j][c + half];
      y[(r + j) * outputs + o] = scale == nullptr ? sum[j][0] : scale[o] * sum[j][0];
    }
  }

  // The inputs i + part ... i + part + n - 1 into the sums part ... part + n - 1.
  template <int ROWS>
  HOST_DEVICE void add(float (&sum)[ROWS][PARTS], int64_t o, int64_t r, int64_t i, int part, int n) const {
    const weight* __restrict w_ = w + o * inputs + i + part;
    float weights[VECTOR];
    FOR_LANES(c, n) weights[c] = unpacked(w_[c]);
    for (int j = 0; j < ROWS; j++) {
      const float* __restrict x_ = x + (r + j) * inputs + i + part;
      FOR_LANES(c, n) sum[j][part + c] = multiply_add(x_[c], weights[c], sum[j][part + c]);
    }
  }
};

}  // namespace spikegpt
