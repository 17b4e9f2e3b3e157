// y = FP16(x . weight^T), FP32 accumulation: x (T, In) and weight (Out, In) FP16.
//
// Rows of the weight are the 16-row operand of mma.sync, tokens its 8 columns. A lane takes 8
// consecutive k of its rows, 16 bytes, for two products: which k meet in which product does not
// matter as long as both operands agree. Fragments come straight from global memory, each weight
// once per tile of tokens. One token (decode) is bound by the weight's bytes; several are not as
// fast as with tiles in shared memory. Sums run by ascending 32 k, so they differ from another
// order's in the last bit of FP32.

#include "../common.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kStepK = 32;
constexpr int kWarps = 4;

__device__ __forceinline__ uint4 load_vector(const __half* p) {
  return *reinterpret_cast<const uint4*>(p);
}

// A warp owns 16 kRows rows and 8 kTokens tokens; a block's warps lie along the rows. Rows and
// tokens past the end repeat the last one and are not stored.
template <int kRows, int kTokens>
__global__ void __launch_bounds__(kWarps* kWarp)
    fp16_linear_kernel(const __half* __restrict__ x, const __half* __restrict__ weight,
                       __half* __restrict__ y, int tokens, int n_in, int n_out) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int row0 = (blockIdx.x * kWarps + threadIdx.x / kWarp) * 16 * kRows;
  const int token0 = blockIdx.y * 8 * kTokens;
  if (row0 >= n_out) return;
  const __half* a_rows[kRows][2];
  const __half* b_rows[kTokens];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(row0 + 16 * r + 8 * half + g, n_out - 1);
      a_rows[r][half] = weight + static_cast<int64_t>(row) * n_in + 8 * t;
    }
  }
#pragma unroll
  for (int c = 0; c < kTokens; ++c) {
    const int token = min(token0 + 8 * c + g, tokens - 1);
    b_rows[c] = x + static_cast<int64_t>(token) * n_in + 8 * t;
  }
  float sums[kRows][kTokens][4] = {};
  for (int k = 0; k < n_in; k += kStepK) {
    uint4 a[kRows][2], b[kTokens];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      a[r][0] = load_vector(a_rows[r][0] + k), a[r][1] = load_vector(a_rows[r][1] + k);
    }
#pragma unroll
    for (int c = 0; c < kTokens; ++c) b[c] = load_vector(b_rows[c] + k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kTokens; ++c) {
        mma_m16n8k16(sums[r][c], a[r][0].x, a[r][1].x, a[r][0].y, a[r][1].y, b[c].x, b[c].y);
        mma_m16n8k16(sums[r][c], a[r][0].z, a[r][1].z, a[r][0].w, a[r][1].w, b[c].z, b[c].w);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kTokens; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + 16 * r + 8 * (i / 2) + g, token = token0 + 8 * c + 2 * t + i % 2;
        if (row < n_out && token < tokens) {
          y[static_cast<int64_t>(token) * n_out + row] = __float2half_rn(sums[r][c][i]);
        }
      }
    }
  }
}

template <int kRows, int kTokens>
cudaError_t launch_tiles(const Ssdi8Fp16LinearParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.out_features, 16 * kRows * kWarps)),
                  static_cast<unsigned>(ceil_div(p.tokens, 8 * kTokens)));
  return launch(fp16_linear_kernel<kRows, kTokens>, grid, kWarps * kWarp, 0, stream,
                static_cast<const __half*>(p.x), static_cast<const __half*>(p.weight),
                static_cast<__half*>(p.y), p.tokens, p.in_features, p.out_features);
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_fp16_linear(const Ssdi8Fp16LinearParams* p, void* stream) {
  using namespace ssdi8;
  constexpr int kMostTokens = 65535 * 32;  // of a grid's second axis
  if (p->in_features <= 0 || p->in_features % kStepK != 0) {
    return refuse("fp16_linear: in_features %d is not a multiple of %d", p->in_features, kStepK);
  }
  if (p->out_features < 1 || p->tokens < 0 || p->tokens > kMostTokens) {
    return refuse("fp16_linear: out_features %d or tokens %d out of range", p->out_features,
                  p->tokens);
  }
  if (p->tokens == 0) return SSDI8_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return check(p->tokens <= 8 ? launch_tiles<1, 1>(*p, on) : launch_tiles<2, 4>(*p, on),
               "fp16_linear");
}

size_t ssdi8_sizeof_fp16_linear(void) { return sizeof(Ssdi8Fp16LinearParams); }
