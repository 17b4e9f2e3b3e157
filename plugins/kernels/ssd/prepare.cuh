// Preparation, once per (batch, chunk, group): CB, C and B as units.

#ifndef SSDI8_SSD_PREPARE_CUH_
#define SSDI8_SSD_PREPARE_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "mma.cuh"
#include "operands.cuh"
#include "rounding.cuh"
#include "shape.cuh"

namespace ssdi8 {
namespace ssd {

// One warp: CB of rows 16i .. 16i + 15 and columns 32s .. 32s + 31, in units of cb_scale, as FP16
// units of 16 columns each; rounded to integers with scaling "static".
template <int kN, bool kAway>
__device__ __forceinline__ void prepare_cb_unit(const Shape& shape, const int8_t* b_rows,
                                                const int8_t* c_rows, int valid, int i, int s,
                                                float requantizer, uint4* cb_units) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const size_t pitch = size_t(shape.ngroups) * kN;
  int acc[4][4];
#pragma unroll
  for (int v = 0; v < 4; ++v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[v][e] = 0;
  }
#pragma unroll
  for (int n64 = 0; n64 < kN / 64; ++n64) {
    const int column = 64 * n64 + 16 * t;
    const uint4 a0 = row_bytes(c_rows, 16 * i + g, valid, pitch, column);
    const uint4 a1 = row_bytes(c_rows, 16 * i + g + 8, valid, pitch, column);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      // Columns in the order that leaves four consecutive ones in a lane's accumulators.
      const int k = 32 * s + 16 * (v / 2) + 4 * (g / 2) + 2 * (v % 2) + g % 2;
      const uint4 b = row_bytes(b_rows, k, valid, pitch, column);
      mma_int8(acc[v], make_uint4(a0.x, a1.x, a0.y, a1.y), b.x, b.y);
      mma_int8(acc[v], make_uint4(a0.z, a1.z, a0.w, a1.w), b.z, b.w);
    }
  }
  float cb[4][4];
#pragma unroll
  for (int v = 0; v < 4; ++v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) cb[v][e] = __fmul_rn(static_cast<float>(acc[v][e]), requantizer);
  }
  const auto to_fp16 = [&](float v) {
    if (shape.dynamic || shape.fp16) return fmaxf(-kMaxFp16, fminf(v, kMaxFp16));
    return static_cast<float>(max(kAway ? -127 : -128, min(round_int<kAway>(v), 127)));
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (2 * s + half > i) break;
    uint32_t word[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int v = 2 * half + w / 2, e = 2 * (w % 2);
      const __half2 pair = __floats2half2_rn(to_fp16(cb[v][e]), to_fp16(cb[v][e + 1]));
      word[w] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    cb_units[(size_t(i) * (shape.chunk / 16) + 2 * s + half) * 32 + lane] =
        make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// Jobs of one warp for one (batch, chunk, group): CB units of the lower triangle, C, then B.
__host__ __device__ inline int cb_jobs(int chunk) {
  const int steps = chunk / 32;  // rows 32r + 0..31 meet steps 0 .. r
  return steps * (steps + 1);
}
__host__ __device__ inline int c_jobs(int chunk) { return chunk / 16; }
__host__ __device__ inline int b_jobs(int chunk, int d_state) {
  return (chunk / 32) * (d_state / 64);
}

struct PrepareGroup {
  const int8_t* b_q;
  const int8_t* c_q;
  const float* b_scale;
  const float* c_scale;
  const float* cb_scale;
  uint4* b_units;  // null: not wanted
  uint4* c_units;  // null: CB and C not wanted
  uint4* cb_units;
};

// kFp16: scaling "none", all operands in FP16.
template <int kN, bool kFp16>
__device__ __forceinline__ void prepare_group(const Shape& shape, const PrepareGroup& p,
                                              int group_chunk_index, int job) {
  const int group = group_chunk_index % shape.ngroups;
  const int bc = group_chunk_index / shape.ngroups;
  const int c = bc % shape.chunks, b = bc / shape.chunks;
  const int start = c * shape.chunk;
  const int valid = min(shape.chunk, shape.length - start);
  const size_t pitch = size_t(shape.ngroups) * kN;
  const size_t first = (size_t(b) * shape.length + start) * pitch + size_t(group) * kN;
  if (p.c_units != nullptr) {
    if (job < cb_jobs(shape.chunk)) {
      int r = 0;  // rows of 32; job counts (row of 16, step) pairs row by row
      while (job >= (r + 1) * (r + 2)) ++r;
      const int rest = job - r * (r + 1);
      const int i = 2 * r + rest / (r + 1), s = rest % (r + 1);
      const float requantizer =
          __fdiv_rn(__fmul_rn(p.c_scale[group], p.b_scale[group]), p.cb_scale[group]);
      uint4* cb_units = p.cb_units + group_chunk_index * shape.cb_units() * 32;
      if (shape.away) {
        prepare_cb_unit<kN, true>(shape, p.b_q + first, p.c_q + first, valid, i, s, requantizer,
                                  cb_units);
      } else {
        prepare_cb_unit<kN, false>(shape, p.b_q + first, p.c_q + first, valid, i, s, requantizer,
                                   cb_units);
      }
      return;
    }
    job -= cb_jobs(shape.chunk);
    if (job < c_jobs(shape.chunk)) {
      uint4* units = p.c_units + group_chunk_index * (kFp16 + 1) * shape.c_units() * 32;
      if (kFp16) {
        prepare_fp16_c<kN>(p.c_q + first, valid, pitch, job, units);
      } else {
        prepare_c_units<kN>(p.c_q + first, valid, pitch, job, units);
      }
      return;
    }
    job -= c_jobs(shape.chunk);
  }
  if (p.b_units != nullptr && job < b_jobs(shape.chunk, kN)) {
    uint4* units = p.b_units + group_chunk_index * (kFp16 + 1) * shape.b_units() * 32;
    const int s = job / (kN / 64), n64 = job % (kN / 64);
    if (kFp16) {
      prepare_fp16_b(p.b_q + first, valid, pitch, kN, s, n64, units);
    } else {
      prepare_b_units(p.b_q + first, valid, pitch, kN, s, n64, units);
    }
  }
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_PREPARE_CUH_
