// What the variants have in common: their arguments, the scales of groups, the end of a sum.

#ifndef SSDI8_LINEAR_ARGUMENTS_CUH_
#define SSDI8_LINEAR_ARGUMENTS_CUH_

#include "../common.cuh"

namespace ssdi8 {
namespace linear {

enum Format { kW8, kW4Rounded, kW4Integer };  // W4 by its group scales: FP16 or INT8

struct LinearArguments {
  const int8_t* x;
  const float* token_scale;
  const int8_t* weight;     // W8, or W4 packed
  const void* group_scale;  // W4 only: FP16, or INT8
  const float* scale;
  const float* bias;
  __half* y;
  int tokens;
  int n_in;
  int n_out;
  int group_shift;  // log2 of the group size
};

__device__ __forceinline__ __half epilogue(int acc, float scale, float token_scale, float bias) {
  const float scaled = __fmul_rn(__fmul_rn(__int2float_rn(acc), scale), token_scale);
  return __float2half_rn(__fadd_rn(scaled, bias));
}

// Where group_scale has that of the first k of a row, and how much further that of `k` is.
__device__ __forceinline__ int first_scale(const LinearArguments& p, int row) {
  return row * (p.n_in >> p.group_shift);
}
__device__ __forceinline__ int group_of(const LinearArguments& p, int k) {
  return min(k >> p.group_shift, (p.n_in >> p.group_shift) - 1);
}

__device__ __forceinline__ __half2 load_sigma(const LinearArguments& p, int index) {
  return __half2half2(static_cast<const __half*>(p.group_scale)[index]);
}

__device__ __forceinline__ int load_integer_scale(const LinearArguments& p, int index) {
  return static_cast<const int8_t*>(p.group_scale)[index];
}

}  // namespace linear
}  // namespace ssdi8

#endif  // SSDI8_LINEAR_ARGUMENTS_CUH_
