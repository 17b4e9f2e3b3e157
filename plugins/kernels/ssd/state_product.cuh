// Phase 2 of a work item: the chunk state.

#ifndef SSDI8_SSD_STATE_PRODUCT_CUH_
#define SSDI8_SSD_STATE_PRODUCT_CUH_

#include <stdint.h>

#include "mma.cuh"
#include "rounding.cuh"
#include "shape.cuh"

namespace ssdi8 {
namespace ssd {

template <typename P>
using StateInt = int[P::kRows][P::kSteps][4][4];

// Operands of B^T some steps ahead of their use.
template <typename P>
struct StateOperands {
  static constexpr int kStepsOfChunk = P::kChunk / 32;
  static constexpr int kWanted = 6 / P::kSteps;  // 48 registers
  static constexpr int kAhead = kWanted < kStepsOfChunk ? kWanted : kStepsOfChunk;
  uint4 b[kAhead][P::kSteps * 2];

  __device__ __forceinline__ void load(const uint4* unit, int s) {
#pragma unroll
    for (int pair = 0; pair < 2 * P::kSteps; ++pair) {
      b[s % kAhead][pair] = load16_global(unit + (s * (P::kN / 16) + pair) * 32);
    }
  }
  __device__ __forceinline__ const uint4* unit(const uint4* b_units) const {
    return b_units + P::first_step() * 2 * 32 + threadIdx.x % 32;
  }
  __device__ __forceinline__ void load_first(const uint4* b_units) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(unit(b_units), s);
  }
};

// acc (read as FP32) = kMagic + Q(w . x)^T . B_q.
template <typename P>
__device__ __forceinline__ void state_product(const uint4* xs, const uint4* b_units,
                                              StateOperands<P>& operands, StateInt<P>& acc) {
  const uint4* a_unit = xs + P::first_row() * 32 + threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < P::kRows; ++row) {
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[row][step][v][e] = kMagicInt;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < P::kChunk / 32; ++s) {
    uint4 a[P::kRows];
#pragma unroll
    for (int row = 0; row < P::kRows; ++row) a[row] = load16(a_unit + (4 * s + row) * 32);
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint4 b = operands.b[s % operands.kAhead][2 * step + pair];
#pragma unroll
        for (int row = 0; row < P::kRows; ++row) {
          mma_int8(acc[row][step][2 * pair], a[row], b.x, b.y);
          mma_int8(acc[row][step][2 * pair + 1], a[row], b.z, b.w);
        }
      }
    }
    if (s + operands.kAhead < P::kChunk / 32) {
      operands.load(operands.unit(b_units), s + operands.kAhead);
    }
  }
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_STATE_PRODUCT_CUH_
