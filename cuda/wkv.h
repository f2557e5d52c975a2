// WKV of one channel: an exponentially decaying average of v, weighted by exp(k).
//
//   y[t] = (a + exp(u + k - p) v) / (b + exp(u + k - p))                                 a, b, p: before token t
//   p' = max(p + w, k),  a' = exp(p + w - p') a + exp(k - p') v,  b' = exp(p + w - p') b + exp(k - p')
//
// Numerator a and denominator b are held divided by exp(p): no exp has a positive argument, so no k overflows.
// Source: RWKV-4 (Peng et al. 2023, appendix D), SpikeGPT section 3.3. Reference: spikegpt_lora/ops/wkv.py.
#pragma once

#include "arithmetic.h"

namespace spikegpt {

constexpr float NOTHING_YET = -1e38f;  // exponent of an empty state, as in wkv.py

template <class real>
struct WkvState {
  real numerator, denominator, exponent;
};

// Two exponents brought to their common scale: exp(x - max(x, y)) and exp(y - max(x, y)), of which one is 1.
template <class real>
struct Weights {
  real first, second;
};

template <class real>
HOST_DEVICE Weights<real> weigh(real x, real y) {
  const real difference = x - y;
  const bool first_larger = difference >= 0;
  const real smaller = exp_nonpositive(first_larger ? -difference : difference);
  return {first_larger ? real(1) : smaller, first_larger ? smaller : real(1)};
}

template <class real>
HOST_DEVICE real wkv_output(const WkvState<real>& state, real u, real k, real v) {
  const Weights<real> weight = weigh(state.exponent, u + k);
  return multiply_add(weight.first, state.numerator, weight.second * v) /
         multiply_add(weight.first, state.denominator, weight.second);
}

// The state after the token; `kept` is weigh(p + w, k).
template <class real>
HOST_DEVICE WkvState<real> wkv_advance(const WkvState<real>& state, const Weights<real>& kept, real w, real k, real v) {
  const real decayed = state.exponent + w;
  return {multiply_add(kept.first, state.numerator, kept.second * v),
          multiply_add(kept.first, state.denominator, kept.second), decayed >= k ? decayed : k};
}

// What flows back through the state. The loss depends on the exponent p as the scale of a and b, which gives
// ga a + gb b, and perhaps on its own; only the latter, 0 for every loss that reads y alone, has to be carried.
template <class real>
struct WkvStateGradient {
  real numerator, denominator, own_exponent;
};

template <class real>
HOST_DEVICE real scale_gradient(const WkvStateGradient<real>& gradient, const WkvState<real>& state) {
  return gradient.numerator * state.numerator + gradient.denominator * state.denominator;
}

template <class real>
struct WkvTokenGradient {
  real w, u, k, v;
};

// Back through one token: `state` is the state before it, `kept` its weigh(p + w, k); `gradient` comes in for the state
// after the token and leaves for the one before.
template <class real>
HOST_DEVICE WkvTokenGradient<real> wkv_back(const WkvState<real>& state, const Weights<real>& kept,
                                            WkvStateGradient<real>& gradient, real w, real u, real k, real v,
                                            real grad_y) {
  const bool max_is_past = state.exponent + w >= k;
  const real past = kept.first * scale_gradient(gradient, state);
  const real token = kept.second * multiply_add(gradient.numerator, v, gradient.denominator);

  const Weights<real> seen = weigh(state.exponent, u + k);
  const real norm = real(1) / multiply_add(seen.first, state.denominator, seen.second);
  const real y = multiply_add(seen.first, state.numerator, seen.second * v) * norm;
  const real read_past = grad_y * norm * seen.first, read_token = grad_y * norm * seen.second;
  const real bonus = read_token * (v - y);

  const WkvTokenGradient<real> result = {
      past + (max_is_past ? gradient.own_exponent : real(0)),
      bonus,
      token + bonus + (max_is_past ? real(0) : gradient.own_exponent),
      multiply_add(gradient.numerator, kept.second, read_token),
  };
  gradient.numerator = multiply_add(gradient.numerator, kept.first, read_past);
  gradient.denominator = multiply_add(gradient.denominator, kept.first, -y * read_past);
  gradient.own_exponent = max_is_past ? gradient.own_exponent : real(0);
  return result;
}

// Pointers of one call. Sequences are (B, T, C), states (B, 3, C), mask (B, T); state and mask may be null.
template <class scalar, class real>
struct WkvInput : Steps {
  const real *w, *u;
  const scalar *k, *v;
  const real* state;

  template <int LANES>
  HOST_DEVICE void load_state(int64_t b, int64_t channel, int n, real (&a)[LANES], real (&d)[LANES],
                              real (&p)[LANES]) const {
    const real* start = state == nullptr ? nullptr : state + b * 3 * C + channel;
    FOR_LANES(c, n) {
      a[c] = start == nullptr ? real(0) : start[c];
      d[c] = start == nullptr ? real(0) : start[C + c];
      p[c] = start == nullptr ? real(NOTHING_YET) : start[2 * C + c];
    }
  }
};

template <class scalar, class real>
struct WkvForward {
  WkvInput<scalar, real> in;
  scalar* y;
  real* state_after;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real>) const {
    real a[LANES], d[LANES], p[LANES];
    in.load_state(b, channel, n, a, d, p);
    const real *__restrict w = in.w + channel, *__restrict u = in.u + channel;
    for (int64_t t = 0; t < in.T; t++) {
      const int64_t at = in.at(b, t, channel);
      const scalar *__restrict k = in.k + at, *__restrict v = in.v + at;
      scalar* __restrict out = y + at;
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) out[c] = scalar(real(0));
        continue;
      }
      FOR_LANES(c, n) {
        const WkvState<real> state = {a[c], d[c], p[c]};
        const real k_t = static_cast<real>(k[c]), v_t = static_cast<real>(v[c]);
        out[c] = static_cast<scalar>(wkv_output(state, u[c], k_t, v_t));
        const WkvState<real> next = wkv_advance(state, weigh(p[c] + w[c], k_t), w[c], k_t, v_t);
        a[c] = next.numerator;
        d[c] = next.denominator;
        p[c] = next.exponent;
      }
    }
    real* __restrict after = state_after + b * 3 * in.C + channel;
    FOR_LANES(c, n) {
      after[c] = a[c];
      after[in.C + c] = d[c];
      after[2 * in.C + c] = p[c];
    }
  }
};

// Goes back through the tokens in segments, from the last: each is run forward once more, keeping what its tokens need.
// Where each segment starts is found by running forward through all but the last. So memory does not grow with T but for
// the starts, and what a segment keeps stays in the processor's cache.
//
// Gradients of w and u are (B, C): summing over sequences is left to the caller, so that no result depends on the number
// of threads.
template <class scalar, class real>
struct WkvBackward {
  static constexpr int64_t SEGMENT = 64;  // tokens
  static constexpr int START = 3, KEPT = 5;  // numbers of a segment's start, and of a token

  WkvInput<scalar, real> in;
  const scalar* grad_y;
  const real* grad_state_after;
  real *grad_w, *grad_u;
  scalar *grad_k, *grad_v;
  real* grad_state;

  HOST_DEVICE static int64_t segments(int64_t T) { return (T + SEGMENT - 1) / SEGMENT; }
  static int64_t scratch(int64_t T) { return START * segments(T) + KEPT * (T < SEGMENT ? T : SEGMENT); }

  template <int LANES>
  HOST_DEVICE void operator()(int64_t b, int64_t channel, int n, Scratch<real> memory) const {
    const int64_t count = segments(in.T);
    const Scratch<real> kept = {memory(START * count), memory.stride};
    real a[LANES], d[LANES], p[LANES];
    in.load_state(b, channel, n, a, d, p);
    for (int64_t s = 0; s < count; s++) {
      real *__restrict start_a = memory(START * s), *__restrict start_d = memory(START * s + 1),
           *__restrict start_p = memory(START * s + 2);
      FOR_LANES(c, n) {
        start_a[c] = a[c];
        start_d[c] = d[c];
        start_p[c] = p[c];
      }
      if (s + 1 < count) forward<LANES, false>(b, channel, n, s, a, d, p, kept);
    }

    real ga[LANES], gd[LANES], own[LANES], gw[LANES], gu[LANES];
    for (int64_t s = count - 1; s >= 0; s--) {
      const real *__restrict start_a = memory(START * s), *__restrict start_d = memory(START * s + 1),
                 *__restrict start_p = memory(START * s + 2);
      FOR_LANES(c, n) {
        a[c] = start_a[c];
        d[c] = start_d[c];
        p[c] = start_p[c];
      }
      forward<LANES, true>(b, channel, n, s, a, d, p, kept);
      if (s == count - 1) {
        const real* __restrict after = grad_state_after + b * 3 * in.C + channel;
        FOR_LANES(c, n) {
          ga[c] = after[c];
          gd[c] = after[in.C + c];
          own[c] = after[2 * in.C + c] - scale_gradient<real>({ga[c], gd[c], 0}, {a[c], d[c], p[c]});
          gw[c] = gu[c] = 0;
        }
      }
      backward<LANES>(b, channel, n, s, kept, ga, gd, own, gw, gu);
    }

    in.load_state(b, channel, n, a, d, p);
    real* __restrict before = grad_state + b * 3 * in.C + channel;
    FOR_LANES(c, n) {
      before[c] = ga[c];
      before[in.C + c] = gd[c];
      before[2 * in.C + c] = own[c] + scale_gradient<real>({ga[c], gd[c], 0}, {a[c], d[c], p[c]});
      grad_w[b * in.C + channel + c] = gw[c];
      grad_u[b * in.C + channel + c] = gu[c];
    }
  }

 private:
  HOST_DEVICE int64_t end(int64_t s) const { return (s + 1) * SEGMENT < in.T ? (s + 1) * SEGMENT : in.T; }

  // Through segment s, from the state (a, d, p) before it to the one after it.
  template <int LANES, bool KEEP>
  HOST_DEVICE void forward(int64_t b, int64_t channel, int n, int64_t s, real (&a)[LANES], real (&d)[LANES],
                           real (&p)[LANES], Scratch<real> kept) const {
    const real* __restrict w = in.w + channel;
    for (int64_t t = s * SEGMENT; t < end(s); t++) {
      if (!in.real_token(b, t)) continue;
      const int64_t at = in.at(b, t, channel), i = KEEP ? KEPT * (t - s * SEGMENT) : 0;
      const scalar *__restrict k = in.k + at, *__restrict v = in.v + at;
      real *__restrict kept_a = kept(i), *__restrict kept_d = kept(i + 1), *__restrict kept_p = kept(i + 2),
           *__restrict kept_first = kept(i + 3), *__restrict kept_second = kept(i + 4);
      FOR_LANES(c, n) {
        const real k_t = static_cast<real>(k[c]), v_t = static_cast<real>(v[c]);
        const Weights<real> weight = weigh(p[c] + w[c], k_t);
        if (KEEP) {
          kept_a[c] = a[c];
          kept_d[c] = d[c];
          kept_p[c] = p[c];
          kept_first[c] = weight.first;
          kept_second[c] = weight.second;
        }
        const WkvState<real> next = wkv_advance<real>({a[c], d[c], p[c]}, weight, w[c], k_t, v_t);
        a[c] = next.numerator;
        d[c] = next.denominator;
        p[c] = next.exponent;
      }
    }
  }

  template <int LANES>
  HOST_DEVICE void backward(int64_t b, int64_t channel, int n, int64_t s, Scratch<real> kept, real (&ga)[LANES],
                            real (&gd)[LANES], real (&own)[LANES], real (&gw)[LANES], real (&gu)[LANES]) const {
    const real *__restrict w = in.w + channel, *__restrict u = in.u + channel;
    for (int64_t t = end(s) - 1; t >= s * SEGMENT; t--) {
      const int64_t at = in.at(b, t, channel), i = KEPT * (t - s * SEGMENT);
      scalar *__restrict gk = grad_k + at, *__restrict gv = grad_v + at;
      if (!in.real_token(b, t)) {
        FOR_LANES(c, n) gk[c] = gv[c] = scalar(real(0));
        continue;
      }
      const scalar *__restrict k = in.k + at, *__restrict v = in.v + at, *__restrict gy = grad_y + at;
      const real *__restrict kept_a = kept(i), *__restrict kept_d = kept(i + 1), *__restrict kept_p = kept(i + 2),
                 *__restrict kept_first = kept(i + 3), *__restrict kept_second = kept(i + 4);
      FOR_LANES(c, n) {
        WkvStateGradient<real> gradient = {ga[c], gd[c], own[c]};
        const WkvTokenGradient<real> token = wkv_back<real>(
            {kept_a[c], kept_d[c], kept_p[c]}, {kept_first[c], kept_second[c]}, gradient, w[c], u[c],
            static_cast<real>(k[c]), static_cast<real>(v[c]), static_cast<real>(gy[c]));
        gw[c] += token.w;
        gu[c] += token.u;
        gk[c] = static_cast<scalar>(token.k);
        gv[c] = static_cast<scalar>(token.v);
        ga[c] = gradient.numerator;
        gd[c] = gradient.denominator;
        own[c] = gradient.own_exponent;
      }
    }
  }
};

}  // namespace spikegpt
