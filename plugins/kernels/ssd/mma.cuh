// Matrix instructions on operands of 16 bytes, and how these are loaded.

#ifndef SSDI8_SSD_MMA_CUH_
#define SSDI8_SSD_MMA_CUH_

#include <stdint.h>

#include "../gpu.cuh"

namespace ssdi8 {
namespace ssd {

__device__ __forceinline__ void mma_int8(int (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  mma_m16n8k32(d, a.x, a.y, a.z, a.w, b0, b1);
}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  mma_m16n8k16(d, a.x, a.y, a.z, a.w, b0, b1);
}

// The same with d starting at `c`, four times kMagicInt.
__device__ __forceinline__ void mma_int8_first(int (&d)[4], const uint4& a, uint32_t b0,
                                               uint32_t b1, const int4& c) {
  mma_m16n8k32(d, a.x, a.y, a.z, a.w, b0, b1, c.x, c.y, c.z, c.w);
}

__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ uint4 load16_global(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_MMA_CUH_
