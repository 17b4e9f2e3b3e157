// What the threads of a work item look up with scaling "none".

#ifndef SSDI8_SSD_FP16_TABLES_CUH_
#define SSDI8_SSD_FP16_TABLES_CUH_

#include <cuda_fp16.h>

#include "rounding.cuh"
#include "shape.cuh"
#include "tables.cuh"

namespace ssdi8 {
namespace ssd {

constexpr int kFp16Tile = 16;  // positions of a Scan2 tile: the depth of an FP16 product

// Of one (batch, chunk, head); in memory as in shared memory.
template <int kChunk>
struct alignas(16) Fp16Tables {
  __half w_state[kChunk];  // exp(a_last - a_k) * dt_k
  __half w_tile[kChunk];   // exp(r - a_k) * dt_k * cb_scale, r the decay at the end of k's tile
  float a2[kChunk];        // a * log2(e)
  float a2_less[kChunk];   // a2 - log2(dt * cb_scale)
  float gate;              // exp(a_last)
  float b_scale;
  float c_scale;
  float d_skip;
};

// The sink of cumsum_chunk that writes them.
struct Fp16TableSink {
  const Shape& shape;
  const Scales& scales;
  void* tables;  // Fp16Tables (B, C, H)

  template <int kPerLane>
  __device__ __forceinline__ void operator()(int b, int c, int h, const float (&dt)[kPerLane],
                                             const float (&a)[kPerLane]) const {
    constexpr int kLanesOfTile = kFp16Tile / kPerLane;
    const int lane = threadIdx.x % 32, first = lane * kPerLane;
    const float a_last = __shfl_sync(kAllLanes, a[kPerLane - 1], 31);
    const float r = __shfl_sync(kAllLanes, a[kPerLane - 1], lane | (kLanesOfTile - 1));
    const int group = h / (shape.nheads / shape.ngroups);
    const float cb_scale = scales.cb_scale[group];
    auto& to = static_cast<Fp16Tables<32 * kPerLane>*>(
        tables)[(size_t(b) * shape.chunks + c) * shape.nheads + h];
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2) {
      const int j = i + 1;
      *reinterpret_cast<__half2*>(to.w_state + first + i) =
          __floats2half2_rn(decay_weight(a_last, a[i], dt[i]), decay_weight(a_last, a[j], dt[j]));
      *reinterpret_cast<__half2*>(to.w_tile + first + i) = __floats2half2_rn(
          decay_weight(r, a[i], dt[i]) * cb_scale, decay_weight(r, a[j], dt[j]) * cb_scale);
      const float2 a2 = make_float2(a[i] * kLog2e, a[j] * kLog2e);
      *reinterpret_cast<float2*>(to.a2 + first + i) = a2;
      *reinterpret_cast<float2*>(to.a2_less + first + i) =
          make_float2(a2.x - __log2f(dt[i] * cb_scale), a2.y - __log2f(dt[j] * cb_scale));
    }
    if (lane == 0) {
      *reinterpret_cast<float4*>(&to.gate) =
          make_float4(expf(a_last), scales.b_scale[group], scales.c_scale[group], scales.d_skip[h]);
    }
  }
};

// The same for one item, from dt and a (B, H, L): what the chunk state needs, or the scan.
template <typename P, bool kState, bool kScan>
__device__ __forceinline__ void fill_fp16_tables(const Shape& shape, const Item& it,
                                                 const float* dt, const float* a,
                                                 const Scales& scales,
                                                 Fp16Tables<P::kChunk>& tables) {
  const size_t first = (size_t(it.b) * shape.nheads + it.h) * shape.length + it.start;
  const int last = it.valid - 1;
  static_assert(P::kChunk <= P::kThreads, "a position per thread");
  const int k = threadIdx.x;
  if (k < P::kChunk) {
    const float a_k = a[first + min(k, last)];
    const float dt_k = k < it.valid ? dt[first + k] : 0.0f;
    if (kState) tables.w_state[k] = __float2half_rn(decay_weight(a[first + last], a_k, dt_k));
    if (kScan) {
      const float cb_scale = scales.cb_scale[it.group];
      const float r = a[first + min(k | (kFp16Tile - 1), last)];
      const float a2 = a_k * kLog2e;
      tables.w_tile[k] = __float2half_rn(decay_weight(r, a_k, dt_k) * cb_scale);
      tables.a2[k] = a2;
      tables.a2_less[k] = a2 - __log2f(dt_k * cb_scale);
    }
  }
  if (k > 0) return;
  if (kState) tables.b_scale = scales.b_scale[it.group];
  if (kScan) {
    tables.c_scale = scales.c_scale[it.group];
    tables.d_skip = scales.d_skip[it.h];
  }
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_FP16_TABLES_CUH_
