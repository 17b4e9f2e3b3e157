// Gate, grouped RMSNorm, Hadamard rotation, quantization:
//   v = y * silu(z);  r = v / rms(v in its group) * weight;  q = Q(H_E . r / token_scale).
//
// y (T, E) FP16; z is the first E columns of zxbcdt (T, R) FP16; weight (E) FP32; q (T, E) INT8;
// token_scale (T).
// Of widths with a matrix H_E up to 8192; gated_norm.cu has the others.
// H_E = base (x) Sylvester(2^k) / sqrt(E) with base order 1, 12 or 20 (hadamard.py), applied to a
// row vector: element b * 2^k + s of the result sums base[b', b] * (+-1) * r over all b', s'.
//
// One block per token, 8 values per thread. The factors of the transform act on different bits of
// the index and commute, so they are taken where the data is:
//   bits 0-2                 in registers, on the 8 contiguous values that a thread loaded;
//   (k - 3) % 3 more bits    by lane exchange;
//   the others               three at a time, through shared memory;
//   the base matrix          last, a thread making a column, with the signs as constants of the
//                            unrolled code (8 or 6 additions per value instead of 20 or 12).
// One pass over memory. Every width has a kernel of its own, so that places in shared memory are
// constants: three quarters of the time of one kernel for all.
//
// Everything is FP32; q may differ from the FP64 reference by 1 LSB near a rounding boundary.

#include <math.h>

#include "../common.cuh"
#include "../rotation/hadamard.cuh"
#include "gated_norm.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kMaxInner = 8192;
constexpr int kMaxGroups = 64;

// z * sigmoid(z) to about 1e-6, which is far below a step of INT8; a third of the instructions.
__device__ __forceinline__ float approximate_silu(float z) {
  return z * rcp_approx(1.0f + ex2_approx(z * -1.4426950408889634f));
}

// One butterfly level over the lane bit `mask`.
__device__ __forceinline__ void transform_lanes(float (&v)[kVector], int mask) {
  const float sign = threadIdx.x & mask ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    v[i] = fmaf(v[i], sign, __shfl_xor_sync(kAllLanes, v[i], mask));
  }
}

// E = kOrder * 2^kPowerBits; kOrder of the base matrix: 1, 12 or 20.
template <int kOrder, int kPowerBits>
struct Width {
  static constexpr int kInner = kOrder << kPowerBits;
  static constexpr int kThreads = (kInner / kVector + kWarp - 1) / kWarp * kWarp;
  static constexpr int kWarps = kThreads / kWarp;
  // As many as 48 registers a thread allow, of 40 without a base matrix.
  static constexpr int kBlocks =
      kThreads > 640 || kThreads < 128 ? 1 : (kOrder == 1 ? 1536 : 1280) / kThreads;
  static constexpr int kSharedFloats = padded(kInner) > kThreads ? padded(kInner) : kThreads;
};

// kAligned: kVector divides the row stride. As a branch it would cost 5 %.
template <int kOrder, int kPowerBits, bool kAligned>
__global__ void __launch_bounds__(Width<kOrder, kPowerBits>::kThreads,
                                  Width<kOrder, kPowerBits>::kBlocks)
    rms_norm_gated_kernel(Ssdi8RmsNormGatedParams p, float root, float inverse_group_size) {
  using W = Width<kOrder, kPowerBits>;
  constexpr int kInner = W::kInner;
  SSDI8_DYNAMIC_SHARED(float, shared);  // kSharedFloats; at first a partial sum per thread
  __shared__ float of_warp_or_group[kMaxGroups];  // sums of warps, or 1 / rms of groups
  __shared__ float tops[W::kWarps];
  const int e0 = threadIdx.x * kVector;
  const bool active = kInner % (kVector * kWarp) == 0 || e0 < kInner;
  const int64_t token = blockIdx.x;

  float v[kVector] = {};
  float4 weight[2] = {};
  float sum = 0.0f;
  if (active) {
    weight[0] = reinterpret_cast<const float4*>(p.weight + e0)[0];
    weight[1] = reinterpret_cast<const float4*>(p.weight + e0)[1];
    const uint4 y_raw =
        *reinterpret_cast<const uint4*>(static_cast<const __half*>(p.y) + token * kInner + e0);
    const __half* z_row = static_cast<const __half*>(p.zxbcdt) + token * p.row_stride + e0;
    const uint4 z_raw = kAligned ? *reinterpret_cast<const uint4*>(z_row) : load_unaligned(z_row);
    const __half2* y = reinterpret_cast<const __half2*>(&y_raw);
    const __half2* z = reinterpret_cast<const __half2*>(&z_raw);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float2 y2 = __half22float2(y[i]), z2 = __half22float2(z[i]);
      v[2 * i] = __fmul_rn(y2.x, approximate_silu(z2.x));
      v[2 * i + 1] = __fmul_rn(y2.y, approximate_silu(z2.y));
      sum += v[2 * i] * v[2 * i] + v[2 * i + 1] * v[2 * i + 1];
    }
  }

  // One group: its 1 / rms is a factor of the result, and the sums of the warps are added at the
  // end. Several: a group is a run of whole threads, which one warp adds.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool one_group = p.ngroups == 1;
  if (one_group) {
    sum = warp_sum(sum);
    if (lane == 0) of_warp_or_group[warp] = sum;
  } else {
    const int threads_per_group = kInner / p.ngroups / kVector;
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int g = warp; g < p.ngroups; g += W::kWarps) {
      float total = 0.0f;
      for (int i = lane; i < threads_per_group; i += kWarp) {
        total += shared[g * threads_per_group + i];
      }
      total = warp_sum(total);
      if (lane == 0) of_warp_or_group[g] = reciprocal_root(fmaf(total, inverse_group_size, p.eps));
    }
    __syncthreads();
    const float rstd = active ? of_warp_or_group[threadIdx.x / threads_per_group] : 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = __fmul_rn(v[i], rstd);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] *= reinterpret_cast<const float*>(weight)[i];
  transform8(v);
  constexpr int kLaneBits = (kPowerBits - 3) % 3;
#pragma unroll
  for (int bit = 0; bit < kLaneBits; ++bit) transform_lanes(v, 1 << bit);
  constexpr int kFirstBit = 3 + kLaneBits;  // done up to here
  constexpr bool kShares = kOrder > 1 || kFirstBit < kPowerBits;
  int e = e0;  // of v[0]; the others follow, or lie kSpread apart
  constexpr int kSpread = kShares ? kInner / kVector : 1;
  if (active && kShares) {
    float4* own = reinterpret_cast<float4*>(shared + padded(e0));
    own[0] = make_float4(v[0], v[1], v[2], v[3]);
    own[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
#pragma unroll
  for (int bit = kFirstBit; bit < kPowerBits; bit += 3) {
    __syncthreads();
    if (!active) continue;
    const int low = threadIdx.x & ((1 << bit) - 1);
    e = (static_cast<int>(threadIdx.x) - low) * kVector + low;
    // Bits of e and of i << bit are apart, so `padded` of their sum is the sum of it.
    float* own = shared + padded(e);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = own[padded(i << bit)];
    transform8(v);
    if (kOrder == 1 && bit + 3 == kPowerBits) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) own[padded(i << bit)] = v[i];
  }

  // All threads. What a result r is quantized by: Q(r * factor * inverse).
  struct Steps {
    float factor;
    float inverse;
  };
  const auto steps = [&](float top) -> Steps {
    top = warp_largest(top);
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    const bool of_warp = lane < W::kWarps;
    float factor = root;
    if (one_group) {
      const float total = warp_sum(of_warp ? of_warp_or_group[lane] : 0.0f);
      factor *= reciprocal_root(fmaf(total, inverse_group_size, p.eps));
    }
    const bool is_static = p.scaling == SSDI8_SCALING_STATIC;
    top = warp_largest(of_warp ? tops[lane] : 0.0f);
    const float scale = is_static ? *p.scale : dynamic_scale(__fmul_rn(top, factor)).step;
    if (threadIdx.x == 0) p.token_scale[token] = scale;
    if (is_static) return {factor, __frcp_rn(scale)};
    return {1.0f, dynamic_scale(top).inverse};
  };
  const auto to_int8 = [&](float r, const Steps& by) {
    return quantize(__fmul_rn(r, by.factor), by.inverse, p.rounding == SSDI8_ROUNDING_HALF_AWAY);
  };
  int8_t* quantized = p.quantized + token * kInner;
  if constexpr (kOrder == 1) {
    const Steps by = steps(largest(v));
    if (!active) return;
    if constexpr (kShares) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        quantized[e + i * kSpread] = static_cast<int8_t>(to_int8(v[i], by));
      }
    } else {
      uint32_t words[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* r = v + 4 * half;
        words[half] =
            pack4(to_int8(r[0], by), to_int8(r[1], by), to_int8(r[2], by), to_int8(r[3], by));
      }
      *reinterpret_cast<uint2*>(quantized + e0) = make_uint2(words[0], words[1]);
    }
  } else {
    __syncthreads();
    constexpr int kPower = 1 << kPowerBits;  // less than threads
    const int column = threadIdx.x;
    float sums[kOrder] = {};
    const float* own = shared + padded(column);
    const auto value = [&](int i) { return own[padded(i * kPower)]; };
    if (column < kPower) base_product(value, sums);
    const Steps by = steps(largest(sums));
    if (column >= kPower) return;
#pragma unroll
    for (int row = 0; row < kOrder; ++row) {
      quantized[row * kPower + column] = static_cast<int8_t>(to_int8(sums[row], by));
    }
  }
}

// Of all widths kOrder * 2^k, k from kPowerBits on, up to kMaxInner.
using Kernel = void (*)(Ssdi8RmsNormGatedParams, float, float);
struct Launch {
  Kernel kernel = nullptr;
  int threads = 0;
  int shared_bytes = 0;
};
template <int kOrder, bool kAligned, int kPowerBits = 3>
Launch launch_of(int d_inner) {
  if constexpr (kOrder << kPowerBits > kMaxInner) {
    return {};
  } else {
    using W = Width<kOrder, kPowerBits>;
    if (d_inner != W::kInner) return launch_of<kOrder, kAligned, kPowerBits + 1>(d_inner);
    return {rms_norm_gated_kernel<kOrder, kPowerBits, kAligned>, W::kThreads,
            W::kSharedFloats * static_cast<int>(sizeof(float))};
  }
}

template <bool kAligned>
Launch launch_of_any(int d_inner) {
  Launch found = launch_of<20, kAligned>(d_inner);  // the widths of the three have none in common
  if (found.kernel == nullptr) found = launch_of<12, kAligned>(d_inner);
  return found.kernel == nullptr ? launch_of<1, kAligned>(d_inner) : found;
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_rms_norm_gated(const Ssdi8RmsNormGatedParams* p, void* stream) {
  using namespace ssdi8;
  const int e = p->d_inner;
  const Launch found =
      p->row_stride % kVector == 0 ? launch_of_any<true>(e) : launch_of_any<false>(e);
  if (found.kernel == nullptr) {
    return launch_gated_norm("rms_norm_gated", gated_norm_of(*p), GatePlace::kBeforeNorm, stream);
  }
  if (p->ngroups <= 0 || p->ngroups > kMaxGroups || e % (p->ngroups * kVector) != 0) {
    return refuse(
        "rms_norm_gated: %d groups (at most %d) do not split d_inner %d into multiples of %d",
        p->ngroups, kMaxGroups, e, kVector);
  }
  if (p->row_stride < e) {
    return refuse("rms_norm_gated: row stride %d does not hold %d columns", p->row_stride, e);
  }
  if (p->tokens < 0) return refuse("rms_norm_gated: tokens %d out of range", p->tokens);
  if (const int code = refuse_token_scaling("rms_norm_gated", p->scaling, p->scale)) return code;
  if (p->tokens == 0) return SSDI8_OK;
  const float root = static_cast<float>(1.0 / sqrt(static_cast<double>(e)));
  const float inverse_group_size = static_cast<float>(p->ngroups) / static_cast<float>(e);
  return check(launch(found.kernel, p->tokens, found.threads, found.shared_bytes,
                      static_cast<cudaStream_t>(stream), *p, root, inverse_group_size),
               "rms_norm_gated");
}

size_t ssdi8_sizeof_rms_norm_gated(void) { return sizeof(Ssdi8RmsNormGatedParams); }
