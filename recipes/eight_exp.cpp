// What WKV is measured against in bench.py: one pass over memory that reads k, v, g, writes y, gk, gv and takes 8
// exponentials an element. `count` is a multiple of 64.
#include "arithmetic.h"

extern "C" void eight_exp(const float* k, const float* v, const float* g, float* y, float* gk, float* gv, long count) {
  using spikegpt::exp_nonpositive;
#pragma omp parallel for
  for (long start = 0; start < count; start += 64) {
    const float *a = k + start, *b = v + start, *c = g + start;
    float *x = y + start, *p = gk + start, *q = gv + start;
    FOR_LANES(i, 64) {
      const float l = -std::fabs(a[i]), m = -std::fabs(b[i]), n = -std::fabs(c[i]);
      x[i] = exp_nonpositive(l) + exp_nonpositive(m) + exp_nonpositive(n);
      p[i] = exp_nonpositive(l + m) + exp_nonpositive(m + n) + exp_nonpositive(n + l);
      q[i] = exp_nonpositive(l + m + n) + exp_nonpositive(l + l);
    }
  }
}
