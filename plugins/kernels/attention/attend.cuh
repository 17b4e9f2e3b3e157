// o = softmax(q . k^T / sqrt(d), causal) . v over the INT8 caches, with an online softmax.
//
// Query heads that share a KV head are rows beside each other: row r of a KV head is head r % group
// of token r / group, so that one token fills the 16 rows of a matrix instruction as well as it
// can. Scores are FP32 sums of FP16 q times whole k, scaled afterwards; weights become FP16 for the
// product with v, and so does v times its scale.
//
// kDecode false: a warp has 16 rows, a block 64, and all warps read the same tokens of a tile.
// kDecode true: the 16 rows of a block are those of all its warps, each of which takes 16 tokens of
// a tile; blocks of `splits` ranges of tiles share the cache, and `join_kernel` joins them.

#ifndef SSDI8_ATTENTION_ATTEND_CUH_
#define SSDI8_ATTENTION_ATTEND_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "../common.cuh"
#include "tiles.cuh"

namespace ssdi8 {
namespace attention {

// Of a score that a query must not see; no sum of scores comes near it.
constexpr float kUnseen = -1e30f;
constexpr int kRows = 16;  // of a matrix instruction

struct Attend {
  const __half* q;  // (B, L, Q, d)
  const int8_t* k_cache;
  const __half* k_scale;
  const int8_t* v_cache;
  const __half* v_scale;
  const int64_t* position;
  __half* o;       // (B, L, Q, d)
  float* partial;  // (splits, B, L, Q, d), not divided by the sums of weights
  float2* maxima;  // (splits, B, L, Q): the largest score, and the sum of weights relative to it
  int length;
  int n_heads;
  int n_kv_heads;
  int capacity;
  float score_factor;  // log2(e) / sqrt(d)
};

// What a thread knows of one of its rows.
struct Row {
  int last_token;  // that it sees; -1: there is no such row
  int64_t place;   // in (B, L, Q)
};

__device__ __forceinline__ Row make_row(const Attend& p, int batch, int kv, int row, int position) {
  const int group = p.n_heads / p.n_kv_heads, token = row / group;
  if (token >= p.length) return {-1, 0};
  const int64_t tokens = static_cast<int64_t>(batch) * p.length + token;
  return {min(position + token, p.capacity - 1), tokens * p.n_heads + kv * group + row % group};
}

__device__ __forceinline__ float quad_largest(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// 16 rows of queries and what they have gathered so far. Index r of two is row g or g + 8.
template <int kHeadDim>
struct Rows {
  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 8][4] = {};
  float most[2] = {kUnseen, kUnseen};
  float sum[2] = {};  // of the own columns

  __device__ __forceinline__ void load(const __half* source, const Row (&row)[2]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int s = 0; s < kHeadDim / 16; ++s) {
        uint2 pairs = make_uint2(0, 0);
        const __half* own = source + row[r].place * kHeadDim + 16 * s + 4 * t;
        if (row[r].last_token >= 0) pairs = *reinterpret_cast<const uint2*>(own);
        q[s][r] = pairs.x;
        q[s][r + 2] = pairs.y;
      }
    }
  }

  // Scores of 16 tokens of the tile: products[half][2 r + e] is of token 4t + 2 half + e.
  __device__ __forceinline__ void scores(const Tile<kHeadDim>& tile, int step, int first_token,
                                         const Row (&row)[2], float (&products)[2][4]) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const float4 factors = *reinterpret_cast<const float4*>(&tile.k_factor[16 * step + 4 * t]);
    const float factor[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int8_t* key = tile.k[16 * step + 4 * (g / 2) + 2 * half + g % 2] + 4 * t;
      float(&product)[4] = products[half];
#pragma unroll
      for (int e = 0; e < 4; ++e) product[e] = 0.0f;
#pragma unroll
      for (int s = 0; s < kHeadDim / 16; ++s) {
        __half2 k[2];
        to_halves(*reinterpret_cast<const uint32_t*>(key + 16 * s), k);
        mma_m16n8k16(product, q[s][0], q[s][1], q[s][2], q[s][3], bits_of(k[0]), bits_of(k[1]));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = first_token + 16 * step + 4 * t + 2 * half + e % 2;
        const bool seen = token <= row[e / 2].last_token;
        product[e] = seen ? product[e] * factor[2 * half + e % 2] : kUnseen;
      }
    }
  }

  // Takes in kSteps times 16 tokens of the tile, from step `first_step` on.
  template <int kSteps>
  __device__ __forceinline__ void add(const Tile<kHeadDim>& tile, int first_step, int first_token,
                                      const Row (&row)[2]) {
    float weights[kSteps][2][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) scores(tile, first_step + s, first_token, row, weights[s]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = most[r];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) top = fmaxf(top, weights[s][i / 2][2 * r + i % 2]);
      }
      top = quad_largest(top);
      const float kept = ex2_approx(most[r] - top);
      most[r] = top;
      // Where nothing is seen yet, weights are 0, not exp(kUnseen - kUnseen).
      const float base = top == kUnseen ? 0.0f : top;
      sum[r] *= kept;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = weights[s][i / 2][2 * r + i % 2];
          weight = ex2_approx(weight - base);
          sum[r] += weight;
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[n][2 * r] *= kept;
        out[n][2 * r + 1] *= kept;
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) add_values(tile, first_step + s, weights[s]);
  }

  __device__ __forceinline__ void add_values(const Tile<kHeadDim>& tile, int step,
                                             const float (&weights)[2][4]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = weights[i / 2] + i % 2 * 2;
      a[i] = bits_of(__floats2half2_rn(pair[0], pair[1]));
    }
    const uint2 scales = *reinterpret_cast<const uint2*>(&tile.v_scale[16 * step + 4 * t]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      __half2 v[2];
      to_halves(*reinterpret_cast<const uint32_t*>(&tile.v[8 * n + g][16 * step + 4 * t]), v);
      v[0] = __hmul2(v[0], reinterpret_cast<const __half2&>(scales.x));
      v[1] = __hmul2(v[1], reinterpret_cast<const __half2&>(scales.y));
      mma_m16n8k16(out[n], a[0], a[1], a[2], a[3], bits_of(v[0]), bits_of(v[1]));
    }
  }

  __device__ __forceinline__ void store(__half* o, const Row (&row)[2]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = __fdividef(1.0f, quad_sum(sum[r]));
      if (row[r].last_token < 0) continue;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<__half2*>(o + row[r].place * kHeadDim + 8 * n + 2 * t) =
            __floats2half2_rn(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse);
      }
    }
  }
};

// The rows of the warps of a block in shared memory, to be joined.
template <int kHeadDim>
struct Gathered {
  float out[kAttendWarps][kRows][kHeadDim];
  float most[kAttendWarps][kRows];
  float sum[kAttendWarps][kRows];

  __device__ __forceinline__ void put(Rows<kHeadDim>& rows) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(rows.sum[r]);
      if (t == 0) {
        most[warp][g + 8 * r] = rows.most[r];
        sum[warp][g + 8 * r] = total;
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        float* own = &out[warp][g + 8 * r][8 * n + 2 * t];
        own[0] = rows.out[n][2 * r];
        own[1] = rows.out[n][2 * r + 1];
      }
    }
  }

  // Writes what all warps have: o if there is one split, else the split's part. All threads.
  __device__ __forceinline__ void join(const Attend& p, int batch, int kv, int first_row,
                                       int position) const {
    const int64_t part =
        static_cast<int64_t>(blockIdx.z) * (gridDim.y / p.n_kv_heads) * p.length * p.n_heads;
    for (int i = threadIdx.x; i < kRows * kHeadDim; i += kAttendThreads) {
      const int r = i / kHeadDim, channel = i % kHeadDim;
      const Row row = make_row(p, batch, kv, first_row + r, position);
      if (row.last_token < 0) continue;
      float top = kUnseen, total = 0.0f, value = 0.0f;
#pragma unroll
      for (int w = 0; w < kAttendWarps; ++w) top = fmaxf(top, most[w][r]);
#pragma unroll
      for (int w = 0; w < kAttendWarps; ++w) {
        const float kept = ex2_approx(most[w][r] - top);
        total += kept * sum[w][r];
        value += kept * out[w][r][channel];
      }
      if (gridDim.z == 1) {
        p.o[row.place * kHeadDim + channel] = __float2half_rn(__fdividef(value, total));
        continue;
      }
      p.partial[(part + row.place) * kHeadDim + channel] = value;
      if (channel == 0) p.maxima[part + row.place] = make_float2(top, total);
    }
  }
};

template <int kHeadDim, bool kDecode>
constexpr size_t shared_bytes() {
  constexpr size_t tiles = 2 * sizeof(Tile<kHeadDim>), gathered = sizeof(Gathered<kHeadDim>);
  return kDecode && gathered > tiles ? gathered : tiles;
}

// Blocks (tiles of rows, KV heads of all sequences, splits).
template <int kHeadDim, bool kDecode>
__global__ void __launch_bounds__(kAttendThreads) attend_kernel(Attend p) {
  SSDI8_DYNAMIC_SHARED(uint4, shared);
  Tile<kHeadDim>* tiles = reinterpret_cast<Tile<kHeadDim>*>(shared);
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int kv = blockIdx.y % p.n_kv_heads, batch = blockIdx.y / p.n_kv_heads;
  const int position = static_cast<int>(*p.position), group = p.n_heads / p.n_kv_heads;
  constexpr int kBlockRows = kDecode ? kRows : kAttendWarps * kRows;
  // The last rows see the most tokens, and begin first.
  const int block_row = (gridDim.x - 1 - blockIdx.x) * kBlockRows;
  const int first_row = block_row + (kDecode ? 0 : warp * kRows);
  const Row row[2] = {make_row(p, batch, kv, first_row + g, position),
                      make_row(p, batch, kv, first_row + g + 8, position)};
  const int last_row = min(block_row + kBlockRows, p.length * group) - 1;
  const int64_t head = static_cast<int64_t>(blockIdx.y) * p.capacity;
  const Caches caches = {p.k_cache + head * kHeadDim, p.k_scale + head, p.v_cache + head * kHeadDim,
                         p.v_scale + head, min(position + last_row / group + 1, p.capacity)};
  const int all_tiles = static_cast<int>(ceil_div(caches.tokens, kTile));
  const int of_split = static_cast<int>(ceil_div(all_tiles, gridDim.z));
  const int first_tile = blockIdx.z * of_split;
  const int end_tile = min(first_tile + of_split, all_tiles);

  Rows<kHeadDim> rows;
  rows.load(p.q, row);
  ValuesUnderWay<kHeadDim> values;
  if (first_tile < end_tile) {
    tiles[0].start_keys(caches, first_tile * kTile);
    values.load(caches, first_tile * kTile);
    values.store(tiles[0], p.score_factor);
  }
  for (int i = first_tile; i < end_tile; ++i) {
    Tile<kHeadDim>& tile = tiles[(i - first_tile) % 2];
    Tile<kHeadDim>& next = tiles[(i - first_tile + 1) % 2];
    cp_async_wait<0>();
    __syncthreads();
    const bool goes_on = i + 1 < end_tile;
    if (goes_on) {
      next.start_keys(caches, (i + 1) * kTile);
      values.load(caches, (i + 1) * kTile);
    }
    constexpr int kSteps = kDecode ? 1 : kTile / 16;
    rows.template add<kSteps>(tile, kDecode ? warp : 0, i * kTile, row);
    if (goes_on) values.store(next, p.score_factor);
  }

  if constexpr (kDecode) {
    __syncthreads();
    Gathered<kHeadDim>& gathered = *reinterpret_cast<Gathered<kHeadDim>*>(shared);
    gathered.put(rows);
    __syncthreads();
    gathered.join(p, batch, kv, block_row, position);
  } else {
    rows.store(p.o, row);
  }
}

// A block for each head of a token, a thread for each channel.
template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    join_kernel(const float* partial, const float2* maxima, __half* o, int splits) {
  const int64_t place = blockIdx.x, pitch = gridDim.x;
  float top = kUnseen, total = 0.0f, value = 0.0f;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, maxima[s * pitch + place].x);
  for (int s = 0; s < splits; ++s) {
    const float2 own = maxima[s * pitch + place];
    const float kept = ex2_approx(own.x - top);
    total += kept * own.y;
    value += kept * partial[(s * pitch + place) * kHeadDim + threadIdx.x];
  }
  o[place * kHeadDim + threadIdx.x] = __float2half_rn(__fdividef(value, total));
}

}  // namespace attention
}  // namespace ssdi8

#endif  // SSDI8_ATTENTION_ATTEND_CUH_
