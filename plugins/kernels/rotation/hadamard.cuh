// Hadamard transforms of FP32 values in registers and in shared memory, see hadamard.py.

#ifndef SSDI8_ROTATION_HADAMARD_CUH_
#define SSDI8_ROTATION_HADAMARD_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "../common.cuh"

namespace ssdi8 {

constexpr int kVector = 8;  // values per thread, and per 16-byte load of FP16

// Shared memory has 8 unused words after every 64, so that the strided passes meet no bank twice.
__host__ __device__ constexpr int padded(int e) { return e + ((e >> 6) << 3); }

// Paley's first construction, as in hadamard.py: order q + 1 for the prime q = 3 (mod 4).
template <int kOrder>
__host__ __device__ constexpr bool base_is_negative(int row, int column) {
  if (row == 0) return false;
  if (column == 0) return true;
  const int q = kOrder - 1;
  const int residue = (column - row + q) % q;
  if (residue == 0) return false;
  for (int i = 1; i < q; ++i) {
    if (i * i % q == residue) return false;
  }
  return true;
}

template <int kOrder>
struct BaseMatrix {
  bool negative[kOrder][kOrder] = {};
  constexpr BaseMatrix() {
    for (int i = 0; i < kOrder; ++i) {
      for (int j = 0; j < kOrder; ++j) negative[i][j] = base_is_negative<kOrder>(i, j);
    }
  }
};

// 8 values of a row that may begin at any value.
__device__ __forceinline__ uint4 load_unaligned(const __half* row) {
  uint32_t pairs[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const __half2 pair = __halves2half2(row[2 * i], row[2 * i + 1]);
    pairs[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Walsh-Hadamard transform of the 8 values of an array.
__device__ __forceinline__ void transform8(float (&v)[kVector]) {
#pragma unroll
  for (int step = 1; step < kVector; step *= 2) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i & step) continue;
      const float a = v[i], b = v[i + step];
      v[i] = a + b;
      v[i + step] = a - b;
    }
  }
}

// A column of base^T . x, where x[i] is value(i). Of four values each there are eight sums up to
// the sign, which all rows share: 12 additions, and one a row.
template <int kOrder, typename Value>
__device__ __forceinline__ void base_product(const Value& value, float (&sums)[kOrder]) {
  static_assert(kOrder % 4 == 0);
  constexpr BaseMatrix<kOrder> kBase;
#pragma unroll
  for (int b = 0; b < kOrder; b += 4) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = value(b + i);
    const float first[2] = {x[0] + x[1], x[0] - x[1]}, second[2] = {x[2] + x[3], x[2] - x[3]};
    float of_four[2][2][2];  // by whether the sign of the second, third, fourth is not the first's
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int s1 = i & 1, s2 = i / 2 & 1, s3 = i / 4;
      of_four[s1][s2][s3] = s2 ? first[s1] - second[s2 != s3] : first[s1] + second[s2 != s3];
    }
#pragma unroll
    for (int row = 0; row < kOrder; ++row) {
      const bool s0 = kBase.negative[b][row];
      const float v = of_four[kBase.negative[b + 1][row] != s0][kBase.negative[b + 2][row] != s0]
                             [kBase.negative[b + 3][row] != s0];
      sums[row] = s0 ? sums[row] - v : sums[row] + v;
    }
  }
}

}  // namespace ssdi8

#endif  // SSDI8_ROTATION_HADAMARD_CUH_
