// Residual add and RMSNorm of the FP16 baseline:
//   residual_out = residual + hidden;  normed = FP16(residual_out * rstd * weight).
//
// hidden and normed (T, D) FP16, residual and residual_out (T, D), weight (D) FP32. A block per
// token; a thread reads back what it wrote itself.

#include "../common.cuh"
#include "block_sum.cuh"

namespace ssdi8 {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    fp16_rms_norm_kernel(const __half* __restrict__ hidden, const float* residual,
                         const float* __restrict__ weight, float* residual_out,
                         __half* __restrict__ normed, int d_model, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * d_model;
  float sum = 0.0f;
  for (int column = threadIdx.x; column < d_model; column += kThreads) {
    const float v = residual[row + column] + __half2float(hidden[row + column]);
    residual_out[row + column] = v;
    sum = fmaf(v, v, sum);
  }
  const float mean = block_sum<kThreads>(sum) / static_cast<float>(d_model);
  const float rstd = reciprocal_root(mean + eps);
  for (int column = threadIdx.x; column < d_model; column += kThreads) {
    normed[row + column] =
        __float2half_rn(__fmul_rn(__fmul_rn(residual_out[row + column], rstd), weight[column]));
  }
}

}  // namespace
}  // namespace ssdi8

int ssdi8_fp16_rms_norm(const Ssdi8Fp16RmsNormParams* p, void* stream) {
  using namespace ssdi8;
  if (p->d_model < 1 || p->tokens < 0) {
    return refuse("fp16_rms_norm: d_model %d or tokens %d out of range", p->d_model, p->tokens);
  }
  if (p->tokens == 0) return SSDI8_OK;
  return check(
      launch(fp16_rms_norm_kernel, p->tokens, kThreads, 0, static_cast<cudaStream_t>(stream),
             static_cast<const __half*>(p->hidden), p->residual, p->weight, p->residual_out,
             static_cast<__half*>(p->normed), p->d_model, p->eps),
      "fp16_rms_norm");
}

size_t ssdi8_sizeof_fp16_rms_norm(void) { return sizeof(Ssdi8Fp16RmsNormParams); }
