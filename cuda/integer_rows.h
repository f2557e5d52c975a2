// What stands between the product of a matrix with the integer residual and its reader's rows, one row over the tokens:
// spikegpt_lora/neurons/residual.py has the equations.
//
//   y = (z + offsets - mean ones) rstd + biases            z (B, T, R): the product; mean, rstd: of each token
//   mixed = y share + previous (1 - share)                 previous: y of the real token before; share: of each row
#pragma once

#include "token_shift.h"

namespace spikegpt {

// Pointers of one call, C being R. z (B, T, R); mean, rstd (B, T); vectors (3, R): ones, offsets, biases; share (R,), or
// null: y is not mixed; last (B, R) or null (then 0).
template <class scalar, class real>
struct RowsInput : Steps {
  const scalar* z;
  const real *mean, *rstd, *vectors, *share, *last;

  template <int LANES>
  HOST_DEVICE void load_last(int64_t b, int64_t row, int n, real (&previous)[LANES]) const {
    FOR_LANES(c, n) previous[c] = last == nullptr ? real(0) : last[b * C + row + c];
  }

  template <int LANES>
  HOST_DEVICE void load(int64_t b, int64_t t, int64_t row, int n, real (&y)[LANES]) const {
    const scalar* __restrict z_ = z + at(b, t, row);
    const real *__restrict ones = vectors + row, *__restrict offsets = ones + C, *__restrict biases = offsets + C;
    const real m = mean[b * T + t], r = rstd[b * T + t];
    FOR_LANES(c, n) y[c] = (static_cast<real>(z_[c]) + offsets[c] - m * ones[c]) * r + biases[c];
  }
};

template <class scalar, class real>
struct RowsForward {
  RowsInput<scalar, real> in;
  scalar* out;
  real* last_after;  // (B, R); null without share

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t row, int n, Scratch<real>) const {
    real previous[LANES], now[LANES];
    if (in.share != nullptr) in.load_last(b, row, n, previous);
    for (int64_t t = 0; t < in.T; t++) {
      scalar* __restrict o = out + in.at(b, t, row);
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) o[c] = scalar(real(0));
        continue;
      }
      in.load(b, t, row, n, now);
      if (in.share == nullptr) {
        FOR_LANES(c, n) o[c] = static_cast<scalar>(now[c]);
        continue;
      }
      const real* __restrict share = in.share + row;
      FOR_LANES(c, n) {
        o[c] = static_cast<scalar>(mix(now[c], previous[c], share[c]));
        previous[c] = now[c];
      }
    }
    if (in.share == nullptr) return;
    FOR_LANES(c, n) last_after[b * in.C + row + c] = previous[c];
  }
};

// Gradients of y, of the shares and of last, where there are shares; without them that of y is what comes in.
template <class scalar, class real>
struct RowsBackward {
  RowsInput<scalar, real> in;
  const scalar* grad_out;
  const real* grad_last_after;
  scalar* grad_y;
  real *grad_share, *grad_last;  // (B, R) both

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t row, int n, Scratch<real>) const {
    const real* __restrict share = in.share + row;
    real waiting[LANES];                            // the gradient of the real token before this one
    real later[LANES], sum[LANES], now[LANES];      // the gradient of the mix after this one, which read this one too
    FOR_LANES(c, n) {
      waiting[c] = grad_last_after[b * in.C + row + c];
      later[c] = sum[c] = 0;
    }
    for (int64_t t = in.T - 1; t >= 0; t--) {
      const int64_t at = in.at(b, t, row);
      scalar* __restrict gy = grad_y + at;
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) gy[c] = scalar(real(0));
        continue;
      }
      const scalar* __restrict go = grad_out + at;
      in.load(b, t, row, n, now);
      FOR_LANES(c, n) {
        const real g = static_cast<real>(go[c]);
        gy[c] = static_cast<scalar>(waiting[c] + g * share[c]);
        waiting[c] = g * (real(1) - share[c]);
        sum[c] += (g - later[c]) * now[c];
        later[c] = g;
      }
    }
    in.load_last(b, row, n, now);
    FOR_LANES(c, n) {
      grad_share[b * in.C + row + c] = sum[c] - later[c] * now[c];
      grad_last[b * in.C + row + c] = waiting[c];
    }
  }
};

}  // namespace spikegpt
