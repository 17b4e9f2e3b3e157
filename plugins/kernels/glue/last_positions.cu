// The last positions of the residual stream: the only ones that need logits.
//
// hidden (B, L, D) FP16 and residual (B, L, D) FP32 to (B, K, D). A block per position.

#include "../common.cuh"

namespace ssdi8 {
namespace {

constexpr int kVector = 8;  // values per 16-byte load of FP16
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    last_positions_kernel(const __half* __restrict__ hidden, const float* __restrict__ residual,
                          __half* __restrict__ hidden_kept, float* __restrict__ residual_kept,
                          int length, int keep, int d_model) {
  const int batch = blockIdx.x / keep, position = length - keep + blockIdx.x % keep;
  const int64_t source = (static_cast<int64_t>(batch) * length + position) * d_model;
  const int64_t target = static_cast<int64_t>(blockIdx.x) * d_model;
  for (int column = threadIdx.x * kVector; column < d_model; column += kThreads * kVector) {
    *reinterpret_cast<uint4*>(hidden_kept + target + column) =
        *reinterpret_cast<const uint4*>(hidden + source + column);
    const float4* from = reinterpret_cast<const float4*>(residual + source + column);
    float4* to = reinterpret_cast<float4*>(residual_kept + target + column);
    to[0] = from[0], to[1] = from[1];
  }
}

}  // namespace
}  // namespace ssdi8

int ssdi8_last_positions(const Ssdi8LastPositionsParams* p, void* stream) {
  using namespace ssdi8;
  if (p->d_model <= 0 || p->d_model % kVector != 0) {
    return refuse("last_positions: d_model %d is not a multiple of %d", p->d_model, kVector);
  }
  if (p->batch < 0 || p->keep < 1 || p->keep > p->length) {
    return refuse("last_positions: batch %d, or keep %d of length %d, out of range", p->batch,
                  p->keep, p->length);
  }
  if (p->batch == 0) return SSDI8_OK;
  return check(launch(last_positions_kernel, p->batch * p->keep, kThreads, 0,
                      static_cast<cudaStream_t>(stream), static_cast<const __half*>(p->hidden),
                      p->residual, static_cast<__half*>(p->hidden_kept), p->residual_kept,
                      p->length, p->keep, p->d_model),
               "last_positions");
}

size_t ssdi8_sizeof_last_positions(void) { return sizeof(Ssdi8LastPositionsParams); }
