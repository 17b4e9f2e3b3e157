// One token: the recurrence on the unquantized state, one pass over it, 16 bytes per access.

#ifndef SSDI8_SSD_STEP_CUH_
#define SSDI8_SSD_STEP_CUH_

#include <stddef.h>
#include <stdint.h>

#include "../common.cuh"
#include "passing.cuh"

namespace ssdi8 {
namespace ssd {

constexpr int kStepThreads = 128;

struct Step {
  const __half* x;
  const int8_t* b_q;
  const int8_t* c_q;
  const __half* zxbcdt;
  const void* ssm_state;
  const float* dt_bias;
  const float* a_rate;
  const float* d_skip;
  const float* b_scale;
  const float* c_scale;
  __half* y;
  void* ssm_state_out;
  int nheads;
  int headdim;
  int ngroups;
  int row_stride;
  int dt_column;
  float dt_min;
  float dt_max;
};

// A row of N values takes N / 8 lanes; a warp takes kRows sets of rows, all loads first.
template <int kN, int kRows, bool kFp32>
__global__ __launch_bounds__(kStepThreads) void step_kernel(Step p) {
  constexpr int kLanesPerRow = kN / 8;
  constexpr int kRowsPerWarp = 32 / kLanesPerRow;
  constexpr int kBlockRows = kStepThreads / 32 * kRowsPerWarp * kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks_per_head = p.headdim / kBlockRows;
  const int bh = blockIdx.x / blocks_per_head;
  const int b = bh / p.nheads, h = bh % p.nheads, group = h / (p.nheads / p.ngroups);
  const int first =
      blockIdx.x % blocks_per_head * kBlockRows + warp * kRowsPerWarp * kRows + lane / kLanesPerRow;
  const int column = lane % kLanesPerRow * 8;

  float state[kRows][8];
  float x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const size_t row = size_t(bh) * p.headdim + first + r * kRowsPerWarp;
    load_state8(p.ssm_state, row * kN + column, kFp32, state[r]);
    x[r] = __half2float(p.x[row]);
  }
  const size_t bn = (size_t(b) * p.ngroups + group) * kN + column;
  const int2 b_bits = *reinterpret_cast<const int2*>(p.b_q + bn);
  const int2 c_bits = *reinterpret_cast<const int2*>(p.c_q + bn);
  const float raw = __half2float(p.zxbcdt[size_t(b) * p.row_stride + p.dt_column + h]);
  const float v = __fadd_rn(raw, p.dt_bias[h]);
  const float softplus = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
  const float dt = fminf(fmaxf(softplus, p.dt_min), p.dt_max);
  const float decay = expf(__fmul_rn(dt, p.a_rate[h]));
  const float b_scale = p.b_scale[group], c_scale = p.c_scale[group], d_skip = p.d_skip[h];
  float b_row[8], c_row[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    b_row[i] = __fmul_rn(static_cast<float>(reinterpret_cast<const int8_t*>(&b_bits)[i]), b_scale);
    c_row[i] = __fmul_rn(static_cast<float>(reinterpret_cast<const int8_t*>(&c_bits)[i]), c_scale);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const size_t row = size_t(bh) * p.headdim + first + r * kRowsPerWarp;
    const float dt_x = __fmul_rn(dt, x[r]);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      state[r][i] = __fadd_rn(__fmul_rn(state[r][i], decay), __fmul_rn(dt_x, b_row[i]));
      sum = fmaf(state[r][i], c_row[i], sum);
    }
    store_state8(p.ssm_state_out, row * kN + column, kFp32, state[r]);
#pragma unroll
    for (int offset = kLanesPerRow / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (column == 0) p.y[row] = __float2half_rn(fmaf(d_skip, x[r], sum));
  }
}

template <int kN>
cudaError_t launch_step(const Ssdi8SsdScanParams& p, cudaStream_t stream) {
  const Step step = {static_cast<const __half*>(p.x),
                     p.b_q,
                     p.c_q,
                     static_cast<const __half*>(p.zxbcdt),
                     p.ssm_state,
                     p.dt_bias,
                     p.a_rate,
                     p.d_skip,
                     p.b_scale,
                     p.c_scale,
                     static_cast<__half*>(p.y),
                     p.ssm_state_out,
                     p.nheads,
                     p.headdim,
                     p.ngroups,
                     p.row_stride,
                     p.dt_column,
                     p.dt_min,
                     p.dt_max};
  // A block stays inside one head.
  constexpr int kOnce = kStepThreads / 32 * (32 / (kN / 8));
  static_assert(16 % kOnce == 0 && 64 % (2 * kOnce) == 0);
  const int rows = p.headdim % (2 * kOnce) == 0 ? 2 : 1;
  auto* kernel = rows == 2 ? (p.state_fp32 ? step_kernel<kN, 2, true> : step_kernel<kN, 2, false>)
                           : (p.state_fp32 ? step_kernel<kN, 1, true> : step_kernel<kN, 1, false>);
  const int blocks = p.batch * p.nheads * (p.headdim / (kOnce * rows));
  return launch(kernel, blocks, kStepThreads, 0, stream, step);
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_STEP_CUH_
