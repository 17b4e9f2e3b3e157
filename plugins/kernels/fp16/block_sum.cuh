// The sum over a block, for norms that keep nothing in registers.

#ifndef SSDI8_FP16_BLOCK_SUM_CUH_
#define SSDI8_FP16_BLOCK_SUM_CUH_

#include "../common.cuh"

namespace ssdi8 {

// In every thread; once per kernel.
template <int kThreads>
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float warp_sums[kThreads / kWarp];
  v = warp_sum(v);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warp_sums[threadIdx.x / kWarp] = v;
  __syncthreads();
  return warp_sum(lane < kThreads / kWarp ? warp_sums[lane] : 0.0f);
}

}  // namespace ssdi8

#endif  // SSDI8_FP16_BLOCK_SUM_CUH_
