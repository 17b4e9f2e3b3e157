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
                                           __half* out) {
  const int lane = lane_asked_again(), g = lane / 4, t = lane % 4;
  out += (first + g) * pitch + 8 * t;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first + g + 8 * half >= valid) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
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
// has the same number of products left of and on the diagonal.
template <typename P>
struct RowScan {
  static constexpr int kStepsOfC = P::kN / 32;
  // Loaded ahead for the next 16 rows.
  uint4 c[kStepsOfC];
  uint4 cb_0, cb_1;   // CB of the first tile left of the diagonal tile
  uint4 cb_diagonal;  // CB of the first 16 columns in FP16

  __device__ __forceinline__ static int tile_of(int m) {
    const int warp = read_tid_x() / 32;
    return m == 0 ? warp : 2 * P::kWarps - 1 - warp;
  }
  // First column block of 16 in FP16.
  __device__ __forceinline__ static int first_diagonal(const Shape& shape, int tile) {
    return shape.tiled ? tile / 4 * 4 : 0;
  }
  __device__ __forceinline__ static const uint4* unit8_of(const uint4* cb8, int group_chunk,
                                                          int tile) {
    return cb8 + (group_chunk * (P::kChunk / 16) + tile) * (P::kChunk / 32) * 32 +
           lane_asked_again();
  }
  __device__ __forceinline__ static const uint4* unit16_of(const uint4* cb16, int group_chunk,
                                                           int tile, int s) {
    return cb16 + ((group_chunk * (P::kChunk / 16) + tile) * (P::kChunk / 16) + s) * 32 +
           lane_asked_again();
  }

  __device__ __forceinline__ void load_c(const uint4* c_units, int group_chunk, int tile) {
    const uint4* unit = c_units + (group_chunk * (P::kChunk / 16) + tile) * kStepsOfC * 32;
#pragma unroll
    for (int q = 0; q < kStepsOfC; ++q) c[q] = load16_global(unit + q * 32 + lane_asked_again());
  }
  __device__ __forceinline__ void load_left(const uint4* unit8) {
    cb_0 = load16_global(unit8);
    cb_1 = load16_global(unit8 + 32);
  }

  // For the first rows; before run, as early as registers allow.
  __device__ __forceinline__ void load_first(const Shape& shape, int group_chunk,
                                             const uint4* c_units, const uint4* cb8,
                                             const uint4* cb16) {
    const int tile = tile_of(0);
    load_c(c_units, group_chunk, tile);
    load_left(unit8_of(cb8, group_chunk, tile));
    cb_diagonal = load16_global(unit16_of(cb16, group_chunk, tile, first_diagonal(shape, tile)));
  }

  __device__ __forceinline__ void run(const Shape& shape, const uint4* c_units, const uint4* cb8,
                                      const uint4* cb16, const Tables& tables, const uint4* xt,
                                      const uint4* x16, const uint4* r_units, __half* y_out) {
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

      // Scan2 left of the diagonal tile: INT8, the row factor in the epilogue.
      const int left = shape.tiled ? tile / 4 : 0;
      const uint4* unit8 = unit8_of(cb8, group_chunk, tile);
      const uint4* x_unit = xt + lane_asked_again();
      const float* end = tables.tile_end;
      const float* tile_scale = tables.tiles[0].scale + 8 * (lane_asked_again() % 4);
#pragma unroll 1
      for (int k64 = 0; k64 < left; ++k64) {
        unit8 += 2 * 32;
        const uint4 a_0 = cb_0, a_1 = cb_1;
        if (k64 + 1 < left) load_left(unit8);
        const float r = *end;
        const RowFactor f0 = row_factor(a0 - r), f1 = row_factor(a1 - r);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          int acc[2][4];
          const uint4 x_0 = load16(x_unit + pair * 32), x_1 = load16(x_unit + (4 + pair) * 32);
          mma_int8_first(acc[0], a_0, x_0.x, x_0.y, magic);
          mma_int8_first(acc[1], a_0, x_0.z, x_0.w, magic);
          mma_int8(acc[0], a_1, x_1.x, x_1.y);
          mma_int8(acc[1], a_1, x_1.z, x_1.w);
          const float2 s0 = *reinterpret_cast<const float2*>(tile_scale + 2 * pair);
          const float2 s1 = *reinterpret_cast<const float2*>(tile_scale + 32 + 2 * pair);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const RowFactor& f = e < 2 ? f0 : f1;
            const float2& scale = e % 2 ? s1 : s0;
            y[2 * pair][e] =
                fmaf(fmaf(__int_as_float(acc[0][e]), f.factor, f.offset), scale.x, y[2 * pair][e]);
            y[2 * pair + 1][e] = fmaf(fmaf(__int_as_float(acc[1][e]), f.factor, f.offset), scale.y,
                                      y[2 * pair + 1][e]);
          }
        }
        x_unit += 8 * 32;
        ++end;
        tile_scale += Tables::tile_pitch(shape);
      }

      // Scan2 on the diagonal tile: FP16, the decay element by element; D on the diagonal itself.
      const int lane = lane_asked_again(), g = lane / 4, t = lane % 4;
      int s = first_diagonal(shape, tile);
      const uint4* unit16 = unit16_of(cb16, group_chunk, tile, s);
      x_unit = x16 + s * 4 * 32 + lane;
      const float4* less = reinterpret_cast<const float4*>(tables.a2_less + 16 * s + 4 * t);
      const auto accumulate = [&](const uint4& weights) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const uint4 x = load16(x_unit + pair * 32);
          mma_fp16(y[2 * pair], weights, x.x, x.y);
          mma_fp16(y[2 * pair + 1], weights, x.z, x.w);
        }
      };
#pragma unroll 1
      for (; s < tile; ++s) {
        unit16 += 32;
        const uint4 cb = cb_diagonal;
        cb_diagonal = load16_global(unit16);
        accumulate(scan_weights<false>(cb, *less, a0, a1, 0, 0.0f));
        x_unit += 4 * 32;
        less += 4;
      }
      const uint4 cb = cb_diagonal;
      if (more) {
        const int next = tile_of(m + 1);
        load_c(c_units, group_chunk, next);
        load_left(unit8_of(cb8, group_chunk, next));
        cb_diagonal =
            load16_global(unit16_of(cb16, group_chunk, next, first_diagonal(shape, next)));
      }
      accumulate(scan_weights<true>(cb, *less, a0, a1, 4 * t - g, tables.d_skip));

      store_rows(y, 16 * tile_of(m), place.valid, shape.nheads * shape.headdim,
                 y_out + place.y_offset);
    }
  }
};

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_ROW_SCAN_CUH_
