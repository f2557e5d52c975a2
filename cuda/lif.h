// Leaky integrate-and-fire: one neuron, its step and its run along a sequence.
//
//   h = v + (x - (v - v_reset)) / tau     or, without decay_input, v - (v - v_reset) / tau + x
//   s = 1[h >= v_threshold]               backward: ATan, ds/dh = alpha/2 / (1 + (pi/2 alpha (h - v_threshold))^2)
//   v = s ? v_reset : h                   or, by subtraction (soft reset), h - s v_threshold
//
// Operation by operation spikingjelly's LIFNode, so that its spikes are equal bit for bit. Source: SpikeGPT section 3.2.
#pragma once

#include "arithmetic.h"

namespace spikegpt {

template <class real>
struct LifNeuron {
  real tau, threshold, rest, alpha;  // rest: v_reset, or 0 with soft reset
  bool decay_input, soft_reset, detach_reset;
};

template <class real>
HOST_DEVICE real lif_charge(const LifNeuron<real>& neuron, real v, real x) {
  const real leak = v - neuron.rest;  // one division for both forms; what is added or negated in between is exact
  return v + (neuron.decay_input ? x - leak : -leak) / neuron.tau + (neuron.decay_input ? real(0) : x);
}

template <class real>
HOST_DEVICE real lif_reset(const LifNeuron<real>& neuron, real h) {
  const real fired = neuron.soft_reset ? h - neuron.threshold : neuron.rest;
  return h >= neuron.threshold ? fired : h;
}

// The gradient with respect to h, from that of the spike and that of the membrane after it.
template <class real>
HOST_DEVICE real lif_back(const LifNeuron<real>& neuron, real h, real grad_spike, real grad_v) {
  const real scaled = real(1.5707963267948966) * neuron.alpha * (h - neuron.threshold);
  const real surrogate = neuron.alpha / 2 / (1 + scaled * scaled);
  const bool fired = h >= neuron.threshold;
  const real stays = fired && !neuron.soft_reset ? real(0) : real(1);
  const real jump = neuron.soft_reset ? -neuron.threshold : neuron.rest - h;
  return grad_spike * surrogate + grad_v * (neuron.detach_reset ? stays : stays + jump * surrogate);
}

// Pointers of one call: x (B, T, C), membrane (B, C) or null, mask (B, T) or null.
template <class scalar, class real>
struct LifInput : Steps {
  LifNeuron<real> neuron;
  const scalar* x;
  const real* membrane;

  HOST_DEVICE real membrane_before(int64_t b, int64_t channel) const {
    return membrane == nullptr ? neuron.rest : membrane[b * C + channel];
  }
};

template <class scalar, class real>
struct LifForward {
  LifInput<scalar, real> in;
  scalar* spikes;
  real* membrane_after;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    const LifNeuron<real> neuron = in.neuron;
    real v[LANES];
    FOR_LANES(c, n) v[c] = in.membrane_before(b, channel + c);
    for (int64_t t = 0; t < in.T; t++) {
      const int64_t at = in.at(b, t, channel);
      const scalar* __restrict x = in.x + at;
      scalar* __restrict out = spikes + at;
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) out[c] = scalar(real(0));
        continue;
      }
      FOR_LANES(c, n) {
        const real h = lif_charge(neuron, v[c], static_cast<real>(x[c]));
        out[c] = static_cast<scalar>(h >= neuron.threshold ? real(1) : real(0));
        v[c] = lif_reset(neuron, h);
      }
    }
    FOR_LANES(c, n) membrane_after[b * in.C + channel + c] = v[c];
  }
};

// Runs forward once more, keeping h, then back.
template <class scalar, class real>
struct LifBackward {
  static int64_t scratch(int64_t T) { return T; }
  LifInput<scalar, real> in;
  const scalar* grad_spikes;
  const real* grad_membrane_after;
  scalar* grad_x;
  real* grad_membrane;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real> scratch) const {
    const LifNeuron<real> neuron = in.neuron;
    real v[LANES], gv[LANES];
    FOR_LANES(c, n) v[c] = in.membrane_before(b, channel + c);
    for (int64_t t = 0; t < in.T; t++) {
      if (!in.real_token(b, t)) continue;
      const scalar* __restrict x = in.x + in.at(b, t, channel);
      real* __restrict kept_h = scratch(t);
      FOR_LANES(c, n) {
        const real h = lif_charge(neuron, v[c], static_cast<real>(x[c]));
        kept_h[c] = h;
        v[c] = lif_reset(neuron, h);
      }
    }

    const real per_input = neuron.decay_input ? 1 / neuron.tau : real(1), leak = 1 - 1 / neuron.tau;
    FOR_LANES(c, n) gv[c] = grad_membrane_after[b * in.C + channel + c];
    for (int64_t t = in.T - 1; t >= 0; t--) {
      const int64_t at = in.at(b, t, channel);
      scalar* __restrict gx = grad_x + at;
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) gx[c] = scalar(real(0));
        continue;
      }
      const scalar* __restrict gs = grad_spikes + at;
      const real* __restrict kept_h = scratch(t);
      FOR_LANES(c, n) {
        const real gh = lif_back(neuron, kept_h[c], static_cast<real>(gs[c]), gv[c]);
        gx[c] = static_cast<scalar>(gh * per_input);
        gv[c] = gh * leak;
      }
    }
    FOR_LANES(c, n) grad_membrane[b * in.C + channel + c] = gv[c];
  }
};

}  // namespace spikegpt
