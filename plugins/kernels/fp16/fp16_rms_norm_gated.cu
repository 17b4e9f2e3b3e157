// Gate and grouped RMSNorm of the FP16 baseline:
//   v = y * silu(z);  normed = FP16(v / rms(v in its group) * weight).
//
// y and normed (T, E) FP16; zxbcdt (T, R) FP16, of which z is the first E columns; weight (E) FP32.
// A block per token and group; v is computed twice, not kept.

#include "../common.cuh"
#include "block_sum.cuh"

namespace ssdi8 {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    fp16_rms_norm_gated_kernel(const __half* __restrict__ y, const __half* __restrict__ zxbcdt,
                               const float* __restrict__ weight, __half* __restrict__ normed,
                               int d_inner, int row_stride, int ngroups, float eps) {
  const int64_t token = blockIdx.x / ngroups;
  const int size = d_inner / ngroups, first = blockIdx.x % ngroups * size;
  const __half* y_row = y + token * d_inner + first;
  const __half* z_row = zxbcdt + token * row_stride + first;
  const auto gated = [&](int i) {
    return __fmul_rn(__half2float(y_row[i]), silu(__half2float(z_row[i])));
  };
  float sum = 0.0f;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const float v = gated(i);
    sum = fmaf(v, v, sum);
  }
  const float mean = block_sum<kThreads>(sum) / static_cast<float>(size);
  const float rstd = reciprocal_root(mean + eps);
  for (int i = threadIdx.x; i < size; i += kThreads) {
    normed[token * d_inner + first + i] =
        __float2half_rn(__fmul_rn(__fmul_rn(gated(i), rstd), weight[first + i]));
  }
}

}  // namespace
}  // namespace ssdi8

int ssdi8_fp16_rms_norm_gated(const Ssdi8Fp16RmsNormGatedParams* p, void* stream) {
  using namespace ssdi8;
  if (p->ngroups < 1 || p->d_inner < 1 || p->d_inner % p->ngroups != 0) {
    return refuse("fp16_rms_norm_gated: d_inner %d is not a multiple of ngroups %d", p->d_inner,
                  p->ngroups);
  }
  if (p->tokens < 0 || p->row_stride < p->d_inner) {
    return refuse("fp16_rms_norm_gated: tokens %d or row_stride %d out of range", p->tokens,
                  p->row_stride);
  }
  if (p->tokens == 0) return SSDI8_OK;
  return check(
      launch(fp16_rms_norm_gated_kernel, p->tokens * p->ngroups, kThreads, 0,
             static_cast<cudaStream_t>(stream), static_cast<const __half*>(p->y),
             static_cast<const __half*>(p->zxbcdt), p->weight, static_cast<__half*>(p->normed),
             p->d_inner, p->row_stride, p->ngroups, p->eps),
      "fp16_rms_norm_gated");
}

size_t ssdi8_sizeof_fp16_rms_norm_gated(void) { return sizeof(Ssdi8Fp16RmsNormGatedParams); }
