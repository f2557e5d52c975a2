// Integer spikes, number by number: spikegpt_lora/neurons/multilevel.py has the equations.
//
//   u = x / s,  k = floor(u + 1/2) in low ... most         s, most: of each channel; low: -most, or 0 without sign
//   sent: k, or k^2
#pragma once

#include "arithmetic.h"

namespace spikegpt {

// Pointers of one call: x (B, T, C), s and most (C,).
template <class scalar, class real>
struct FireInput : Steps {
  const scalar* x;
  const real *scale, *most;
  bool has_sign, squares;

  HOST_DEVICE real lowest(real most) const { return has_sign ? -most : real(0); }

  // NaN for NaN.
  HOST_DEVICE real spike(real u, real most) const {
    const real k = std::floor(u + real(0.5)), low = lowest(most);
    const real raised = k < low ? low : k;
    return raised > most ? most : raised;
  }
};

template <class scalar, class real>
struct FireForward {
  FireInput<scalar, real> in;
  scalar* spikes;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    const real *__restrict scale = in.scale + channel, *__restrict most = in.most + channel;
    for (int64_t t = 0; t < in.T; t++) {
      const scalar* __restrict x = in.x + in.at(b, t, channel);
      scalar* __restrict out = spikes + in.at(b, t, channel);
      FOR_LANES(c, n) {
        const real k = in.spike(static_cast<real>(x[c]) / scale[c], most[c]);
        out[c] = static_cast<scalar>(in.squares ? k * k : k);
      }
    }
  }
};

// Straight through the rounding: dk/du is 1 from low - 1/2 up to below most + 1/2, else 0.
template <class scalar, class real>
struct FireBackward {
  FireInput<scalar, real> in;
  const scalar* grad;
  scalar* grad_x;
  real* grad_log_scale;  // (B, C)

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    const real *__restrict scale = in.scale + channel, *__restrict most = in.most + channel;
    real sum[LANES];
    FOR_LANES(c, n) sum[c] = 0;
    for (int64_t t = 0; t < in.T; t++) {
      const int64_t at = in.at(b, t, channel);
      const scalar *__restrict x = in.x + at, *__restrict g = grad + at;
      scalar* __restrict gx = grad_x + at;
      FOR_LANES(c, n) {
        const real u = static_cast<real>(x[c]) / scale[c], k = in.spike(u, most[c]);
        const bool inside = u >= in.lowest(most[c]) - real(0.5) && u < most[c] + real(0.5);
        const real slope = in.squares ? 2 * k : real(1);
        const real gu = static_cast<real>(g[c]) * (inside ? slope : real(0));
        gx[c] = static_cast<scalar>(gu / scale[c]);
        sum[c] += gu * u;
      }
    }
    real* __restrict out = grad_log_scale + b * in.C + channel;
    FOR_LANES(c, n) out[c] = -sum[c];
  }
};

}  // namespace spikegpt
