// Leaky integrate-and-fire: one neuron, its step and its run along a sequence.
//
//   h = v + (x - (v - v_reset)) / tau     or, without decay_input, v - (v - v_reset) / tau + x
//   s = 1[h >= v_threshold]               backward: ATan, ds/dh = alpha/2 / (1 + (pi/2 alpha (h - v_threshold))^2)
//   v = s ? v_reset : h                   or, by subtraction (soft reset), h - s v_threshold
//
// Operation by operation spikingjelly's LIFNode, so that its spikes are equal bit for bit. Source: SpikeGPT section 3.2.
#pragma once

#include "arithmetic.h"
#include "dropout.h"

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

// Where the spikes go: into a tensor of their own,
template <class scalar>
struct SpikesAlone {
  scalar* out;

  template <class real>
  HOST_DEVICE void row(int64_t at, int n, const real* spikes) const {
    scalar* __restrict o = out + at;
    FOR_LANES(c, n) o[c] = static_cast<scalar>(spikes[c]);
  }
};

// or onto the residual stream, of whose sum some numbers are dropped.
template <class stream, class real>
struct SpikesAdded {
  const stream* residual;
  stream* out;
  DropoutMask<real> mask;

  HOST_DEVICE void row(int64_t at, int n, const real* spikes) const {
    const stream* __restrict x = residual + at;
    stream* __restrict o = out + at;
    if (mask.seed == nullptr) {
      FOR_LANES(c, n) o[c] = static_cast<stream>(static_cast<real>(x[c]) + spikes[c]);
      return;
    }
    const uint32_t key = mask.key(at);
    FOR_LANES(c, n) {
      const stream sum = static_cast<stream>(static_cast<real>(x[c]) + spikes[c]);
      o[c] = static_cast<stream>(static_cast<real>(sum) * mask.factor(key, at, c));
    }
  }
};

template <class scalar, class real, class Output>
struct LifForward {
  LifInput<scalar, real> in;
  Output output;
  real* membrane_after;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    const LifNeuron<real> neuron = in.neuron;
    real v[LANES], spikes[LANES];
    FOR_LANES(c, n) v[c] = in.membrane_before(b, channel + c);
    for (int64_t t = 0; t < in.T; t++) {
      const int64_t at = in.at(b, t, channel);
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) spikes[c] = 0;
        output.row(at, n, spikes);
        continue;
      }
      const scalar* __restrict x = in.x + at;
      FOR_LANES(c, n) {
        const real h = lif_charge(neuron, v[c], static_cast<real>(x[c]));
        spikes[c] = h >= neuron.threshold ? real(1) : real(0);
        v[c] = lif_reset(neuron, h);
      }
      output.row(at, n, spikes);
    }
    FOR_LANES(c, n) membrane_after[b * in.C + channel + c] = v[c];
  }
};

// Runs forward once more, keeping h, then back. The gradient of the spikes may be that of the stream they were added to.
template <class scalar, class real, class stream>
struct LifBackward {
  static int64_t scratch(int64_t T) { return T; }
  LifInput<scalar, real> in;
  const stream* grad_spikes;
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
      const stream* __restrict gs = grad_spikes + at;
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
