// B and C as units, once per (batch, chunk, group): INT8, or with scaling "none" FP16.
//
// A lane of m16n8k16 is given four consecutive contraction indices 4t .. 4t + 3 instead of 2t,
// 2t + 1, 2t + 8, 2t + 9: a relabelling that both operands share, see ssd.cuh.

#ifndef SSDI8_SSD_OPERANDS_CUH_
#define SSDI8_SSD_OPERANDS_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "mma.cuh"
#include "shape.cuh"

namespace ssdi8 {
namespace ssd {

// 16 consecutive int8 of a row, zeros where the row does not exist.
__device__ __forceinline__ uint4 row_bytes(const int8_t* base, int row, int valid, size_t pitch,
                                           int column) {
  if (row >= valid) return make_uint4(0, 0, 0, 0);
  return load16_global(base + size_t(row) * pitch + column);
}

// One warp: B^T of positions 32s .. 32s + 31 and 64 state columns, four positions to a word. A lane
// owns every second of 16 columns and packs them with byte permutations:
// word[positions +0 / +16][column of the run of 16, own parity].
__device__ __forceinline__ void transpose_b(const int8_t* b_rows, int valid, size_t pitch, int s,
                                            int n64, uint32_t (&word)[2][8]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t select = g % 2 ? 0x7351 : 0x6240;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row[i] =
          row_bytes(b_rows, 32 * s + 16 * half + 4 * t + i, valid, pitch, 64 * n64 + 16 * (g / 2));
    }
    const uint32_t* r0 = reinterpret_cast<const uint32_t*>(&row[0]);
    const uint32_t* r1 = reinterpret_cast<const uint32_t*>(&row[1]);
    const uint32_t* r2 = reinterpret_cast<const uint32_t*>(&row[2]);
    const uint32_t* r3 = reinterpret_cast<const uint32_t*>(&row[3]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t low = __byte_perm(r0[w], r1[w], select);  // bytes e of both, then e + 2
      const uint32_t high = __byte_perm(r2[w], r3[w], select);
      word[half][2 * w] = __byte_perm(low, high, 0x5410);
      word[half][2 * w + 1] = __byte_perm(low, high, 0x7632);
    }
  }
}

// As four units.
__device__ __forceinline__ void prepare_b_units(const int8_t* b_rows, int valid, size_t pitch,
                                                int d_state, int s, int n64, uint4* b_units) {
  const int lane = threadIdx.x % 32;
  uint32_t word[2][8];
  transpose_b(b_rows, valid, pitch, s, n64, word);
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    b_units[(size_t(s) * (d_state / 16) + 4 * n64 + u) * 32 + lane] =
        make_uint4(word[0][2 * u], word[1][2 * u], word[0][2 * u + 1], word[1][2 * u + 1]);
  }
}

// One warp: C of rows 16i .. 16i + 15 as units, one per 32 state columns.
template <int kN>
__device__ __forceinline__ void prepare_c_units(const int8_t* c_rows, int valid, size_t pitch,
                                                int i, uint4* c_units) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4* unit = c_units + size_t(i) * (kN / 32) * 32 + lane;
#pragma unroll
  for (int n64 = 0; n64 < kN / 64; ++n64) {
    const uint4 low = row_bytes(c_rows, 16 * i + g, valid, pitch, 64 * n64 + 16 * t);
    const uint4 high = row_bytes(c_rows, 16 * i + g + 8, valid, pitch, 64 * n64 + 16 * t);
    unit[2 * n64 * 32] = make_uint4(low.x, high.x, low.y, high.y);
    unit[(2 * n64 + 1) * 32] = make_uint4(low.z, high.z, low.w, high.w);
  }
}

// Bytes 2 * pair and 2 * pair + 1 of a word, which are INT8.
__device__ __forceinline__ uint32_t half2_of(uint32_t word, int pair) {
  const int8_t* bytes = reinterpret_cast<const int8_t*>(&word) + 2 * pair;
  const __half2 v = __floats2half2_rn(bytes[0], bytes[1]);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint4 fp16_of(uint32_t first, uint32_t second) {
  return make_uint4(half2_of(first, 0), half2_of(first, 1), half2_of(second, 0),
                    half2_of(second, 1));
}

// One warp: B^T of positions 32s .. 32s + 31 and 64 state columns, as units [step of 16][16
// columns], B operands of two column blocks each.
__device__ __forceinline__ void prepare_fp16_b(const int8_t* b_rows, int valid, size_t pitch,
                                               int d_state, int s, int n64, uint4* b_units) {
  const int lane = threadIdx.x % 32;
  uint32_t word[2][8];
  transpose_b(b_rows, valid, pitch, s, n64, word);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      b_units[(size_t(2 * s + half) * (d_state / 16) + 4 * n64 + u) * 32 + lane] =
          fp16_of(word[half][2 * u], word[half][2 * u + 1]);
    }
  }
}

// One warp: C of rows 16i .. 16i + 15, as units [step of 16 state columns], A operands. Step 2q + k
// contracts columns 64 (q / 2) + 16t + 8 (q % 2) + 4k + {0..3}.
template <int kN>
__device__ __forceinline__ void prepare_fp16_c(const int8_t* c_rows, int valid, size_t pitch, int i,
                                               uint4* c_units) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4* unit = c_units + size_t(i) * (kN / 16) * 32 + lane;
#pragma unroll
  for (int n64 = 0; n64 < kN / 64; ++n64) {
    const uint4 low = row_bytes(c_rows, 16 * i + g, valid, pitch, 64 * n64 + 16 * t);
    const uint4 high = row_bytes(c_rows, 16 * i + g + 8, valid, pitch, 64 * n64 + 16 * t);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint4 v = fp16_of(reinterpret_cast<const uint32_t*>(&low)[w],
                              reinterpret_cast<const uint32_t*>(&high)[w]);
      unit[(4 * n64 + w) * 32] = make_uint4(v.x, v.z, v.y, v.w);
    }
  }
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_OPERANDS_CUH_
