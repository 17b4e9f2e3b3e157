// Up to eight tokens, memory bound. A block takes 16 rows of the weight, its warps share k, weights
// go straight from device memory to registers as the 16-row operand, tokens are the 8 columns.
// Partial sums are INT32, so their order does not matter.

#ifndef SSDI8_LINEAR_VECTOR_CUH_
#define SSDI8_LINEAR_VECTOR_CUH_

#include "../common.cuh"
#include "arguments.cuh"
#include "w4.cuh"

namespace ssdi8 {
namespace linear {

constexpr int kVectorTokens = 8;
constexpr int kVectorRows = 16;
constexpr int kVectorMaxWarps = 8;

// With integer scales products are summed over a group before they are scaled. Of a segment of 128
// k lane t holds the 32 from 32 t. If those are of 2 or 4 groups, the columns of the product are
// shared out among these: kGroups x kSetTokens, a token's column being zero in the lanes of other
// groups. So lane t, which gets columns 2t and 2t + 1, scales those by the scale of its own k, and
// nothing is computed twice. Tokens beyond kSetTokens are further sets.
template <Format kFormat, int kGroups, int kSets>
__global__ void __launch_bounds__(kVectorMaxWarps* kWarp, kFormat == kW8 ? 3 : 2)
    vector_kernel(LinearArguments p) {
  constexpr bool kW4 = kFormat != kW8;
  constexpr int kUnroll = kW4 ? 4 / kSets : 5;  // segments in flight per warp
  constexpr int kSetTokens = kVectorTokens / kGroups;
  constexpr int kLaneK = kW4 ? 32 : 16;  // k of a segment per lane: 16 bytes of the weight
  constexpr int kSegment = 4 * kLaneK;
  constexpr int kTokenLoads = kLaneK / 16;
  __shared__ int partial[kVectorMaxWarps * kGroups][kSets * kSetTokens][kVectorRows];

  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int row0 = blockIdx.x * kVectorRows;
  const int rows[2] = {min(row0 + g, p.n_out - 1), min(row0 + g + 8, p.n_out - 1)};
  const int64_t row_bytes = kW4 ? p.n_in / 2 : p.n_in;
  const int8_t* weight[2] = {p.weight + rows[0] * row_bytes, p.weight + rows[1] * row_bytes};
  const int8_t* x[kSets];
  bool has_token[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int token = set * kSetTokens + g % kSetTokens;
    x[set] = p.x + static_cast<int64_t>(min(token, p.tokens - 1)) * p.n_in;
    has_token[set] = token < p.tokens && g / kSetTokens == t * kGroups / 4;
  }

  int acc[kSets][4] = {};
  for (int k0 = warp * kSegment; k0 < p.n_in; k0 += kUnroll * warps * kSegment) {
    uint4 w[kUnroll][2], tokens[kUnroll][kSets][kTokenLoads];
    __half2 sigma[kUnroll][2];
    int scale[kUnroll][2];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int k = k0 + u * warps * kSegment + t * kLaneK;
      const bool valid = k < p.n_in;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        w[u][r] = valid ? load_streaming(weight[r] + (kW4 ? k / 2 : k)) : make_uint4(0, 0, 0, 0);
        [[maybe_unused]] const int index = first_scale(p, rows[r]) + group_of(p, k);
        if constexpr (kFormat == kW4Rounded) sigma[u][r] = load_sigma(p, index);
        if constexpr (kFormat == kW4Integer) scale[u][r] = load_integer_scale(p, index);
      }
#pragma unroll
      for (int i = 0; i < kSets * kTokenLoads; ++i) {
        const int set = i / kTokenLoads, load = i % kTokenLoads;
        tokens[u][set][load] = valid && has_token[set]
                                   ? __ldg(reinterpret_cast<const uint4*>(x[set] + k) + load)
                                   : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint4 a = w[u][0], b = w[u][1];
      if constexpr (kW4) {
        const uint32_t packed[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
        int of_group[kSets][4] = {};
        int (&sum)[kSets][4] = kFormat == kW4Integer ? of_group : acc;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t low[2], high[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if constexpr (kFormat == kW4Integer) {
              sixteenfold_w4(packed[r][i], low[r], high[r]);
            } else {
              expand_w4<true>(packed[r][i], sigma[u][r], low[r], high[r]);
            }
          }
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            const uint4 v = tokens[u][set][i / 2];
            mma_m16n8k32(sum[set], low[0], low[1], high[0], high[1], i % 2 ? v.z : v.x,
                         i % 2 ? v.w : v.y);
          }
        }
        if constexpr (kFormat == kW4Integer) {
#pragma unroll
          for (int i = 0; i < 4 * kSets; ++i) {
            acc[i / 4][i % 4] += (of_group[i / 4][i % 4] >> 4) * scale[u][i % 4 / 2];
          }
        }
      } else {
        const uint4 v = tokens[u][0][0];
        mma_m16n8k32(acc[0], a.x, b.x, a.y, b.y, v.x, v.y);
        mma_m16n8k32(acc[0], a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kSets; ++i) {
    const int column = 2 * t + i % 2, token = i / 4 * kSetTokens + column % kSetTokens;
    partial[warp * kGroups + column / kSetTokens][token][g + i % 4 / 2 * 8] = acc[i / 4][i % 4];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.tokens * kVectorRows; i += blockDim.x) {
    const int token = i / kVectorRows, row = row0 + i % kVectorRows;
    if (row >= p.n_out) continue;
    int sum = 0;
    for (int w = 0; w < warps * kGroups; ++w) sum += partial[w][token][i % kVectorRows];
    p.y[static_cast<int64_t>(token) * p.n_out + row] =
        epilogue(sum, p.scale[row], p.token_scale[token], p.bias[row]);
  }
}

}  // namespace linear
}  // namespace ssdi8

#endif  // SSDI8_LINEAR_VECTOR_CUH_
