// Rotary positions: pairs (i, i + d / 2) turned by the angle position * theta^(-2i / d), an FP32
// product as in ops/attention.py.

#ifndef SSDI8_ATTENTION_ROTARY_CUH_
#define SSDI8_ATTENTION_ROTARY_CUH_

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../common.cuh"

namespace ssdi8 {
namespace attention {

constexpr int kMostPairs = 64;
// Where `sine_and_cosine` is as good as it says.
constexpr int kMostRotaryTokens = 1 << 17;

struct Rotary {
  float frequencies[kMostPairs];
  bool turns;  // false: no positions
};

inline Rotary make_rotary(float theta, int head_dim) {
  Rotary rotary = {{}, theta > 0.0f};
  // As the model states it: FP32 has no 1e11.
  char decimal[32];
  snprintf(decimal, sizeof(decimal), "%.7g", static_cast<double>(theta));
  const double base = strtod(decimal, nullptr);
  for (int i = 0; rotary.turns && i < head_dim / 2; ++i) {
    rotary.frequencies[i] = static_cast<float>(pow(base, -2.0 * i / head_dim));
  }
  return rotary;
}

// Of an angle from 0 to kMostRotaryTokens, to about 1e-7. sincosf would keep an array in local
// memory for angles beyond.
__device__ __forceinline__ void sine_and_cosine(float angle, float* sine, float* cosine) {
  // pi / 2 in three parts (Cody and Waite): the first product is exact to what matters.
  const float quarters = rintf(angle * 0.636619772f);
  float r = fmaf(quarters, -1.57079637050628662109375f, angle);
  r = fmaf(quarters, 4.37113882867379114e-8f, r);
  r = fmaf(quarters, 1.71512451e-15f, r);
  const float r2 = r * r;
  // Polynomials of Cephes for |r| <= pi / 4.
  float s = fmaf(r2, -1.9515295891e-4f, 8.3321608736e-3f);
  s = fmaf(r2, s, -1.6666654611e-1f);
  s = fmaf(r2 * r, s, r);
  float c = fmaf(r2, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = fmaf(r2, c, 4.166664568298827e-2f);
  c = fmaf(r2 * r2, c, fmaf(r2, -0.5f, 1.0f));
  const int quarter = static_cast<int>(quarters);
  const float of_sine = quarter & 1 ? c : s, of_cosine = quarter & 1 ? s : c;
  *sine = quarter & 2 ? -of_sine : of_sine;
  *cosine = (quarter + 1) & 2 ? -of_cosine : of_cosine;
}

}  // namespace attention
}  // namespace ssdi8

#endif  // SSDI8_ATTENTION_ROTARY_CUH_
