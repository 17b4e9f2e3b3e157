// dt and its cumulative decay a, of which all weights are made.

#ifndef SSDI8_SSD_CUMSUM_CUH_
#define SSDI8_SSD_CUMSUM_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "../common.cuh"
#include "mma.cuh"
#include "shape.cuh"
#include "tables.cuh"

namespace ssdi8 {
namespace ssd {

constexpr int kCumsumHeads = kWarps;  // one warp per head

struct Cumsum {
  const __half* zxbcdt;  // (B, L, row_stride)
  const float* dt_bias;
  const float* decay;  // A
  int row_stride;
  int dt_column;
  float dt_min;
  float dt_max;
};

// A sum to about 48 bits: the reference adds in FP64, which these chips do slowly.
struct WideSum {
  float high;
  float low;
  __device__ __forceinline__ void add(float h, float l) {
    const float sum = __fadd_rn(high, h);
    const float part = __fsub_rn(sum, high);
    const float error = __fadd_rn(__fsub_rn(high, __fsub_rn(sum, part)), __fsub_rn(h, part));
    low = __fadd_rn(__fadd_rn(low, l), error);
    high = sum;
  }
};

// dt and a of one chunk of eight heads: a lane owns kPerLane consecutive positions of one head and
// hands them to `sink`. Past the end of the sequence dt is 0 and a stays.
template <int kPerLane, class Sink>
__device__ __forceinline__ void cumsum_chunk(const Shape& shape, const Cumsum& p, int b, int c,
                                             int first_head, __half (*raw)[kMaxChunk + 8],
                                             const Sink& sink) {
  const int start = c * shape.chunk, valid = min(shape.chunk, shape.length - start);
  const int heads = min(kCumsumHeads, shape.nheads - first_head);
  const int row = threadIdx.x;
  if (row < valid) {
    const size_t offset =
        (size_t(b) * shape.length + start + row) * p.row_stride + p.dt_column + first_head;
    if (heads == kCumsumHeads && p.row_stride % 8 == 0 && (p.dt_column + first_head) % 8 == 0) {
      const uint4 bits = load16_global(p.zxbcdt + offset);
#pragma unroll
      for (int h = 0; h < kCumsumHeads; ++h)
        raw[h][row] = reinterpret_cast<const __half*>(&bits)[h];
    } else {
      for (int h = 0; h < heads; ++h) raw[h][row] = p.zxbcdt[offset + h];
    }
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = first_head + warp;
  if (warp >= heads) return;
  const float bias = p.dt_bias[h], rate = p.decay[h];
  float dt[kPerLane];
  WideSum local[kPerLane];
  WideSum sum = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int k = lane * kPerLane + i;
    const float v = __fadd_rn(k < valid ? __half2float(raw[warp][k]) : 0.0f, bias);
    const float softplus = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
    dt[i] = k < valid ? fminf(fmaxf(softplus, p.dt_min), p.dt_max) : 0.0f;
    const float product = __fmul_rn(rate, dt[i]);
    sum.add(product, fmaf(rate, dt[i], -product));
    local[i] = sum;
  }
  WideSum before = sum;  // of all lanes up to this one, then without it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float high = __shfl_up_sync(kAllLanes, before.high, distance);
    const float low = __shfl_up_sync(kAllLanes, before.low, distance);
    if (lane >= distance) before.add(high, low);
  }
  before.high = __shfl_up_sync(kAllLanes, before.high, 1);
  before.low = __shfl_up_sync(kAllLanes, before.low, 1);
  if (lane == 0) before = {0.0f, 0.0f};

  float a[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    local[i].add(before.high, before.low);
    a[i] = __fadd_rn(local[i].high, local[i].low);
  }
  sink(b, c, h, dt, a);
}

// Writes dt and a as tensors (B, H, L).
struct DecaySink {
  const Shape& shape;
  float* dt;
  float* a;

  template <int kPerLane>
  __device__ __forceinline__ void operator()(int b, int c, int h, const float (&dt_k)[kPerLane],
                                             const float (&a_k)[kPerLane]) const {
    const int position = c * shape.chunk + threadIdx.x % 32 * kPerLane;
    const size_t first = (size_t(b) * shape.nheads + h) * shape.length + position;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2) {
      if (shape.length % 2 == 0 && position + i < shape.length) {
        *reinterpret_cast<float2*>(dt + first + i) = make_float2(dt_k[i], dt_k[i + 1]);
        *reinterpret_cast<float2*>(a + first + i) = make_float2(a_k[i], a_k[i + 1]);
        continue;
      }
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        if (position + j >= shape.length) return;
        dt[first + j] = dt_k[j];
        a[first + j] = a_k[j];
      }
    }
  }
};

// Writes what the items of a chunk and head look up: the decay part of Tables.
struct TableSink {
  const Shape& shape;
  const PreparedTables& tables;
  const Scales& scales;

  template <int kPerLane>
  __device__ __forceinline__ void operator()(int b, int c, int h, const float (&dt)[kPerLane],
                                             const float (&a)[kPerLane]) const {
    constexpr int kChunk = 32 * kPerLane;
    const int lane = threadIdx.x % 32;
    const float a_last = __shfl_sync(kAllLanes, a[kPerLane - 1], 31);
    const float factor = weight_factor(shape);
    const int group = h / (shape.nheads / shape.ngroups);
    const float cb_scale = scales.cb_scale[group];
    float* to = tables.decay_of(shape, b, c, h);
    float4 row;  // an array of four, or a half of it, at a time
#pragma unroll
    for (int array = 0; array < 3; ++array) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float a2 = a[i] * kLog2e;
        const float v = array == 0   ? decay_weight(a_last, a[i], dt[i]) * factor
                        : array == 1 ? a2
                                     : a2 - __log2f(dt[i] * cb_scale);
        reinterpret_cast<float*>(&row)[i % 4] = v;
        float* at = to + array * kChunk + lane * kPerLane + i;
        if (i % 4 == 3) *reinterpret_cast<float4*>(at - 3) = row;
        if (kPerLane == 2 && i == 1) *reinterpret_cast<float2*>(at - 1) = make_float2(row.x, row.y);
      }
    }
    if (lane == 0) {
      *reinterpret_cast<float4*>(to + 3 * kChunk) =
          make_float4(expf(a_last), scales.b_scale[group], scales.c_scale[group], scales.d_skip[h]);
    }
  }
};

template <class Sink>
__device__ __forceinline__ void cumsum_block(const Shape& shape, const Cumsum& p, int block,
                                             __half (*raw)[kMaxChunk + 8], const Sink& sink) {
  const int head_blocks = (shape.nheads + kCumsumHeads - 1) / kCumsumHeads;
  const int first_head = block % head_blocks * kCumsumHeads;
  const int bc = block / head_blocks, c = bc % shape.chunks, b = bc / shape.chunks;
  if (shape.chunk == 256) {
    cumsum_chunk<8>(shape, p, b, c, first_head, raw, sink);
  } else if (shape.chunk == 128) {
    cumsum_chunk<4>(shape, p, b, c, first_head, raw, sink);
  } else {
    cumsum_chunk<2>(shape, p, b, c, first_head, raw, sink);
  }
}

inline int cumsum_blocks(const Shape& shape) {
  return shape.batch * shape.chunks * int(ceil_div(shape.nheads, kCumsumHeads));
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_CUMSUM_CUH_
