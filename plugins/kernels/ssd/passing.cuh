// One step of the recurrence between chunks, for one state value; states in memory.

#ifndef SSDI8_SSD_PASSING_CUH_
#define SSDI8_SSD_PASSING_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "../common.cuh"
#include "mma.cuh"

namespace ssdi8 {
namespace ssd {

constexpr int kGateBits = 7;

// The FP32 carry: one multiplication and one addition, each rounded.
__device__ __forceinline__ float pass_real(float carry, float gate, float state) {
  return __fadd_rn(__fmul_rn(gate, carry), state);
}

// The released integer carry (docs/method.md §5.3): halves of the shifted product go up.
__device__ __forceinline__ int pass_integer(int carry, int gate, int state) {
  return ((carry * gate + (1 << (kGateBits - 1))) >> kGateBits) + state;
}

__device__ __forceinline__ int integer_gate(float gate, bool away) {
  return round_to_int8(gate * (1 << kGateBits), away);
}

// A start state in steps of its scale, rounded but not saturated.
__device__ __forceinline__ int integer_carry(float state, float inverse, bool away) {
  const float v = __fmul_rn(state, inverse);
  if (!away) return __float2int_rn(v);
  return __float2int_rz(__fadd_rn(v, copysignf(0.5f, v)));
}

__device__ __forceinline__ int saturate(int carry, bool away) {
  return max(min(carry, 127), away ? -127 : -128);
}

// Eight state values in a row, FP16 or FP32.
__device__ __forceinline__ void load_state8(const void* base, size_t index, bool fp32,
                                            float (&v)[8]) {
  if (fp32) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
    const float4 low = p[0], high = p[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  } else {
    const uint4 bits = load16(static_cast<const __half*>(base) + index);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __half2float(reinterpret_cast<const __half*>(&bits)[i]);
  }
}

__device__ __forceinline__ void store_state8(void* base, size_t index, bool fp32,
                                             const float (&v)[8]) {
  if (fp32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
    p[0] = make_float4(v[0], v[1], v[2], v[3]);
    p[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    uint4 bits;
#pragma unroll
    for (int i = 0; i < 8; ++i) reinterpret_cast<__half*>(&bits)[i] = __float2half_rn(v[i]);
    *reinterpret_cast<uint4*>(static_cast<__half*>(base) + index) = bits;
  }
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_PASSING_CUH_
