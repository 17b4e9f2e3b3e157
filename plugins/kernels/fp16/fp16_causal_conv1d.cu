// Convolution and SiLU of the FP16 baseline: as ../conv/causal_conv1d.cu, with B and C in FP16.
//
// A thread owns a channel and a run of tokens, of which it keeps the last rows in registers. The
// thread with a sequence's first run also writes its new state, after reading the old one, so the
// two may be the same memory: no other run reads it. The sum is rounded after each product and each
// addition, in the order of the reference.

#include "../common.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr int kRun = 32;  // tokens

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    fp16_causal_conv1d_kernel(Ssdi8Fp16CausalConv1dParams p) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= p.conv_dim) return;
  const int64_t batch = blockIdx.z;
  const int first = blockIdx.y * kRun, last = min(first + kRun, p.length);
  const __half* input =
      static_cast<const __half*>(p.zxbcdt) + batch * p.length * p.row_stride + p.d_inner + channel;
  const int64_t state_offset = batch * (kWidth - 1) * p.conv_dim + channel;
  const __half* state = static_cast<const __half*>(p.conv_state) + state_offset;
  // Row `t` of the sequence, where rows before the first come from the state.
  const auto row_at = [&](int t) {
    return t < 0 ? state[static_cast<int64_t>(t + kWidth - 1) * p.conv_dim]
                 : input[static_cast<int64_t>(t) * p.row_stride];
  };
  __half window[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth - 1; ++w) window[w] = row_at(first - (kWidth - 1) + w);
  if (first == 0) {
    __half kept[kWidth - 1];
#pragma unroll
    for (int w = 0; w < kWidth - 1; ++w) kept[w] = row_at(p.length - (kWidth - 1) + w);
    __half* state_out = static_cast<__half*>(p.conv_state_out) + state_offset;
#pragma unroll
    for (int w = 0; w < kWidth - 1; ++w) state_out[static_cast<int64_t>(w) * p.conv_dim] = kept[w];
  }
  float taps[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth; ++w) taps[w] = p.weight[channel * kWidth + w];
  const float bias = p.bias[channel];
  // The channel's column of x, B or C.
  const int columns = (p.conv_dim - p.d_inner) / 2;
  const int of_bc = channel - p.d_inner;
  void* tensor = of_bc < 0 ? p.x : of_bc < columns ? p.b : p.c;
  const int width = of_bc < 0 ? p.d_inner : columns;
  const int column = of_bc < 0 ? channel : of_bc < columns ? of_bc : of_bc - columns;
  __half* output = static_cast<__half*>(tensor) + batch * p.length * width + column;
  for (int t = first; t < last; ++t) {
    window[kWidth - 1] = row_at(t);
    float sum = bias;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      sum = __fadd_rn(sum, __fmul_rn(__half2float(window[w]), taps[w]));
    }
    output[static_cast<int64_t>(t) * width] = __float2half_rn(silu(sum));
#pragma unroll
    for (int w = 0; w < kWidth - 1; ++w) window[w] = window[w + 1];
  }
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_fp16_causal_conv1d(const Ssdi8Fp16CausalConv1dParams* p, void* stream) {
  using namespace ssdi8;
  constexpr int kMostGrid = 65535;
  if (p->d_conv < 2 || p->d_conv > 4) {
    return refuse("fp16_causal_conv1d: d_conv %d is not 2, 3 or 4", p->d_conv);
  }
  if (p->d_inner < 1 || p->conv_dim <= p->d_inner || (p->conv_dim - p->d_inner) % 2 != 0 ||
      p->row_stride < p->d_inner + p->conv_dim) {
    return refuse("fp16_causal_conv1d: d_inner %d, conv_dim %d and row_stride %d do not fit",
                  p->d_inner, p->conv_dim, p->row_stride);
  }
  if (p->batch < 0 || p->batch > kMostGrid || p->length < 1 ||
      ceil_div(p->length, kRun) > kMostGrid) {
    return refuse("fp16_causal_conv1d: batch %d or length %d out of range", p->batch, p->length);
  }
  if (p->batch == 0) return SSDI8_OK;
  const dim3 grid(static_cast<unsigned>(ceil_div(p->conv_dim, kThreads)),
                  static_cast<unsigned>(ceil_div(p->length, kRun)),
                  static_cast<unsigned>(p->batch));
  auto* kernel = p->d_conv == 2   ? fp16_causal_conv1d_kernel<2>
                 : p->d_conv == 3 ? fp16_causal_conv1d_kernel<3>
                                  : fp16_causal_conv1d_kernel<4>;
  return check(launch(kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), *p),
               "fp16_causal_conv1d");
}

size_t ssdi8_sizeof_fp16_causal_conv1d(void) { return sizeof(Ssdi8Fp16CausalConv1dParams); }
