// The phases of a work item with scaling "none": chunk state, carry and y from FP16 operands.

#ifndef SSDI8_SSD_FP16_SCAN_CUH_
#define SSDI8_SSD_FP16_SCAN_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "carry.cuh"
#include "fp16_tables.cuh"
#include "mma.cuh"
#include "rounding.cuh"
#include "row_scan.cuh"
#include "shape.cuh"

namespace ssdi8 {
namespace ssd {

__device__ __forceinline__ uint32_t half2_product(uint32_t a, uint32_t b) {
  const __half2 v =
      __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t half2_pair(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Blocks on a multiprocessor, which registers are cut to.
template <typename P>
constexpr int kFp16Resident = (P::kN == 256 ? 8 : 16) / P::kWarps;

template <typename P>
using StateReal = float[P::kRows][P::kSteps][4][4];

// Operands of B^T, some steps of 16 positions ahead of their use.
template <typename P>
struct Fp16StateOperands {
  static constexpr int kAhead = 2;
  uint4 b[kAhead][P::kSteps * 2];

  __device__ __forceinline__ void load(const uint4* b_units, int s) {
    const uint4* unit = b_units + P::first_step() * 2 * 32 + threadIdx.x % 32;
#pragma unroll
    for (int pair = 0; pair < 2 * P::kSteps; ++pair) {
      b[s % kAhead][pair] = load16_global(unit + (s * (P::kN / 16) + pair) * 32);
    }
  }
  __device__ __forceinline__ void load_first(const uint4* b_units) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(b_units, s);
  }
};

// acc = (w . x)^T . B_q. A unit of x is the operand of either side, see copy_x.
template <typename P>
__device__ __forceinline__ void fp16_state_product(const uint4* x16, const __half* w_state,
                                                   const uint4* b_units,
                                                   Fp16StateOperands<P>& operands,
                                                   StateReal<P>& acc) {
  using Operands = Fp16StateOperands<P>;
  const int lane = threadIdx.x % 32, t = lane % 4;
  const uint4* a_unit = x16 + P::first_row() * 32 + lane;
#pragma unroll
  for (int row = 0; row < P::kRows; ++row) {
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[row][step][v][e] = 0.0f;
      }
    }
  }
#pragma unroll 2
  for (int s = 0; s < P::kChunk / 16; ++s) {
    const uint2 w = *reinterpret_cast<const uint2*>(w_state + 16 * s + 4 * t);
#pragma unroll
    for (int row = 0; row < P::kRows; ++row) {
      const uint4 x = load16(a_unit + (4 * s + row) * 32);
      const uint4 a = make_uint4(half2_product(x.x, w.x), half2_product(x.z, w.x),
                                 half2_product(x.y, w.y), half2_product(x.w, w.y));
#pragma unroll
      for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint4& b = operands.b[s % Operands::kAhead][2 * step + pair];
          mma_fp16(acc[row][step][2 * pair], a, b.x, b.y);
          mma_fp16(acc[row][step][2 * pair + 1], a, b.z, b.w);
        }
      }
    }
    if (s + Operands::kAhead < P::kChunk / 16) operands.load(b_units, s + Operands::kAhead);
  }
}

// Moves the carry one chunk on; the state that enters the chunk becomes the operand of Scan1:
// r16, units [step of 16 state columns][pair of column blocks].
template <typename P>
__device__ __forceinline__ void fp16_pass(const CarrySlot<P>& carry, const StateReal<P>& acc,
                                          float gate, float b_scale, uint4* r16) {
  carry.wait();
#pragma unroll
  for (int row = 0; row < P::kRows; ++row) {
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
      const int run = row * P::kSteps + step;
      uint32_t words[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float before[8], after[8];
        carry.load(2 * run + r, P::channel(row) + r, step, before);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          after[i] = fmaf(gate, before[i], acc[row][step][i / 2][2 * r + i % 2] * b_scale);
        }
        carry.store(2 * run + r, P::channel(row) + r, step, after);
#pragma unroll
        for (int i = 0; i < 4; ++i) words[r][i] = half2_pair(before[2 * i], before[2 * i + 1]);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        r16[((2 * (P::first_step() + step) + k) * 4 + P::first_row() + row) * 32 +
            threadIdx.x % 32] =
            make_uint4(words[0][2 * k], words[0][2 * k + 1], words[1][2 * k], words[1][2 * k + 1]);
      }
    }
  }
  carry.publish();
}

// The 32 rows of y of a warp, in two blocks of 16 that share every operand read from shared memory,
// whose bandwidth is what limits the kernel.
template <typename P>
struct Fp16RowScan {
  static_assert(P::kRowTiles == 2);
  static constexpr int kStepsOfC = P::kN / 16;
  static constexpr int kAhead = 2;

  uint4 c[kAhead][2];
  uint4 cb[2];

  // The first block of 16 rows: the warps that share a scheduler have as much to do as the others.
  __device__ __forceinline__ static int first_tile() {
    const int warp = read_tid_x() / 32;
    return 2 * (warp < 4 ? warp : 11 - warp);
  }
  __device__ __forceinline__ static const uint4* c_unit(const uint4* c_units, int tile) {
    return c_units + tile * kStepsOfC * 32 + lane_asked_again();
  }
  __device__ __forceinline__ static const uint4* cb_unit(const uint4* cb_units, int tile) {
    return cb_units + tile * (P::kChunk / 16) * 32 + lane_asked_again();
  }

  // As early as registers allow.
  __device__ __forceinline__ void load_first(const uint4* c_units, const uint4* cb_units) {
    const int tile = first_tile();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int q = 0; q < kAhead; ++q) c[q][m] = load16_global(c_unit(c_units, tile + m) + q * 32);
      cb[m] = load16_global(cb_unit(cb_units, tile + m));
    }
  }

  __device__ __forceinline__ static void accumulate(float (&y0)[8][4], float (&y1)[8][4],
                                                    const uint4& a0, const uint4& a1,
                                                    const uint4* units) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint4 v = load16(units + pair * 32);
      mma_fp16(y0[2 * pair], a0, v.x, v.y);
      mma_fp16(y0[2 * pair + 1], a0, v.z, v.w);
      mma_fp16(y1[2 * pair], a1, v.x, v.y);
      mma_fp16(y1[2 * pair + 1], a1, v.z, v.w);
    }
  }

  // CB of 16 columns left of the diagonal, whose decay is a factor of the row and one of the
  // column.
  __device__ __forceinline__ static uint4 weights_left(const uint4& cb, const uint2& w, float end,
                                                       const float (&a)[2]) {
    const float e0 = ex2_approx(a[0] - end), e1 = ex2_approx(a[1] - end);
    const uint32_t h0 = half2_pair(e0, e0), h1 = half2_pair(e1, e1);
    return make_uint4(
        half2_product(half2_product(cb.x, w.x), h0), half2_product(half2_product(cb.y, w.x), h1),
        half2_product(half2_product(cb.z, w.y), h0), half2_product(half2_product(cb.w, w.y), h1));
  }

  // `y_out` is (B, L, H * P). The item is asked for again where its place is needed: the loops need
  // the registers.
  __device__ __forceinline__ void run(const Shape& shape, const uint4* c_units,
                                      const uint4* cb_units, const Fp16Tables<P::kChunk>& tables,
                                      const uint4* x16, const uint4* r16, __half* y_out) {
    const int lane = lane_asked_again(), g = lane / 4, t = lane % 4;
    const int tile = first_tile();
    float a[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) a[m][r] = tables.a2[16 * (tile + m) + 8 * r + g];
    }
    float y[2][8][4] = {};
    {  // Scan1
      const uint4* unit = c_unit(c_units, tile);
#pragma unroll
      for (int q = 0; q < kStepsOfC; ++q) {
        accumulate(y[0], y[1], c[q % kAhead][0], c[q % kAhead][1], r16 + q * 4 * 32 + lane);
        if (q + kAhead < kStepsOfC) {
          c[q % kAhead][0] = load16_global(unit + (q + kAhead) * 32);
          c[q % kAhead][1] = load16_global(unit + (q + kAhead + kStepsOfC) * 32);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float f0 = ex2_approx(a[m][0]) * tables.c_scale;
        const float f1 = ex2_approx(a[m][1]) * tables.c_scale;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) y[m][j][e] *= e < 2 ? f0 : f1;
        }
      }
    }

    // Scan2 left of the diagonal.
    const uint4* unit = cb_unit(cb_units, tile);
    constexpr int kPitch = (P::kChunk / 16) * 32;  // from one block of rows to the next
    const uint4* x_unit = x16 + lane;
    const __half* w_tile = tables.w_tile + 4 * t;
    const float* end = tables.a2 + 15;
#pragma unroll 1
    for (int s = 0; s < tile; ++s) {
      unit += 32;
      const uint4 v0 = cb[0], v1 = cb[1];
      cb[0] = load16_global(unit);
      cb[1] = load16_global(unit + kPitch);
      const uint2 w = *reinterpret_cast<const uint2*>(w_tile);
      accumulate(y[0], y[1], weights_left(v0, w, *end, a[0]), weights_left(v1, w, *end, a[1]),
                 x_unit);
      x_unit += 4 * 32;
      w_tile += 16;
      end += 16;
    }
    // On the diagonal of the first block; there the second has its last step left of it.
    const float4* less = reinterpret_cast<const float4*>(tables.a2_less + 16 * tile + 4 * t);
    {
      const uint4 v1 = cb[1];
      cb[1] = load16_global(unit + 32 + kPitch);
      const uint2 w = *reinterpret_cast<const uint2*>(w_tile);
      accumulate(y[0], y[1],
                 scan_weights<true>(cb[0], less[0], a[0][0], a[0][1], 4 * t - g, tables.d_skip),
                 weights_left(v1, w, *end, a[1]), x_unit);
      x_unit += 4 * 32;
    }
    const uint4 weights =
        scan_weights<true>(cb[1], less[4], a[1][0], a[1][1], 4 * t - g, tables.d_skip);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint4 v = load16(x_unit + pair * 32);
      mma_fp16(y[1][2 * pair], weights, v.x, v.y);
      mma_fp16(y[1][2 * pair + 1], weights, v.z, v.w);
    }

    const Item it = make_item(shape, lane_of_work(), chunk_of_work());
    const int pitch = shape.nheads * shape.headdim;
    __half* out = y_out + (size_t(it.b) * shape.length + it.start) * pitch + it.p0;
#pragma unroll
    for (int m = 0; m < 2; ++m)
      store_rows(y[m], 16 * (tile + m), it.valid, pitch, shape.channels(it.pt), out);
  }
};

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_FP16_SCAN_CUH_
