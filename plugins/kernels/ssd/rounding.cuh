// Rounding to INT8 in few instructions, bit for bit as the torch references round.

#ifndef SSDI8_SSD_ROUNDING_CUH_
#define SSDI8_SSD_ROUNDING_CUH_

#include <stdint.h>

#include "../common.cuh"

namespace ssdi8 {
namespace ssd {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMaxFp16 = 65504.0f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
constexpr int kMagicInt = 0x4B400000;  // its bits

// Four integers, saturated, into the bytes of a word, v0 lowest.
__device__ __forceinline__ uint32_t saturate4(int v0, int v1, int v2, int v3) {
  return cvt_pack_sat_s8(v1, v0, cvt_pack_sat_s8(v3, v2));
}

// Round to an integer that saturate4 saturates correctly. The half-even form adds 1.5 * 2^23 in
// FP32, which rounds; it is right for |v| < 1.2e7, five orders of magnitude past saturation.
template <bool kAway>
__device__ __forceinline__ int round_int(float v) {
  if (kAway) return max(__float2int_rz(__fadd_rn(v, copysignf(0.5f, v))), -127);
  return __float_as_int(__fadd_rn(v, kMagic)) - kMagicInt;
}

// The same for the many values of a work item. Half-even goes through the denormal numbers: in
// units of 2^-149 an FP32 result is an integer, rounded by the FMA that computes it, and its bits
// are that integer; 128 is added so that the saturating conversion to unsigned bytes clips both
// ends. Weights and scales carry kTinyV and kTinyW, whose product is 2^-149.
constexpr float kTinyV = 0x1p-75f;
constexpr float kTinyW = 0x1p-74f;

template <bool kAway>
__device__ __forceinline__ int round_product(float v, float w) {
  if (kAway) return round_int<true>(__fmul_rn(v, w));
  return __float_as_int(__fmaf_rn(v, w, __int_as_float(128)));
}

template <bool kAway>
__device__ __forceinline__ int round_value(float v) {
  return kAway ? round_int<true>(v) : round_product<false>(v, __int_as_float(1));
}

// v * inverse rounded to an integer in the lowest byte, for values that need no saturation: their
// scale is dynamic.
template <bool kAway>
__device__ __forceinline__ int round_byte(float v, float inverse) {
  if (kAway) return round_int<true>(__fmul_rn(v, inverse));
  return __float_as_int(__fmaf_rn(v, inverse, kMagic));
}

// The largest value of each entry over the lanes of a quad: lane t ends with entries t * n / 4 and
// following, with n = 2 with entry t / 2.
template <int n>
__device__ __forceinline__ void quad_max(float (&v)[n]) {
  static_assert(n == 2 || n == 4 || n == 8);
  const bool upper = threadIdx.x & 2;
  [[maybe_unused]] const bool odd = threadIdx.x & 1;
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[n / 2 + i], 2);
    v[i] = fmaxf(upper ? v[n / 2 + i] : v[i], other);
  }
  if constexpr (n == 2) {
    v[0] = fmaxf(v[0], __shfl_xor_sync(kAllLanes, v[0], 1));
  } else {
#pragma unroll
    for (int i = 0; i < n / 4; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, odd ? v[i] : v[n / 4 + i], 1);
      v[i] = fmaxf(odd ? v[n / 4 + i] : v[i], other);
    }
  }
}

// Four results of round_product or round_value.
template <bool kAway>
__device__ __forceinline__ uint32_t saturate_rounded(int v0, int v1, int v2, int v3) {
  if (kAway) return saturate4(v0, v1, v2, v3);
  return cvt_pack_sat_u8(v1, v0, cvt_pack_sat_u8(v3, v2)) ^ 0x80808080u;
}

// A row factor with 22 significant bits: then factor * kMagic is exact and one FMA turns an
// accumulator into factor * sum, correctly rounded.
struct RowFactor {
  float factor;
  float offset;
};
__device__ __forceinline__ RowFactor row_factor(float exponent) {
  const float f = __int_as_float(__float_as_int(ex2_approx(exponent)) & ~3);
  return {f, -kMagic * f};
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_ROUNDING_CUH_
