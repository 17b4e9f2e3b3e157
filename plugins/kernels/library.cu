// What the library says about itself: version, last error, and the host helpers of common.cuh.

#include <stdarg.h>
#include <stdio.h>

#include "common.cuh"

namespace ssdi8 {
namespace {

thread_local char last_error[512] = "no error";

}  // namespace

int refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return SSDI8_UNSUPPORTED;
}

int check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return SSDI8_OK;
  refuse("%s: %s (%s)", op, cudaGetErrorString(error), cudaGetErrorName(error));
  return SSDI8_CUDA_ERROR;
}

int refuse_token_scaling(const char* op, int scaling, const float* scale) {
  if (scaling == SSDI8_SCALING_DYNAMIC) return SSDI8_OK;
  if (scaling != SSDI8_SCALING_STATIC) return refuse("%s: scaling %d out of range", op, scaling);
  return scale ? SSDI8_OK : refuse("%s: scaling static needs scale", op);
}

cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace ssdi8

int32_t ssdi8_abi_version(void) { return SSDI8_ABI_VERSION; }
const char* ssdi8_last_error(void) { return ssdi8::last_error; }
