// The tokens of a call: q becomes FP16 in scratch memory; k and v become INT8 rows of the caches.

#ifndef SSDI8_ATTENTION_APPEND_CUH_
#define SSDI8_ATTENTION_APPEND_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "../common.cuh"
#include "rotary.cuh"

namespace ssdi8 {
namespace attention {

constexpr int kAppendWarps = 4;
// Of the scales in the cache: the least that FP16 holds.
constexpr float kLeastScale = 0x1p-24f;

struct Append {
  const __half* projected;  // (B, L, row_stride), from the first column of q on
  const int64_t* position;
  __half* q;  // (B, L, Q, d)
  int8_t* k_cache;
  __half* k_scale;
  int8_t* v_cache;
  __half* v_scale;
  int length;
  int row_stride;
  int n_heads;
  int n_kv_heads;
  int capacity;
};

// A warp takes a head of a token: blocks (token, heads, sequence). A lane has pairs of channels
// that are half a head apart.
template <int kHeadDim>
__global__ void __launch_bounds__(kAppendWarps* kWarp) append_kernel(Append p, Rotary rotary) {
  constexpr int kHalf = kHeadDim / 2, kPairs = (kHalf + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int head = blockIdx.y * kAppendWarps + threadIdx.x / kWarp;
  if (head >= p.n_heads + 2 * p.n_kv_heads) return;
  const int64_t token = static_cast<int64_t>(blockIdx.z) * p.length + blockIdx.x;
  const int64_t position = *p.position + blockIdx.x;

  const __half* row = p.projected + token * p.row_stride + head * kHeadDim;
  float first[kPairs] = {}, second[kPairs] = {};
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int pair = lane + j * kWarp;
    if (pair >= kHalf) continue;
    const float a = __half2float(row[pair]), b = __half2float(row[pair + kHalf]);
    first[j] = a;
    second[j] = b;
    if (!rotary.turns || head >= p.n_heads + p.n_kv_heads) continue;
    float sine, cosine;
    const float angle = __fmul_rn(static_cast<float>(position), rotary.frequencies[pair]);
    sine_and_cosine(angle, &sine, &cosine);
    first[j] = fmaf(a, cosine, -(b * sine));
    second[j] = fmaf(b, cosine, a * sine);
  }

  if (head < p.n_heads) {
    __half* q = p.q + (token * p.n_heads + head) * kHeadDim;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int pair = lane + j * kWarp;
      if (pair >= kHalf) continue;
      q[pair] = __float2half_rn(first[j]);
      q[pair + kHalf] = __float2half_rn(second[j]);
    }
    return;
  }
  if (position >= p.capacity) return;
  const bool is_value = head >= p.n_heads + p.n_kv_heads;
  const int kv = head - p.n_heads - (is_value ? p.n_kv_heads : 0);
  const int64_t place =
      (static_cast<int64_t>(blockIdx.z) * p.n_kv_heads + kv) * p.capacity + position;
  const float top = warp_largest(fmaxf(largest(first), largest(second)));
  const __half scale = __float2half_rn(fmaxf(__fdiv_rn(top, kMostSteps), kLeastScale));
  if (lane == 0) (is_value ? p.v_scale : p.k_scale)[place] = scale;
  const float inverse = __frcp_rn(__half2float(scale));
  int8_t* cache = (is_value ? p.v_cache : p.k_cache) + place * kHeadDim;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int pair = lane + j * kWarp;
    if (pair >= kHalf) continue;
    cache[pair] = static_cast<int8_t>(quantize(first[j], inverse, false));
    cache[pair + kHalf] = static_cast<int8_t>(quantize(second[j], inverse, false));
  }
}

}  // namespace attention
}  // namespace ssdi8

#endif  // SSDI8_ATTENTION_APPEND_CUH_
