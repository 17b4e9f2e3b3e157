// Phase 3 of a work item: y.

#ifndef SSDI8_SSD_ROW_SCAN_CUH_
#define SSDI8_SSD_ROW_SCAN_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "mma.cuh"
#include "rounding.cuh"
#include "shape.cuh"
#include "tables.cuh"

namespace ssdi8 {
namespace ssd {

// FP16 weights CB . exp(a_m - a_k) . dt_k of 16 columns, as A operand. `position` is the first of
// the lane's columns, counted from the first of the lane's rows (used with kDiagonal only).
template <bool kDiagonal>
__device__ __forceinline__ uint4 scan_weights(const uint4& cb, const float4& less, float a0,
                                              float a1, int position, float d_skip) {
  uint4 weights;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t bits = reinterpret_cast<const uint32_t*>(&cb)[w];
    float2 v = __half22float2(*reinterpret_cast<const __half2*>(&bits));
    const float am = w % 2 ? a1 : a0;
    float e0 = am - (w / 2 ? less.z : less.x), e1 = am - (w / 2 ? less.w : less.y);
    if (kDiagonal) {
      const int past = position + 2 * (w / 2) - 8 * (w % 2);  // columns right of the diagonal
      if (past > 0) e0 = -INFINITY;
      if (past + 1 > 0) e1 = -INFINITY;
      v.x = fmaf(v.x, ex2_approx(e0), past == 0 ? d_skip : 0.0f);
      v.y = fmaf(v.y, ex2_approx(e1), past + 1 == 0 ? d_skip : 0.0f);
    } else {
      v.x *= ex2_approx(e0);
      v.y *= ex2_approx(e1);
    }
    const __half2 packed = __floats2half2_rn(v.x, v.y);
    reinterpret_cast<uint32_t*>(&weights)[w] = *reinterpret_cast<const uint32_t*>(&packed);
  }
  return weights;
}

// What follows from it is then not kept in registers around a loop.
__device__ __forceinline__ int lane_asked_again() { return read_tid_x() % 32; }

// Rows first .. first + 15 of y, as the accumulators have them; `out` is that of row 0.
__device__ __forceinline__ void store_rows(const float (&y)[8][4], int first, int valid, int pitch,
                                           int channels, __half* out) {
  const int lane = lane_asked_again(), g = lane / 4, t = lane % 4;
  out += (first + g) * pitch + 8 * t;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first + g + 8 * half >= valid) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (channels < kTileP && 8 * t + 32 * e >= channels) continue;
      uint4 word;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const __half2 packed =
            __floats2half2_rn(y[2 * pair][2 * half + e], y[2 * pair + 1][2 * half + e]);
        reinterpret_cast<uint32_t*>(&word)[pair] = *reinterpret_cast<const uint32_t*>(&packed);
      }
      *reinterpret_cast<uint4*>(out + 8 * half * pitch + 32 * e) = word;
    }
  }
}

// The rows of y of a warp, 16 at a time. With two blocks of rows they are paired so that every warp
// has the same number of products.
template <typename P>
struct RowScan {
  static constexpr int kStepsOfC = P::kN / 32;
  // Loaded ahead for the next 16 rows.
  uint4 c[kStepsOfC];
  uint4 cb;  // of the first 16 columns

  __device__ __forceinline__ static int tile_of(int m) {
    const int warp = read_tid_x() / 32;
    return m == 0 ? warp : 2 * P::kWarps - 1 - warp;
  }
  __device__ __forceinline__ static const uint4* cb_unit(const uint4* cb_units, int group_chunk,
                                                         int tile) {
    return cb_units + (group_chunk * (P::kChunk / 16) + tile) * (P::kChunk / 16) * 32 +
           lane_asked_again();
  }

  __device__ __forceinline__ void load_c(const uint4* c_units, int group_chunk, int tile) {
    const uint4* unit = c_units + (group_chunk * (P::kChunk / 16) + tile) * kStepsOfC * 32;
#pragma unroll
    for (int q = 0; q < kStepsOfC; ++q) c[q] = load16_global(unit + q * 32 + lane_asked_again());
  }
  // For the first rows; before run, as early as registers allow.
  __device__ __forceinline__ void load_first(int group_chunk, const uint4* c_units,
                                             const uint4* cb_units) {
    const int tile = tile_of(0);
    load_c(c_units, group_chunk, tile);
    cb = load16_global(cb_unit(cb_units, group_chunk, tile));
  }

  __device__ __forceinline__ void run(const Shape& shape, const uint4* c_units,
                                      const uint4* cb_units, const Tables& tables, const uint4* x16,
                                      const uint4* r_units, __half* y_out) {
    const int4 magic = tables.magic;
    const volatile Tables& place = tables;  // read when needed: the loops need the registers
#pragma unroll 1
    for (int m = 0; m < P::kRowTiles; ++m) {
      const int tile = tile_of(m);
      if (16 * tile >= place.valid) break;  // so are the rows of m + 1
      const int group_chunk = place.group_chunk;
      const float* a2 = tables.a2 + 16 * tile + lane_asked_again() / 4;
      const float a0 = a2[0], a1 = a2[8];
      const bool more = m + 1 < P::kRowTiles;

      float y[8][4];
      {  // Scan1
        const int lane = lane_asked_again(), t = lane % 4;
        const RowFactor f0 = row_factor(a0), f1 = row_factor(a1);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          int acc[2][4];
#pragma unroll
          for (int q = 0; q < kStepsOfC; ++q) {
            const uint4 r = load16(r_units + (q * 4 + pair) * 32 + lane);
            if (q == 0) {
              mma_int8_first(acc[0], c[q], r.x, r.y, magic);
              mma_int8_first(acc[1], c[q], r.z, r.w, magic);
            } else {
              mma_int8(acc[0], c[q], r.x, r.y);
              mma_int8(acc[1], c[q], r.z, r.w);
            }
          }
          const float2 s0 = *reinterpret_cast<const float2*>(tables.scan1_scale + 8 * t + 2 * pair);
          const float2 s1 =
              *reinterpret_cast<const float2*>(tables.scan1_scale + 32 + 8 * t + 2 * pair);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const RowFactor& f = e < 2 ? f0 : f1;
            const float2& scale = e % 2 ? s1 : s0;
            y[2 * pair][e] = fmaf(__int_as_float(acc[0][e]), f.factor, f.offset) * scale.x;
            y[2 * pair + 1][e] = fmaf(__int_as_float(acc[1][e]), f.factor, f.offset) * scale.y;
          }
        }
      }

      // Scan2: FP16, the decay element by element; D on the diagonal itself.
      const int lane = lane_asked_again(), g = lane / 4, t = lane % 4;
      const uint4* unit = cb_unit(cb_units, group_chunk, tile);
      const uint4* x_unit = x16 + lane;
      const float4* less = reinterpret_cast<const float4*>(tables.a2_less + 4 * t);
      const auto accumulate = [&](const uint4& weights) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const uint4 x = load16(x_unit + pair * 32);
          mma_fp16(y[2 * pair], weights, x.x, x.y);
          mma_fp16(y[2 * pair + 1], weights, x.z, x.w);
        }
      };
#pragma unroll 1
      for (int s = 0; s < tile; ++s) {
        unit += 32;
        const uint4 left = cb;
        cb = load16_global(unit);
        accumulate(scan_weights<false>(left, *less, a0, a1, 0, 0.0f));
        x_unit += 4 * 32;
        less += 4;
      }
      const uint4 diagonal = cb;
      if (more) {
        const int next = tile_of(m + 1);
        load_c(c_units, group_chunk, next);
        cb = load16_global(cb_unit(cb_units, group_chunk, next));
      }
      accumulate(scan_weights<true>(diagonal, *less, a0, a1, 4 * t - g, tables.d_skip));

      store_rows(y, 16 * tile_of(m), place.valid, shape.nheads * shape.headdim,
                 channels_of_work(shape), y_out + place.y_offset);
    }
  }
};

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_ROW_SCAN_CUH_
