// Logits leave in FP32: y (T, V) FP16 to logits (T, V).

#include "../common.cuh"

namespace ssdi8 {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    logits_kernel(const __half* __restrict__ y, float* __restrict__ logits, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) logits[i] = __half2float(y[i]);
}

}  // namespace
}  // namespace ssdi8

int ssdi8_logits(const Ssdi8LogitsParams* p, void* stream) {
  using namespace ssdi8;
  if (p->tokens < 0 || p->vocab_size < 1) {
    return refuse("logits: tokens %d or vocab_size %d out of range", p->tokens, p->vocab_size);
  }
  if (p->tokens == 0) return SSDI8_OK;
  const int64_t count = static_cast<int64_t>(p->tokens) * p->vocab_size;
  return check(
      launch(logits_kernel, static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0,
             static_cast<cudaStream_t>(stream), static_cast<const __half*>(p->y), p->logits, count),
      "logits");
}

size_t ssdi8_sizeof_logits(void) { return sizeof(Ssdi8LogitsParams); }
