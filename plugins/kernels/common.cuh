// What every kernel shares: rounding to INT8, reductions, and how a launcher refuses.
//
// The rounding functions are the twins of ssdi8_edge/numerics/int8.py; no kernel rounds in another way.

#ifndef SSDI8_COMMON_CUH_
#define SSDI8_COMMON_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "gpu.cuh"
#include "kernels.h"

namespace ssdi8 {

constexpr int kWarp = 32;
// The most that every chip from sm_86 on grants one block.
constexpr int kMaxSharedBytes = 99 * 1024;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------
// host: errors and limits
// ---------------------------------------------------------------------------------------------

// Stores the printf-style message for ssdi8_last_error and returns SSDI8_UNSUPPORTED.
int refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Turns the outcome of a CUDA call or launch of `op` into a return code, with the message stored.
int check(cudaError_t error, const char* op);

// Refuses what the input of a linear layer cannot be scaled by, see kernels.h.
int refuse_token_scaling(const char* op, int scaling, const float* scale);

// Multiprocessors of the current device. Boards gate them per power mode, so it is never a
// constant.
cudaError_t multiprocessors(int* count);

// Grants `kernel` its dynamic shared memory; call before each launch.
template <typename Kernel>
cudaError_t grant_shared(Kernel* kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------
// device: rounding
// ---------------------------------------------------------------------------------------------

// Round half to even, saturate to [-128, 127]: one instruction.
__device__ __forceinline__ int round_half_even(float v) { return cvt_rni_sat_s8(v); }

// floor(|v| + 1/2) with the sign of v, saturate to [-127, 127].
__device__ __forceinline__ int round_half_away(float v) {
  const float magnitude = fminf(floorf(__fadd_rn(fabsf(v), 0.5f)), 127.0f);
  return static_cast<int>(copysignf(magnitude, v));
}

__device__ __forceinline__ int round_to_int8(float v, bool half_away) {
  return half_away ? round_half_away(v) : round_half_even(v);
}

// int8.py's quantize: `inverse_scale` is FP32(1 / scale), the product is rounded before the cast.
__device__ __forceinline__ int quantize(float x, float inverse_scale, bool half_away) {
  return round_to_int8(__fmul_rn(x, inverse_scale), half_away);
}

// The scale of values of which the largest is `top`, as in int8.py's quantize_by_largest: 1 /
// scale, and the scale; each may be the neighbour of the reference's, which divides exactly.
struct DynamicScale {
  float inverse;
  float step;
};
constexpr float kLeastTop = 1e-30f;
constexpr float kMostSteps = 127.0f;

__device__ __forceinline__ DynamicScale dynamic_scale(float top) {
  top = fmaxf(top, kLeastTop);
  return {__fdividef(kMostSteps, top), top * (1.0f / kMostSteps)};
}

// Four integers in [-128, 127] to the bytes of a word, the first lowest.
__device__ __forceinline__ uint32_t pack4(int a, int b, int c, int d) {
  const uint32_t low = __byte_perm(a, b, 0x0040);
  const uint32_t high = __byte_perm(c, d, 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// x * sigmoid(x), a few ulp from the FP64 value. At the far left exp is inf and the value -0.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }

// ---------------------------------------------------------------------------------------------
// device: reductions
// ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// Of values that are not negative: as integers their bits are in the same order.
__device__ __forceinline__ float warp_largest(float v) {
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(v)));
}

// The largest magnitude.
template <int kCount>
__device__ __forceinline__ float largest(const float (&v)[kCount]) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = fmaxf(top, fabsf(v[i]));
  return top;
}

// 1 / sqrt(x) with the error of the approximate instruction removed by one Newton step.
__device__ __forceinline__ float reciprocal_root(float x) {
  const float r = rsqrtf(x);
  return fmaf(0.5f * r, fmaf(-x * r, r, 1.0f), r);
}

}  // namespace ssdi8

#endif  // SSDI8_COMMON_CUH_
