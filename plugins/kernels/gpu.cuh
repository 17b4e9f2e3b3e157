// What C++ has no word for: PTX instructions, one inline function each and nothing more; the
// dynamic shared memory of a block; the launch of a kernel. Nothing here needs more than sm_80.
//
// tests/support/emulator/gpu.cuh is the twin of this file that lets the kernels run on a CPU.

#ifndef SSDI8_GPU_CUH_
#define SSDI8_GPU_CUH_

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace ssdi8 {

// ---------------------------------------------------------------------------------------------
// special registers
// ---------------------------------------------------------------------------------------------

// `volatile` keeps the compiler from carrying what follows from them along in registers.
__device__ __forceinline__ int read_tid_x() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ int read_ctaid_x() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ int read_ctaid_y() {
  int y;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
  return y;
}

// ---------------------------------------------------------------------------------------------
// arithmetic
// ---------------------------------------------------------------------------------------------

// Rounds half to even, saturates to [-128, 127].
__device__ __forceinline__ int cvt_rni_sat_s8(float v) {
  int q;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(q) : "f"(v));
  return q;
}

// `a` and `b`, saturated, into bytes 1 and 0; the lower half of `c`, or zeros, into bytes 3 and 2.
__device__ __forceinline__ uint32_t cvt_pack_sat_s8(int a, int b) {
  uint32_t word;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
__device__ __forceinline__ uint32_t cvt_pack_sat_s8(int a, int b, uint32_t c) {
  uint32_t word;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  return word;
}

__device__ __forceinline__ uint32_t cvt_pack_sat_u8(int a, int b) {
  uint32_t word;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
__device__ __forceinline__ uint32_t cvt_pack_sat_u8(int a, int b, uint32_t c) {
  uint32_t word;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
  return word;
}

// 2^v to about 2 ulp; a denormal result is 0.
__device__ __forceinline__ float ex2_approx(float v) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
  return e;
}

// 1 / v to about 1 ulp; a denormal result is 0.
__device__ __forceinline__ float rcp_approx(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// Has `v` computed no later than here: the compiler would move it to where it is used.
__device__ __forceinline__ void computed_here(uint32_t& v) { asm volatile("" : "+r"(v)); }

// ---------------------------------------------------------------------------------------------
// matrix instructions: all lanes of a warp
// ---------------------------------------------------------------------------------------------

// d (16 x 8, INT32) = a (16 x 32, INT8, row) * b (32 x 8, INT8, column) + c. With g = lane / 4 and
// t = lane % 4: a = {row g, k 4t..}, {row g + 8, k 4t..}, {row g, k 16 + 4t..}, {row g + 8, ...};
// b = {column g, k 4t..}, {column g, k 16 + 4t..}; d = {g, 2t}, {g, 2t + 1}, {g + 8, 2t}, ....
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1, int c0, int c1,
                                             int c2, int c3) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
}

// The same with d += a * b.
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d (16 x 8, FP32) += a (16 x 16, FP16, row) * b (16 x 8, FP16, column): as above with words of 2.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of halves of which lane i holds elements 2 (i % 4), + 1 of row i / 4.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// ---------------------------------------------------------------------------------------------
// memory
// ---------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
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

__device__ __forceinline__ int load_relaxed(const int* global) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
  return v;
}

__device__ __forceinline__ void store_release(int* global, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(global), "r"(v) : "memory");
}

// ---------------------------------------------------------------------------------------------
// dynamic shared memory, launch
// ---------------------------------------------------------------------------------------------

// A macro, because a function that returns the pointer is compiled to other code.
#define SSDI8_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

template <typename T>
struct NotDeduced {
  using type = T;
};

// Launches `kernel` with `bytes` of dynamic shared memory.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes,
                   cudaStream_t stream, typename NotDeduced<Parameters>::type... arguments) {
  kernel<<<grid, block, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace ssdi8

#endif  // SSDI8_GPU_CUH_
