// Dropout whose mask is a hash of seed and position: nothing is stored, backward makes the same mask again, and any
// number of threads makes the same one. torch's own draws one number after the other, on one thread.
#pragma once

#include "arithmetic.h"

namespace spikegpt {

// The finalizer of MurmurHash3 (Appleby, public domain): every input bit moves every output bit.
HOST_DEVICE uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Which numbers are dropped: a function of seed and position.
template <class real>
struct DropoutMask {
  const int64_t* seed;     // null: nothing is dropped
  uint32_t dropped_below;  // p 2^32
  real scale;              // 1 / (1 - p)

  // The key of the numbers from `start` on, and the factor of the c-th of them.
  HOST_DEVICE uint32_t key(int64_t start) const {
    const uint32_t key = scramble(static_cast<uint32_t>(*seed)) ^ static_cast<uint32_t>(*seed >> 32);
    return scramble(key + static_cast<uint32_t>(start >> 32));
  }
  HOST_DEVICE real factor(uint32_t key, int64_t start, int c) const {
    const uint32_t drawn = scramble(scramble(static_cast<uint32_t>(start) + static_cast<uint32_t>(c)) + key);
    return drawn < dropped_below ? real(0) : scale;
  }
};

template <class scalar, class real>
struct Dropout {
  const scalar* x;
  DropoutMask<real> mask;
  scalar* out;

  template <int LANES>
  HOST_DEVICE void operator()(int64_t, int64_t start, int n, Scratch<real>) const {
    const uint32_t key = mask.key(start);
    const scalar* __restrict in = x + start;
    scalar* __restrict o = out + start;
    FOR_LANES(c, n) o[c] = static_cast<scalar>(static_cast<real>(in[c]) * mask.factor(key, start, c));
  }
};

}  // namespace spikegpt
