// Gate and grouped RMSNorm in either order, rotation, quantization, for any width:
//   v = y * silu(z),  r = v / rms(v in its group) * weight;
//   or r = y / rms(y in its group) * weight * silu(z);  q = Q(R . r / token_scale).
//
// Tensors as in rms_norm_gated.cu, which is for widths that one Hadamard matrix has and the gate
// first; R here is one matrix or equal ones along the diagonal, see ../rotation/token.cuh.
//
// One block per token. What is normalized waits in shared memory, with the sum of squares of every
// 8 channels; one warp adds those of a group, which is a run of whole eights.

#include "../rotation/token.cuh"
#include "gated_norm.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kMaxGroups = 64;

// rstd[g] = 1 / rms of group g, from sums of eights. All threads; ends with a barrier.
__device__ __forceinline__ void reciprocal_rms(const float* sums, int eights, int ngroups,
                                               float eps, float* rstd) {
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int g = threadIdx.x / kWarp; g < ngroups; g += blockDim.x / kWarp) {
    float total = 0.0f;
    for (int i = lane; i < eights; i += kWarp) total += sums[g * eights + i];
    total = warp_sum(total);
    if (lane == 0) rstd[g] = reciprocal_root(fmaf(total, 1.0f / (eights * kVector), eps));
  }
  __syncthreads();
}

template <int kBase, GatePlace kGate>
__global__ void __launch_bounds__(kTokenThreads)
    gated_norm_kernel(GatedNorm p, TokenRotation rotation, TokenOutput out) {
  SSDI8_DYNAMIC_SHARED(float, shared);
  __shared__ float rstd[kMaxGroups];
  float* sums = shared + rotation.shared_floats();
  const int64_t token = blockIdx.x;
  const int stride = blockDim.x * kVector, group_width = p.width / p.ngroups;
  const __half* y_row = static_cast<const __half*>(p.y) + token * p.width;
  const __half* z_row = static_cast<const __half*>(p.zxbcdt) + token * p.row_stride;
  const bool aligned = p.row_stride % kVector == 0;
  const auto multiply_by_gate = [&](int e0, float(&v)[kVector]) {
    float z[kVector];
    load_channels(z_row + e0, aligned, z);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = __fmul_rn(v[i], silu(z[i]));
  };

  for (int e0 = threadIdx.x * kVector; e0 < p.width; e0 += stride) {
    float v[kVector];
    load_channels(y_row + e0, true, v);
    if constexpr (kGate == GatePlace::kBeforeNorm) multiply_by_gate(e0, v);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += v[i] * v[i];
    sums[e0 / kVector] = sum;
    store_shared(shared + padded(e0), v);
  }
  reciprocal_rms(sums, group_width / kVector, p.ngroups, p.eps, rstd);
  for (int e0 = threadIdx.x * kVector; e0 < p.width; e0 += stride) {
    const float factor = rstd[e0 / group_width];
    float v[kVector];
    load_shared(shared + padded(e0), v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], factor), p.weight[e0 + i]);
    if constexpr (kGate == GatePlace::kBehindNorm) multiply_by_gate(e0, v);
    put_channels(shared, e0, rotation, v);
  }
  rotate_token<kBase>(shared, rotation);
  quantize_token(shared, rotation, out, token);
}

template <GatePlace kGate>
auto* kernel_of(int base) {
  return base == 20   ? gated_norm_kernel<20, kGate>
         : base == 12 ? gated_norm_kernel<12, kGate>
                      : gated_norm_kernel<1, kGate>;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int launch_gated_norm(const char* op, const GatedNorm& p, GatePlace gate, void* stream) {
  TokenRotation rotation;
  if (const int code = make_rotation(op, p.width, SSDI8_ROTATION_FULL, &rotation)) return code;
  if (p.ngroups <= 0 || p.ngroups > kMaxGroups || p.width % (p.ngroups * kVector) != 0) {
    return refuse("%s: %d groups (at most %d) do not split d_inner %d into multiples of %d", op,
                  p.ngroups, kMaxGroups, p.width, kVector);
  }
  if (p.row_stride < p.width) {
    return refuse("%s: row stride %d does not hold %d columns", op, p.row_stride, p.width);
  }
  if (p.tokens < 0) return refuse("%s: tokens %d out of range", op, p.tokens);
  if (const int code = refuse_token_scaling(op, p.scaling, p.scale)) return code;
  if (p.tokens == 0) return SSDI8_OK;
  auto* kernel = gate == GatePlace::kBeforeNorm ? kernel_of<GatePlace::kBeforeNorm>(rotation.base)
                                                : kernel_of<GatePlace::kBehindNorm>(rotation.base);
  const size_t bytes = (rotation.shared_floats() + p.width / kVector) * sizeof(float);
  if (const cudaError_t error = grant_shared(kernel, bytes)) return check(error, op);
  return check(launch(kernel, p.tokens, token_threads(p.width), bytes,
                      static_cast<cudaStream_t>(stream), p, rotation, make_output(p)),
               op);
}

}  // namespace ssdi8

int ssdi8_norm_then_gate(const Ssdi8NormThenGateParams* p, void* stream) {
  using namespace ssdi8;
  return launch_gated_norm("norm_then_gate", gated_norm_of(*p), GatePlace::kBehindNorm, stream);
}

size_t ssdi8_sizeof_norm_then_gate(void) { return sizeof(Ssdi8NormThenGateParams); }
