// SSD of the FP16 baseline, by its recurrence, token after token:
//   R = exp(A dt) R + dt x B;  y = C . R + D x,  dt = clamp(softplus(dt_raw + dt_bias)).
//
// x (B, L, H * P), B and C (B, L, G * N) FP16; the state (B, H, P, N) FP16 or FP32 is kept in
// registers: a row of N values takes N / 8 lanes. State and sums are FP32. The state that follows
// may be the memory of the one before. A prompt takes as many steps as it has tokens: the matrix
// form of ../ssd is what this is compared with in speed.

#include "../common.cuh"
#include "../ssd/passing.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kThreads = 128;
template <int kN>
constexpr int kBlockRows = kThreads / (kN / 8);

__device__ __forceinline__ void load_halves(const __half* p, float (&v)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

template <int kN>
__global__ void __launch_bounds__(kThreads) fp16_ssd_scan_kernel(Ssdi8Fp16SsdScanParams p) {
  constexpr int kLanes = kN / 8;  // of a row
  const int blocks_per_head = p.headdim / kBlockRows<kN>;
  const int bh = blockIdx.x / blocks_per_head;
  const int b = bh / p.nheads, h = bh % p.nheads, group = h / (p.nheads / p.ngroups);
  const int row = blockIdx.x % blocks_per_head * kBlockRows<kN> + threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * 8;
  const int64_t state_offset = (static_cast<int64_t>(bh) * p.headdim + row) * kN + column;
  const float bias = p.dt_bias[h], rate = p.a_rate[h], skip = p.d_skip[h];

  float state[8];
  ssd::load_state8(p.ssm_state, state_offset, p.state_fp32, state);
  for (int t = 0; t < p.length; ++t) {
    const int64_t token = static_cast<int64_t>(b) * p.length + t;
    const int64_t x_offset = (token * p.nheads + h) * p.headdim + row;
    const int64_t bc_offset = (token * p.ngroups + group) * kN + column;
    const float x = __half2float(static_cast<const __half*>(p.x)[x_offset]);
    float b_row[8], c_row[8];
    load_halves(static_cast<const __half*>(p.b) + bc_offset, b_row);
    load_halves(static_cast<const __half*>(p.c) + bc_offset, c_row);
    const __half raw = static_cast<const __half*>(p.zxbcdt)[token * p.row_stride + p.dt_column + h];
    const float v = __fadd_rn(__half2float(raw), bias);
    const float softplus = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
    const float dt = fminf(fmaxf(softplus, p.dt_min), p.dt_max);
    const float decay = expf(__fmul_rn(dt, rate)), dt_x = __fmul_rn(dt, x);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      state[i] = fmaf(state[i], decay, __fmul_rn(dt_x, b_row[i]));
      sum = fmaf(state[i], c_row[i], sum);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (column == 0) static_cast<__half*>(p.y)[x_offset] = __float2half_rn(fmaf(skip, x, sum));
  }
  ssd::store_state8(p.ssm_state_out, state_offset, p.state_fp32, state);
}

template <int kN>
cudaError_t launch_scan(const Ssdi8Fp16SsdScanParams& p, cudaStream_t stream) {
  const int blocks = p.batch * p.nheads * (p.headdim / kBlockRows<kN>);
  return launch(fp16_ssd_scan_kernel<kN>, blocks, kThreads, 0, stream, p);
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_fp16_ssd_scan(const Ssdi8Fp16SsdScanParams* p, void* stream) {
  using namespace ssdi8;
  constexpr int kRowStep = kBlockRows<64>;  // the largest
  if (p->d_state != 64 && p->d_state != 128 && p->d_state != 256) {
    return refuse("fp16_ssd_scan: d_state %d is not 64, 128 or 256", p->d_state);
  }
  if (p->headdim < 1 || p->headdim % kRowStep != 0) {
    return refuse("fp16_ssd_scan: headdim %d is not a multiple of %d", p->headdim, kRowStep);
  }
  if (p->ngroups < 1 || p->nheads < 1 || p->nheads % p->ngroups != 0) {
    return refuse("fp16_ssd_scan: nheads %d is not a multiple of ngroups %d", p->nheads,
                  p->ngroups);
  }
  if (p->batch < 0 || p->length < 1 || p->dt_column < 0 ||
      p->row_stride < p->dt_column + p->nheads) {
    return refuse("fp16_ssd_scan: batch %d, length %d or columns out of range", p->batch,
                  p->length);
  }
  if (p->batch == 0) return SSDI8_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return check(p->d_state == 64    ? launch_scan<64>(*p, on)
               : p->d_state == 128 ? launch_scan<128>(*p, on)
                                   : launch_scan<256>(*p, on),
               "fp16_ssd_scan");
}

size_t ssdi8_sizeof_fp16_ssd_scan(void) { return sizeof(Ssdi8Fp16SsdScanParams); }
