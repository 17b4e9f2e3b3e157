// The twin of plugins/kernels/gpu.cuh for a CPU: included before any other file, it takes the place
// of that one by its guard.

#ifndef SSDI8_GPU_CUH_
#define SSDI8_GPU_CUH_

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "cuda_runtime.h"
#include "emulator.h"

namespace ssdi8 {

inline int read_tid_x() { return threadIdx.x; }
inline int read_ctaid_x() { return blockIdx.x; }
inline int read_ctaid_y() { return blockIdx.y; }

inline int cvt_rni_sat_s8(float v) { return max(-128, min(__float2int_rn(v), 127)); }

inline uint32_t pack_saturated(int a, int b, uint32_t c, int least, int most) {
  const uint32_t high = max(least, min(a, most)) & 255, low = max(least, min(b, most)) & 255;
  return c << 16 | high << 8 | low;
}
inline uint32_t cvt_pack_sat_s8(int a, int b, uint32_t c = 0) {
  return pack_saturated(a, b, c, -128, 127);
}
inline uint32_t cvt_pack_sat_u8(int a, int b, uint32_t c = 0) {
  return pack_saturated(a, b, c, 0, 255);
}

inline float ex2_approx(float v) {
  const float e = exp2f(v);
  return e < 0x1p-126f ? 0.0f : e;
}

inline float rcp_approx(float v) {
  const float r = 1.0f / v;
  return fabsf(r) < 0x1p-126f ? copysignf(0.0f, r) : r;
}

inline void computed_here(uint32_t&) {}

inline void mma_m16n8k32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1, int c0, int c1, int c2, int c3) {
  emulator::matrix_product_int8(d, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3});
}
inline void mma_m16n8k32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  emulator::matrix_product_int8(d, {a0, a1, a2, a3}, {b0, b1}, d);
}
inline void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  emulator::matrix_product_fp16(d, {a0, a1, a2, a3}, {b0, b1});
}
inline uint32_t movmatrix_trans(uint32_t pair) { return emulator::matrix_transpose(pair); }

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }
inline void cp_async_16(uint32_t shared, const void* global, bool valid = true) {
  emulator::start_copy(shared, valid ? global : nullptr);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_copies(kPending);
}
inline uint4 load_streaming(const void* global) { return *static_cast<const uint4*>(global); }
inline int load_relaxed(const int* global) {
  emulator::waiting_for_block();
  return *static_cast<const volatile int*>(global);
}
inline void store_release(int* global, int v) { *global = v; }

#define SSDI8_DYNAMIC_SHARED(type, name) type* name = emulator::SharedMemory()

template <typename T>
struct NotDeduced {
  using type = T;
};

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes, cudaStream_t,
                   typename NotDeduced<Parameters>::type... arguments) {
  return emulator::run_grid(reinterpret_cast<const void*>(kernel), grid, block, bytes,
                            [&] { kernel(arguments...); });
}

}  // namespace ssdi8

#endif  // SSDI8_GPU_CUH_
