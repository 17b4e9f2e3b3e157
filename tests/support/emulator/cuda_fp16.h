// What the kernels use of FP16. Every operation is rounded once, half to even, as on the GPU.

#ifndef SSDI8_TESTS_CUDA_FP16_H_
#define SSDI8_TESTS_CUDA_FP16_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const uint32_t magnitude = (h.bits & 0x7fffu) << 13;
  // Times 2^112 the exponent is biased as FP32 has it, for denormal numbers too.
  float v = __uint_as_float(magnitude) * 0x1p112f;
  if (magnitude >= 0x0f800000u) v = __uint_as_float(magnitude | 0x7f800000u);  // inf, NaN
  return __uint_as_float(__float_as_uint(v) | (h.bits & 0x8000u) << 16);
}

inline __half __float2half_rn(float v) {
  const uint32_t bits = __float_as_uint(v), sign = bits >> 16 & 0x8000u;
  const float magnitude = fabsf(v);
  uint32_t half;
  if (isnan(v)) {
    half = 0x7fffu;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    half = static_cast<uint32_t>(nearbyintf(magnitude * 0x1p24f));  // in steps of 2^-24
  } else {
    const uint32_t m = bits & 0x7fffffffu;
    half = (m + 0xfffu + (m >> 13 & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

// A sum of halves and products of halves: cut to what FP32 holds, the last bit telling whether
// anything was cut off, so that the second rounding is right.
inline __half exact_to_half(double v) {
  uint64_t bits;
  memcpy(&bits, &v, 8);
  constexpr uint64_t kLast = uint64_t{1} << 29;
  if (bits & (kLast - 1)) bits = (bits & ~(kLast - 1)) | kLast;
  memcpy(&v, &bits, 8);
  return __float2half_rn(static_cast<float>(v));
}

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half v) { return {v, v}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half __habs(__half v) { return {static_cast<uint16_t>(v.bits & 0x7fffu)}; }
inline bool __hgt(__half a, __half b) { return __half2float(a) > __half2float(b); }

template <typename Operation, typename... Halves>
__half2 each_half(Operation operation, Halves... v) {
  return {operation(__half2float(v.x)...), operation(__half2float(v.y)...)};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return each_half([](float a, float b) { return __float2half_rn(a * b); }, a, b);  // exact in FP32
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return each_half([](double a, double b) { return exact_to_half(a - b); }, a, b);
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return each_half([](double a, double b, double c) { return exact_to_half(a * b + c); }, a, b, c);
}
// Of a number and NaN the number.
inline __half lesser(__half a, __half b) {
  const float v = __half2float(a);
  return isnan(v) || __half2float(b) < v ? b : a;
}
inline __half greater(__half a, __half b) {
  const float v = __half2float(a);
  return isnan(v) || __half2float(b) > v ? b : a;
}
inline __half2 __hmin2(__half2 a, __half2 b) { return {lesser(a.x, b.x), lesser(a.y, b.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {greater(a.x, b.x), greater(a.y, b.y)}; }

#endif  // SSDI8_TESTS_CUDA_FP16_H_
