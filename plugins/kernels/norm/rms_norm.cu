// Residual add, RMSNorm, quantization:
//   residual_out = residual + hidden;  q = Q(residual_out * rstd / token_scale),
//   rstd = 1 / sqrt(mean(residual_out^2) + eps).
//
// hidden (T, D) FP16, residual and residual_out (T, D) FP32, q (T, D) INT8, token_scale (T), all
// dense. Scaled by the largest value of its token, q does not depend on rstd.
//
// One block per token; a thread keeps 8 consecutive values per round in registers, so memory is
// read once and written once (11 bytes per value). The sum of squares is FP32 in a tree: at most
// 16 values per thread, then lanes, then warps; residual_out is exact, q may differ from FP64 by
// 1 LSB where the product falls within an ulp of a rounding boundary.

#include "../common.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kVector = 8;        // values per 16-byte load of FP16
constexpr int kMaxThreads = 512;  // 8192 / 8 values in two rounds

template <int kRounds>  // vectors per thread
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(const __half* __restrict__ hidden, const float* residual, float* residual_out,
                    int8_t* __restrict__ quantized, float* __restrict__ token_scale,
                    const float* static_scale, int d_model, float inverse_size, float eps,
                    bool half_away) {
  __shared__ float warp_sums[kMaxThreads / kWarp], warp_tops[kMaxThreads / kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * d_model;
  float values[kRounds][kVector];
  float sum = 0.0f, top = 0.0f;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int column = (round * blockDim.x + threadIdx.x) * kVector;
    if (column >= d_model) continue;
    const uint4 raw = *reinterpret_cast<const uint4*>(hidden + row + column);
    const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
    const float4* source = reinterpret_cast<const float4*>(residual + row + column);
    float4* target = reinterpret_cast<float4*>(residual_out + row + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 low = __half22float2(pairs[2 * half]);
      const float2 high = __half22float2(pairs[2 * half + 1]);
      float4 r = source[half];
      r = {r.x + low.x, r.y + low.y, r.z + high.x, r.w + high.y};
      target[half] = r;
      sum += (r.x * r.x + r.y * r.y) + (r.z * r.z + r.w * r.w);
      top = fmaxf(top, fmaxf(fmaxf(fabsf(r.x), fabsf(r.y)), fmaxf(fabsf(r.z), fabsf(r.w))));
      float* v = &values[round][4 * half];
      v[0] = r.x, v[1] = r.y, v[2] = r.z, v[3] = r.w;
    }
  }
  sum = warp_sum(sum);
  top = warp_largest(top);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) {
    warp_sums[threadIdx.x / kWarp] = sum;
    warp_tops[threadIdx.x / kWarp] = top;
  }
  __syncthreads();
  // Every warp adds the partial sums itself: one barrier instead of two.
  const bool of_warp = lane < blockDim.x / kWarp;
  const float rstd =
      reciprocal_root(fmaf(warp_sum(of_warp ? warp_sums[lane] : 0.0f), inverse_size, eps));
  float scale, factor, inverse;  // q = Q(residual_out * factor * inverse)
  if (static_scale != nullptr) {
    scale = *static_scale;
    factor = rstd;
    inverse = __frcp_rn(scale);
  } else {
    top = warp_largest(of_warp ? warp_tops[lane] : 0.0f);
    scale = dynamic_scale(__fmul_rn(top, rstd)).step;
    factor = 1.0f;
    inverse = dynamic_scale(top).inverse;
  }
  if (threadIdx.x == 0) token_scale[blockIdx.x] = scale;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int column = (round * blockDim.x + threadIdx.x) * kVector;
    if (column >= d_model) continue;
    int q[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      q[i] = quantize(__fmul_rn(values[round][i], factor), inverse, half_away);
    }
    *reinterpret_cast<uint2*>(quantized + row + column) =
        make_uint2(pack4(q[0], q[1], q[2], q[3]), pack4(q[4], q[5], q[6], q[7]));
  }
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_rms_norm(const Ssdi8RmsNormParams* p, void* stream) {
  using namespace ssdi8;
  if (p->d_model <= 0 || p->d_model % kVector != 0 || p->d_model > 2 * kMaxThreads * kVector) {
    return refuse("rms_norm: d_model %d is not a multiple of %d up to %d", p->d_model, kVector,
                  2 * kMaxThreads * kVector);
  }
  if (p->tokens < 0) return refuse("rms_norm: tokens %d out of range", p->tokens);
  if (const int code = refuse_token_scaling("rms_norm", p->scaling, p->scale)) return code;
  if (p->tokens == 0) return SSDI8_OK;
  const float* static_scale = p->scaling == SSDI8_SCALING_STATIC ? p->scale : nullptr;
  const int vectors = p->d_model / kVector;
  const int rounds = vectors > kMaxThreads ? 2 : 1;
  const int threads = static_cast<int>(ceil_div(ceil_div(vectors, rounds), kWarp)) * kWarp;
  auto* kernel = rounds == 1 ? rms_norm_kernel<1> : rms_norm_kernel<2>;
  return check(
      launch(kernel, p->tokens, threads, 0, static_cast<cudaStream_t>(stream),
             static_cast<const __half*>(p->hidden), p->residual, p->residual_out, p->quantized,
             p->token_scale, static_scale, p->d_model, 1.0f / static_cast<float>(p->d_model),
             p->eps, p->rounding == SSDI8_ROUNDING_HALF_AWAY),
      "rms_norm");
}

size_t ssdi8_sizeof_rms_norm(void) { return sizeof(Ssdi8RmsNormParams); }
