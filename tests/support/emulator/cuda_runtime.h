// What the kernels use of CUDA, for a C++ compiler. Approximate functions are the precise ones.

#ifndef SSDI8_TESTS_CUDA_RUNTIME_H_
#define SSDI8_TESTS_CUDA_RUNTIME_H_

#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

// ---------------------------------------------------------------------------------------------
// the language
// ---------------------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One for all fibers, which are one thread of the CPU; the emulator finds them by their segment.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

// ---------------------------------------------------------------------------------------------
// the runtime
// ---------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// ---------------------------------------------------------------------------------------------
// synchronisation and exchange
// ---------------------------------------------------------------------------------------------

void __syncthreads();
void __syncwarp();
bool __any_sync(unsigned mask, bool predicate);
unsigned __reduce_max_sync(unsigned mask, unsigned value);
// The value of lane source(own lane).
uint32_t shuffle_bits(const char* instruction, unsigned mask, uint32_t value, int source);

template <typename T>
T shuffle(const char* instruction, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shuffle_bits(instruction, mask, bits, source);
  memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = threadIdx.x % 32;
  return shuffle("shfl", mask, value, lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return shuffle("shfl.xor", mask, value, threadIdx.x % 32 ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return shuffle("shfl.up", mask, value, lane < distance ? lane : lane - distance);
}

// ---------------------------------------------------------------------------------------------
// memory
// ---------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

// ---------------------------------------------------------------------------------------------
// arithmetic; contraction is off
// ---------------------------------------------------------------------------------------------

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float a) { return log2f(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }

inline float __int_as_float(int v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
inline float __uint_as_float(unsigned v) { return __int_as_float(static_cast<int>(v)); }
inline int __float_as_int(float v) {
  int i;
  memcpy(&i, &v, 4);
  return i;
}
inline unsigned __float_as_uint(float v) { return static_cast<unsigned>(__float_as_int(v)); }

inline float __int2float_rn(int v) { return static_cast<float>(v); }
// A whole number to an integer, saturated; NaN to 0.
inline int whole_to_int(float v) {
  if (isnan(v)) return 0;
  return v >= 0x1p31f ? INT_MAX : v < -0x1p31f ? INT_MIN : static_cast<int>(v);
}
inline int __float2int_rn(float v) { return whole_to_int(nearbyintf(v)); }
inline int __float2int_rz(float v) { return whole_to_int(truncf(v)); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned select) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned word = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = select >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // the sign alone
    word |= byte << 8 * i;
  }
  return word;
}

#endif  // SSDI8_TESTS_CUDA_RUNTIME_H_
