// What every kernel shares: rounding to INT8, the Ampere instructions, reductions, and how a
// launcher refuses.
//
// The rounding functions are the twins of ssdi8_edge/int8.py; no kernel rounds in another way.
// Each instruction wrapper is one PTX instruction of sm_80; nothing here needs sm_90.

#ifndef SSDI8_COMMON_CUH_
#define SSDI8_COMMON_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels.h"

namespace ssdi8 {

constexpr int kWarp = 32;
// The most that every chip from sm_86 on grants one block.
constexpr int kMaxSharedBytes = 99 * 1024;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------
// host: errors and limits
// ---------------------------------------------------------------------------------------------

// Stores the printf-style message for ssdi8_last_error and returns SSDI8_UNSUPPORTED.
int refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Turns the outcome of a CUDA call or launch of `op` into a return code, with the message stored.
int check(cudaError_t error, const char* op);

// Multiprocessors of the current device. Boards gate them per power mode, so it is never a
// constant.
cudaError_t multiprocessors(int* count);

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------
// device: rounding
// ---------------------------------------------------------------------------------------------

// Round half to even, saturate to [-128, 127]: one instruction.
__device__ __forceinline__ int round_half_even(float v) {
  int q;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(q) : "f"(v));
  return q;
}

// floor(|v| + 1/2) with the sign of v, saturate to [-127, 127].
__device__ __forceinline__ int round_half_away(float v) {
  const float magnitude = fminf(floorf(__fadd_rn(fabsf(v), 0.5f)), 127.0f);
  return static_cast<int>(copysignf(magnitude, v));
}

__device__ __forceinline__ int round_to_int8(float v, bool half_away) {
  return half_away ? round_half_away(v) : round_half_even(v);
}

// int8.py's quantize: `inverse_scale` is FP32(1 / scale), the product is rounded before the cast.
__device__ __forceinline__ int quantize(float x, float inverse_scale, bool half_away) {
  return round_to_int8(__fmul_rn(x, inverse_scale), half_away);
}

// Four integers in [-128, 127] to the bytes of a word, the first lowest.
__device__ __forceinline__ uint32_t pack4(int a, int b, int c, int d) {
  const uint32_t low = __byte_perm(a, b, 0x0040);
  const uint32_t high = __byte_perm(c, d, 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// x * sigmoid(x), a few ulp from the FP64 value. At the far left exp is inf and the value -0.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }

// ---------------------------------------------------------------------------------------------
// device: Ampere instructions
// ---------------------------------------------------------------------------------------------

// acc (16 x 8, INT32) += a (16 x 32, INT8, row) * b (32 x 8, INT8, column). With g = lane / 4 and
// t = lane % 4: a = {row g, k 4t..}, {row g + 8, k 4t..}, {row g, k 16 + 4t..}, {row g + 8, ...};
// b = {column g, k 4t..}, {column g, k 16 + 4t..}; acc = {g, 2t}, {g, 2t + 1}, {g + 8, 2t}, ....
__device__ __forceinline__ void mma_m16n8k32(int (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 16-byte matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts a 16-byte copy past L1; where `valid` is false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global,
                                            bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Reads what is used precisely once and should not push other lines out of L1.
__device__ __forceinline__ uint4 load_streaming(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

// ---------------------------------------------------------------------------------------------
// device: reductions
// ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// 1 / sqrt(x) with the error of the approximate instruction removed by one Newton step.
__device__ __forceinline__ float reciprocal_root(float x) {
  const float r = rsqrtf(x);
  return fmaf(0.5f * r, fmaf(-x * r, r, 1.0f), r);
}

}  // namespace ssdi8

#endif  // SSDI8_COMMON_CUH_
