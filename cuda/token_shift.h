// Token shift of one channel: a linear layer reads a mix of the token and of the real token before it.
//
//   mixed_j = x share_j + previous (1 - share_j)           j: one mix for each of the N linear layers that read
//
// In upstream's order of operations: another order rounds differently, and a rounding can flip a spike.
#pragma once

#include "arithmetic.h"

namespace spikegpt {

template <class real>
HOST_DEVICE real mix(real x, real previous, real share) {
  return x * share + previous * (real(1) - share);
}

// Pointers of one call: x (B, T, C), last (B, C) or null (then 0), mask (B, T) or null, each share (C,).
template <class scalar, class real, int N>
struct ShiftInput : Steps {
  const scalar *x, *last;
  const real* share[N];

  template <int LANES>
  HOST_DEVICE void load_last(int64_t b, int64_t channel, int n, real (&previous)[LANES]) const {
    FOR_LANES(c, n) previous[c] = last == nullptr ? real(0) : static_cast<real>(last[b * C + channel + c]);
  }
};

template <class scalar, class real, int N>
struct ShiftForward {
  ShiftInput<scalar, real, N> in;
  scalar* mixed[N];
  scalar* last_after;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    real previous[LANES];
    in.load_last(b, channel, n, previous);
    for (int64_t t = 0; t < in.T; t++) {
      const int64_t at = in.at(b, t, channel);
      if (!in.real_token(b, t)) {
        for (int j = 0; j < N; j++) {
          scalar* __restrict out = mixed[j] + at;
          FOR_LANES(c, n) out[c] = scalar(real(0));
        }
        continue;
      }
      const scalar* __restrict x = in.x + at;
      for (int j = 0; j < N; j++) {
        const real* __restrict share = in.share[j] + channel;
        scalar* __restrict out = mixed[j] + at;
        FOR_LANES(c, n) out[c] = static_cast<scalar>(mix(static_cast<real>(x[c]), previous[c], share[c]));
      }
      FOR_LANES(c, n) previous[c] = static_cast<real>(x[c]);
    }
    FOR_LANES(c, n) last_after[b * in.C + channel + c] = static_cast<scalar>(previous[c]);
  }
};

template <class scalar, class real, int N>
struct ShiftBackward {
  ShiftInput<scalar, real, N> in;
  const scalar* grad_mixed[N];
  const scalar* grad_last_after;
  scalar *grad_x, *grad_last;
  real* grad_share;  // (B, N, C), or null where nobody asks

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    real waiting[LANES];  // the gradient of the real token before this one
    FOR_LANES(c, n) waiting[c] = static_cast<real>(grad_last_after[b * in.C + channel + c]);
    for (int64_t t = in.T - 1; t >= 0; t--) {
      const int64_t at = in.at(b, t, channel);
      scalar* __restrict gx = grad_x + at;
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) gx[c] = scalar(real(0));
        continue;
      }
      FOR_LANES(c, n) {
        real own = waiting[c], earlier = 0;
        for (int j = 0; j < N; j++) {
          const real g = static_cast<real>(grad_mixed[j][at + c]), share = in.share[j][channel + c];
          own += g * share;
          earlier += g * (real(1) - share);
        }
        gx[c] = static_cast<scalar>(own);
        waiting[c] = earlier;
      }
    }
    FOR_LANES(c, n) grad_last[b * in.C + channel + c] = static_cast<scalar>(waiting[c]);
    if (grad_share != nullptr) share_gradients<LANES>(b, channel, n);
  }

  template <int LANES>
  HOST_DEVICE void share_gradients(int64_t b, int64_t channel, int n) const {
    for (int j = 0; j < N; j++) {
      real previous[LANES], sum[LANES];
      in.load_last(b, channel, n, previous);
      FOR_LANES(c, n) sum[c] = 0;
      for (int64_t t = 0; t < in.T; t++) {
        if (!in.real_token(b, t)) continue;
        const int64_t at = in.at(b, t, channel);
        const scalar *__restrict x = in.x + at, *__restrict g = grad_mixed[j] + at;
        FOR_LANES(c, n) {
          const real x_t = static_cast<real>(x[c]);
          sum[c] += static_cast<real>(g[c]) * (x_t - previous[c]);
          previous[c] = x_t;
        }
      }
      FOR_LANES(c, n) grad_share[(b * N + j) * in.C + channel + c] = sum[c];
    }
  }
};

}  // namespace spikegpt
