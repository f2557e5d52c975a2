// Token shift of one channel: a linear layer reads a mix of the token and of the real token before it, in the dtype that
// it multiplies in. What is mixed is x as it comes, or x normalised over its channels (LayerNorm).
//
//   n = (x - mean) rstd gain + bias                        mean, rstd of each token: RowMoments
//   mixed_j = n share_j + previous (1 - share_j)           j: one mix for each of the N linear layers that read
//
// In upstream's order of operations: another order rounds differently, and a rounding can flip a spike.
#pragma once

#include "arithmetic.h"

namespace spikegpt {

template <class real>
HOST_DEVICE real mix(real x, real previous, real share) {
  return x * share + previous * (real(1) - share);
}

// Mean of each row of C numbers, and 1 / (its standard deviation, eps added to the variance). A row is a lane: the CPU's
// way, one row after the other.
template <class scalar, class real>
struct RowMoments {
  const scalar* x;
  int64_t C;
  real eps;
  real *mean, *rstd;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t, int64_t row, int n, Scratch<real>) const {
    for (int i = 0; i < n; i++) {
      const scalar* __restrict x_ = x + (row + i) * C;
      const real m = sum(x_, [](real v) { return v; }) / static_cast<real>(C);
      const real squares = sum(x_, [m](real v) { return (v - m) * (v - m); });
      mean[row + i] = m;
      rstd[row + i] = real(1) / std::sqrt(squares / static_cast<real>(C) + eps);
    }
  }

  template <class Of>
  HOST_DEVICE real sum(const scalar* __restrict x_, const Of& of) const {
    constexpr int PARTS = 32;  // sums side by side: the compiler may not reorder one
    real parts[PARTS] = {}, total = 0;
    int64_t start = 0;
    for (; start + PARTS <= C; start += PARTS) {
      FOR_LANES(c, PARTS) parts[c] += of(static_cast<real>(x_[start + c]));
    }
    for (int64_t c = start; c < C; c++) parts[c - start] += of(static_cast<real>(x_[c]));
    for (int c = 0; c < PARTS; c++) total += parts[c];
    return total;
  }
};

// What normalises x: mean and rstd (B, T), gain and bias (C,); null where x is mixed as it comes.
template <class real>
struct Norm {
  const real *mean, *rstd, *gain, *bias;
};

// Pointers of one call: x (B, T, C), last (B, C) or null (then 0), mask (B, T) or null, each share (C,).
template <class scalar, class real, int N>
struct ShiftInput : Steps {
  const scalar *x, *last;
  Norm<real> norm;
  const real* share[N];

  template <int LANES>
  HOST_DEVICE void load_last(int64_t b, int64_t channel, int n, real (&previous)[LANES]) const {
    FOR_LANES(c, n) previous[c] = last == nullptr ? real(0) : static_cast<real>(last[b * C + channel + c]);
  }

  // What is mixed of step t.
  template <int LANES>
  HOST_DEVICE void load(int64_t b, int64_t t, int64_t channel, int n, real (&now)[LANES]) const {
    const scalar* __restrict row = x + at(b, t, channel);
    if (norm.mean == nullptr) {
      FOR_LANES(c, n) now[c] = static_cast<real>(row[c]);
      return;
    }
    const real mean = norm.mean[b * T + t], rstd = norm.rstd[b * T + t];
    const real *__restrict gain = norm.gain + channel, *__restrict bias = norm.bias + channel;
    FOR_LANES(c, n) {  // rounded to x's dtype, as the state is: a text in stretches gives the same
      now[c] = static_cast<real>(static_cast<scalar>((static_cast<real>(row[c]) - mean) * rstd * gain[c] + bias[c]));
    }
  }
};

template <class scalar, class real, int N, class product>
struct ShiftForward {
  ShiftInput<scalar, real, N> in;
  product* mixed[N];
  scalar* last_after;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    real previous[LANES], now[LANES];
    in.load_last(b, channel, n, previous);
    for (int64_t t = 0; t < in.T; t++) {
      const int64_t at = in.at(b, t, channel);
      if (!in.real_token(b, t)) {
        for (int j = 0; j < N; j++) {
          product* __restrict out = mixed[j] + at;
          FOR_LANES(c, n) out[c] = product(real(0));
        }
        continue;
      }
      in.load(b, t, channel, n, now);
      for (int j = 0; j < N; j++) {
        const real* __restrict share = in.share[j] + channel;
        product* __restrict out = mixed[j] + at;
        FOR_LANES(c, n) out[c] = static_cast<product>(mix(now[c], previous[c], share[c]));
      }
      FOR_LANES(c, n) previous[c] = now[c];
    }
    FOR_LANES(c, n) last_after[b * in.C + channel + c] = static_cast<scalar>(previous[c]);
  }
};

// The gradient of what is mixed; LayerNorm's own is torch's.
template <class scalar, class real, int N, class product>
struct ShiftBackward {
  ShiftInput<scalar, real, N> in;
  const product* grad_mixed[N];
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
      real previous[LANES], now[LANES], sum[LANES];
      in.load_last(b, channel, n, previous);
      FOR_LANES(c, n) sum[c] = 0;
      for (int64_t t = 0; t < in.T; t++) {
        if (!in.real_token(b, t)) continue;
        const int64_t at = in.at(b, t, channel);
        const product* __restrict g = grad_mixed[j] + at;
        in.load(b, t, channel, n, now);
        FOR_LANES(c, n) {
          sum[c] += static_cast<real>(g[c]) * (now[c] - previous[c]);
          previous[c] = now[c];
        }
      }
      FOR_LANES(c, n) grad_share[(b * N + j) * in.C + channel + c] = sum[c];
    }
  }
};

}  // namespace spikegpt
