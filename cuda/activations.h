// The nonlinearities of a block that are not neurons, number by number: sigmoid(r) y and relu(k)^2.
#pragma once

#include "arithmetic.h"

namespace spikegpt {

template <class scalar, class real>
struct SigmoidGateForward {
  const scalar *r, *y;
  scalar* out;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t, int64_t start, int n, Scratch<real>) const {
    const scalar *__restrict r_ = r + start, *__restrict y_ = y + start;
    scalar* __restrict o = out + start;
    FOR_LANES(c, n) {
      o[c] = static_cast<scalar>(sigmoid(static_cast<real>(r_[c])) * static_cast<real>(y_[c]));
    }
  }
};

template <class scalar, class real>
struct SigmoidGateBackward {
  const scalar *r, *y, *grad;
  scalar *grad_r, *grad_y;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t, int64_t start, int n, Scratch<real>) const {
    const scalar *__restrict r_ = r + start, *__restrict y_ = y + start, *__restrict g = grad + start;
    scalar *__restrict gr = grad_r + start, *__restrict gy = grad_y + start;
    FOR_LANES(c, n) {
      const real open = sigmoid(static_cast<real>(r_[c])), gradient = static_cast<real>(g[c]);
      gr[c] = static_cast<scalar>(gradient * static_cast<real>(y_[c]) * open * (1 - open));
      gy[c] = static_cast<scalar>(gradient * open);
    }
  }
};

// max(k, 0), and NaN for NaN.
template <class real>
HOST_DEVICE real relu(real k) {
  return k < 0 ? real(0) : k;
}

template <class scalar, class real>
struct SquaredReluForward {
  const scalar* k;
  scalar* out;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t, int64_t start, int n, Scratch<real>) const {
    const scalar* __restrict k_ = k + start;
    scalar* __restrict o = out + start;
    FOR_LANES(c, n) {
      const real positive = relu(static_cast<real>(k_[c]));
      o[c] = static_cast<scalar>(positive * positive);
    }
  }
};

template <class scalar, class real>
struct SquaredReluBackward {
  const scalar *k, *grad;
  scalar* grad_k;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t, int64_t start, int n, Scratch<real>) const {
    const scalar *__restrict k_ = k + start, *__restrict g = grad + start;
    scalar* __restrict gk = grad_k + start;
    FOR_LANES(c, n) gk[c] = static_cast<scalar>(2 * relu(static_cast<real>(k_[c])) * static_cast<real>(g[c]));
  }
};

}  // namespace spikegpt
