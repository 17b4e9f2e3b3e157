// INT8 linear layers: y = FP16(FP32(x . weight^T) * scale[row] * token_scale[token] + bias[row]),
// the sum exact.
//
// x (T, In) INT8; y (T, Out) FP16; token_scale (T), scale, bias (Out) FP32. The weight is
//   W8: (Out, In) INT8;
//   W4: (Out, In / 2), byte 4i + j plus 128 = 16 * q4[8i + 4 + j] + q4[8i + j], expanded on the fly
//       to the INT8 value round_half_even((q4 - 8) * group_scale[row, k / group_size]), saturated,
//       or, with integer scales, (q4 - 8) * group_scale, which is INT8 as it is.
//
// The order of k inside a product is free, as long as both operands use the same one. Here the lane
// with t = lane % 4 takes 16 consecutive k of every 64, for both operands. So a fragment for two
// m16n8k32 is one 16-byte load per row, from shared or from device memory alike: eight lanes read
// 128 contiguous bytes (no bank conflict, no swizzle, no ldmatrix), and 8 packed bytes of W4 are
// exactly the 16 weights that the lane needs. Rows of the weight are the 16-row operand: its four
// registers mix rows, so it is assembled once per step, while the 8-column operand (tokens), which
// every product changes, is used in the registers that the load filled.
//
// Variants
//   vector (T <= 8): memory bound. A block takes 16 rows of the weight, its warps share k, weights
//     go straight from device memory to registers as the 16-row operand, tokens are the 8 columns.
//     Partial sums are INT32, so their order does not matter.
//   tiles of tokens x rows (64 x 128, 128 x 128, 128 x 256): compute bound. Four stages of 64 k by
//     cp.async; a warp owns all tokens of the tile and 32 rows, so that a W4 weight is expanded
//     once per tile. The pipeline runs on across tiles: while one is written, the next one loads.
//     Blocks stay (grid = what fits) and walk the tiles so that 1024 rows of the weight serve all
//     tokens before the next 1024 are read: on a board the weight does not fit the L2 cache.
//
// Other tiles that were tried, with their times: benchmarks/README.md.

#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code: W4
// ---------------------------------------------------------------------------------------------

__host__ __device__ constexpr uint32_t half2_bits(uint32_t half) { return half << 16 | half; }

__device__ __forceinline__ __half2 as_half2(uint32_t bits) {
  return reinterpret_cast<const __half2&>(bits);
}

__device__ __forceinline__ uint32_t as_bits(__half2 v) {
  return reinterpret_cast<const uint32_t&>(v);
}

// Eight weights in a word of W4: the low nibbles are those of k 0-3, the high ones those of k 4-7,
// the latter with their highest bit flipped by the offset 128.

// Two nibbles that sit in bits 0-3 and 16-19 of `word` to their INT8 weights in bytes 0 and 2.
// `bias` makes the half 1024 + q4 of a nibble (and mends the sign bit that the offset 128 flips in
// high nibbles). (q4 - 8) * sigma + 1536 is rounded once, to a whole number, since halves from 1024
// to 2048 are whole: the round-half-even of the format; its low byte is the INT8 value.
template <bool kSaturate>
__device__ __forceinline__ uint32_t expand_pair(uint32_t word, uint32_t bias, __half2 sigma) {
  const __half2 q4 = as_half2((word & 0x000f000fu) ^ bias);
  const __half2 centred = __hsub2(q4, as_half2(half2_bits(0x6408)));  // 1032
  __half2 v = __hfma2(centred, sigma, as_half2(half2_bits(0x6600)));  // 1536
  if constexpr (kSaturate) {
    v = __hmin2(v, as_half2(half2_bits(0x6600 + 127)));
    v = __hmax2(v, as_half2(half2_bits(0x6600 - 128)));
  }
  return as_bits(v);
}

// Whether a weight of the group can leave the INT8 range: -8 * sigma below -128.
__device__ __forceinline__ bool saturates(__half2 sigma) {
  return __hgt(__habs(__low2half(sigma)), __ushort_as_half(0x4bf0));  // 15.875
}

// The eight weights to INT8: k 0-3 in `low`, k 4-7 in `high`.
template <bool kSaturate>
__device__ __forceinline__ void expand_w4(uint32_t packed, __half2 sigma, uint32_t& low,
                                          uint32_t& high) {
  constexpr uint32_t kLow = half2_bits(0x6400), kHigh = half2_bits(0x6408);
  const uint32_t k02 = expand_pair<kSaturate>(packed, kLow, sigma);
  const uint32_t k46 = expand_pair<kSaturate>(packed >> 4, kHigh, sigma);
  const uint32_t k13 = expand_pair<kSaturate>(packed >> 8, kLow, sigma);
  const uint32_t k57 = expand_pair<kSaturate>(packed >> 12, kHigh, sigma);
  low = __byte_perm(k02, k13, 0x6240);
  high = __byte_perm(k46, k57, 0x6240);
}

// An integer scale s from -15 to 16, ready for expand_w4: multiplies four nibbles at once, since no
// product plus 128 - 8 s leaves its byte. With s < 0, (q4 - 8) s is ((15 - q4) - 7) |s|, and
// `flip` makes 15 - q4 of q4.
struct IntegerScale {
  uint32_t scale;
  uint32_t offset;
  uint32_t flip;
};

__device__ __forceinline__ IntegerScale integer_scale(int scale) {
  const uint32_t size = abs(scale), zero = scale < 0 ? 0x07070707u : 0x08080808u;
  return {size, 0x80808080u - size * zero, scale < 0 ? 0x0f0f0f0fu : 0u};
}

__device__ __forceinline__ void expand_w4(uint32_t packed, const IntegerScale& s, uint32_t& low,
                                          uint32_t& high) {
  const uint32_t q0123 = (packed & 0x0f0f0f0fu) ^ s.flip;
  const uint32_t q4567 = ((packed >> 4) & 0x0f0f0f0fu) ^ (s.flip ^ 0x08080808u);
  low = (q0123 * s.scale + s.offset) ^ 0x80808080u;
  high = (q4567 * s.scale + s.offset) ^ 0x80808080u;
}

// The eight values 16 * (q4 - 8) as INT8: nothing but bits in their place.
__device__ __forceinline__ void sixteenfold_w4(uint32_t packed, uint32_t& low, uint32_t& high) {
  low = ((packed << 4) & 0xf0f0f0f0u) ^ 0x80808080u;
  high = packed & 0xf0f0f0f0u;
}

// ---------------------------------------------------------------------------------------------
// device code: common to the variants
// ---------------------------------------------------------------------------------------------

enum Format { kW8, kW4Rounded, kW4Integer };  // W4 by its group scales: FP16 or INT8

struct LinearArguments {
  const int8_t* x;
  const float* token_scale;
  const int8_t* weight;     // W8, or W4 packed
  const void* group_scale;  // W4 only: FP16, or INT8
  const float* scale;
  const float* bias;
  __half* y;
  int tokens;
  int n_in;
  int n_out;
  int group_shift;  // log2 of the group size
};

__device__ __forceinline__ __half epilogue(int acc, float scale, float token_scale, float bias) {
  const float scaled = __fmul_rn(__fmul_rn(__int2float_rn(acc), scale), token_scale);
  return __float2half_rn(__fadd_rn(scaled, bias));
}

// Where group_scale has that of the first k of a row, and how much further that of `k` is.
__device__ __forceinline__ int first_scale(const LinearArguments& p, int row) {
  return row * (p.n_in >> p.group_shift);
}
__device__ __forceinline__ int group_of(const LinearArguments& p, int k) {
  return min(k >> p.group_shift, (p.n_in >> p.group_shift) - 1);
}

__device__ __forceinline__ __half2 load_sigma(const LinearArguments& p, int index) {
  return __half2half2(static_cast<const __half*>(p.group_scale)[index]);
}

__device__ __forceinline__ int load_integer_scale(const LinearArguments& p, int index) {
  return static_cast<const int8_t*>(p.group_scale)[index];
}

// ---------------------------------------------------------------------------------------------
// device code: vector variant
// ---------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------
// device code: tiles
// ---------------------------------------------------------------------------------------------

constexpr int kStepK = 64;
constexpr int kStages = 4;     // a power of 2
constexpr int kWarpRows = 32;  // rows of the weight per warp: two m16 fragments
constexpr int kRowGroups = kWarpRows / 8;
constexpr int kRasterRows = 1024;

// A tile of kTileTokens x kTileRows; a block has a thread per row. kBlocks share a multiprocessor.
template <int kTileTokens, int kTileRows, int kBlocks>
struct Tile {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kRows = kTileRows;
  static constexpr int kThreads = kRows / kWarpRows * kWarp;
  static constexpr int kBlocksPerSm = kBlocks;
  static constexpr int kTokenBytes = kTokens * kStepK;  // of a stage
  template <bool kW4>
  static constexpr int kWeightBytes = kRows * (kW4 ? kStepK / 2 : kStepK);
  template <bool kW4>
  static constexpr int kSharedBytes = kStages * (kTokenBytes + kWeightBytes<kW4>);
};
using SmallTile = Tile<64, 128, 3>;
using MediumTile = Tile<128, 128, 2>;
using LargeTile = Tile<128, 256, 1>;
static_assert(LargeTile::kSharedBytes<false> <= kMaxSharedBytes);

template <class T>
__host__ __device__ int tile_count(const LinearArguments& p) {
  return static_cast<int>(ceil_div(p.tokens, T::kTokens) * ceil_div(p.n_out, T::kRows));
}

// First token and first row of tile `index`; past the last tile, of some tile.
template <class T>
__device__ __forceinline__ void locate(const LinearArguments& p, int index, int& token0,
                                       int& row0) {
  constexpr int kColumns = kRasterRows / T::kRows;
  const int tiles_m = (p.tokens + T::kTokens - 1) / T::kTokens;
  const int tiles_n = (p.n_out + T::kRows - 1) / T::kRows;
  const int raster = index / (kColumns * tiles_m);
  const int within = index - raster * kColumns * tiles_m;
  const int columns = max(min(kColumns, tiles_n - raster * kColumns), 1);
  token0 = within / columns * T::kTokens;
  row0 = (raster * kColumns + within % columns) * T::kRows;
}

// Word j of lane s goes to lane j as word s, within each quad of lanes.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? w[j] : w[j + 1], 1);
    (odd ? w[j] : w[j + 1]) = got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? w[j] : w[j + 2], 2);
    (upper ? w[j] : w[j + 2]) = got;
  }
}

template <Format kFormat, class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm) tile_kernel(LinearArguments p) {
  constexpr bool kW4 = kFormat != kW8;
  constexpr int kPairs = T::kTokens / 16;  // of n8 fragments of tokens
  constexpr int kTurn = kPairs / 2;        // where in a step the next one is fetched
  constexpr int kAhead = 2;                // enough that a barrier does not expose a load
  static_assert(kPairs % 4 == 0 && kPairs - kTurn >= kAhead);
  constexpr int kWeightRow = kW4 ? kStepK / 2 : kStepK;
  constexpr int kWeightUnits = kWeightRow / 16;  // 16-byte units per row of a stage
  constexpr int kTokenLoads = T::kTokenBytes / 16 / T::kThreads;
  constexpr int kWeightLoads = T::template kWeightBytes<kW4> / 16 / T::kThreads;
  SSDI8_DYNAMIC_SHARED(__align__(128) int8_t, shared);
  int8_t* shared_weight = shared + kStages * T::kTokenBytes;

  const int warp = threadIdx.x / kWarp;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int steps = (p.n_in + kStepK - 1) / kStepK;
  const int tiles = tile_count<T>(p);

  // Producer. Tokens and rows past the end repeat the last one (never stored); k past the end, and
  // all that follows the last tile, is zero. A step is loaded in parts, a few per pair of token
  // fragments: in one burst they would hold up the loads of fragments behind them.
  int load_tile = blockIdx.x, load_k = 0, load_stage = 0;
  uint32_t token_offset[kTokenLoads], weight_offset[kWeightLoads];
  const int token_unit = threadIdx.x % 4 * 16;
  const int weight_unit = threadIdx.x % kWeightUnits * 16;
  const auto locate_loads = [&] {
    int token0, row0;
    locate<T>(p, load_tile, token0, row0);
#pragma unroll
    for (int i = 0; i < kTokenLoads; ++i) {
      const int token = token0 + (threadIdx.x + i * T::kThreads) / 4;
      token_offset[i] = static_cast<uint32_t>(min(token, p.tokens - 1)) * p.n_in + token_unit;
    }
#pragma unroll
    for (int i = 0; i < kWeightLoads; ++i) {
      const int row = row0 + (threadIdx.x + i * T::kThreads) / kWeightUnits;
      weight_offset[i] =
          static_cast<uint32_t>(min(row, p.n_out - 1)) * (kW4 ? p.n_in / 2 : p.n_in) + weight_unit;
    }
  };
  const auto load_part = [&](int part) {
    const uint32_t to = threadIdx.x * 16;
    if (part < kTokenLoads) {
      cp_async_16(
          shared_address(shared) + load_stage * T::kTokenBytes + part * T::kThreads * 16 + to,
          p.x + load_k * kStepK + token_offset[part % kTokenLoads],
          load_tile < tiles && load_k * kStepK + token_unit < p.n_in);
    } else if (part < kTokenLoads + kWeightLoads) {
      const int i = part - kTokenLoads;
      cp_async_16(
          shared_address(shared_weight) + load_stage * T::template kWeightBytes<kW4> +
              i * T::kThreads * 16 + to,
          p.weight + load_k * kWeightRow + weight_offset[i % kWeightLoads],
          load_tile < tiles && load_k * kWeightRow + weight_unit < (kW4 ? p.n_in / 2 : p.n_in));
    }
  };
  constexpr int kParts = (kTokenLoads + kWeightLoads + kPairs - 1) / kPairs;  // per pair
  const auto load_parts = [&](int pair) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) load_part(pair * kParts + i);
  };
  const auto finish_load = [&] {
    cp_async_commit();
    load_stage = (load_stage + 1) & (kStages - 1);
    if (++load_k == steps) {
      load_k = 0;
      load_tile += gridDim.x;
      locate_loads();
    }
  };

  // Consumer: `weights` holds the m16 operands of the current step, by fragment and half of k;
  // `incoming` the next one's, by row (g, g + 8, g + 16, g + 24) as they come from memory.
  uint32_t weights[kRowGroups / 2][2][4], incoming[kRowGroups][4];
  __half2 sigma[kRowGroups];
  IntegerScale scales[kRowGroups];
  int scale_offset[kRowGroups];  // of the rows' first group
  uint4 tokens[4][2];            // a ring, filled kAhead pairs before use
  const auto load_tokens = [&](uint4(&to)[2], int stage, int pair) {
    const int8_t* from = shared + stage * T::kTokenBytes + (pair * 16 + g) * kStepK + 16 * t;
    to[0] = *reinterpret_cast<const uint4*>(from);
    to[1] = *reinterpret_cast<const uint4*>(from + 8 * kStepK);
  };
  const auto load_weights = [&](int stage) {
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) {
      const int8_t* from = shared_weight + stage * T::template kWeightBytes<kW4> +
                           (warp * kWarpRows + j * 8 + g) * kWeightRow;
      if constexpr (kW4) {
        const uint2 v = *reinterpret_cast<const uint2*>(from + 8 * t);
        incoming[j][0] = v.x, incoming[j][2] = v.y;
      } else {
        const uint4 v = *reinterpret_cast<const uint4*>(from + 16 * t);
        incoming[j][0] = v.x, incoming[j][1] = v.y, incoming[j][2] = v.z, incoming[j][3] = v.w;
      }
    }
  };
  const auto locate_scales = [&](int row0) {
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) {
      scale_offset[j] = first_scale(p, min(row0 + warp * kWarpRows + j * 8 + g, p.n_out - 1));
    }
  };
  const auto load_group_scales = [&](int step) {
    const int group = group_of(p, step * kStepK + 16 * t);
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) {
      const int index = scale_offset[j] + group;
      if constexpr (kFormat == kW4Rounded) sigma[j] = load_sigma(p, index);
      if constexpr (kFormat == kW4Integer) scales[j] = integer_scale(load_integer_scale(p, index));
    }
  };
  // Expands in place. With integer scales a few words after each pair of token fragments: all warps
  // pass the barrier together, so in one burst the matrix units would wait for it.
  constexpr int kWords = 2 * kRowGroups;  // of eight weights, of a lane in a step
  constexpr int kWordsPerPair = kWords / (kPairs - kTurn);
  static_assert(kWords % (kPairs - kTurn) == 0);
  const auto expand_words = [&](int first, int count) {
#pragma unroll
    for (int i = first; i < first + count; ++i) {
      uint32_t* w = incoming[i / 2] + i % 2 * 2;
      expand_w4(w[0], scales[i / 2], w[0], w[1]);
      computed_here(w[0]);
      computed_here(w[1]);
    }
  };
  // Weights of scales that cannot saturate skip the clamps, a third of the work.
  const auto expand_rounded = [&] {
    bool clamp = false;
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) clamp |= saturates(sigma[j]);
    const auto expand_all = [&](auto saturate) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        uint32_t* w = incoming[i / 2] + i % 2 * 2;
        expand_w4<saturate>(w[0], sigma[i / 2], w[0], w[1]);
      }
    };
    if (__any_sync(kAllLanes, clamp)) {
      expand_all(std::true_type());
    } else {
      expand_all(std::false_type());
    }
  };
  const auto advance = [&] {
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[j / 2][i / 2][i % 2 * 2 + j % 2] = incoming[j][i];
    }
  };

  locate_loads();
  for (int step = 0; step < kStages - 2; ++step) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) load_parts(i);
    finish_load();
  }
#pragma unroll
  for (int i = kTurn; i < kPairs; ++i) load_parts(i);
  int tile = blockIdx.x, step = 0, stage = 0, token0, row0;
  locate<T>(p, tile, token0, row0);
  if constexpr (kW4) {
    locate_scales(row0);
    load_group_scales(0);
  }
  cp_async_wait<kStages - 3>();
  __syncthreads();
  load_weights(0);
  if constexpr (kFormat == kW4Integer) expand_words(0, kWords);
  if constexpr (kFormat == kW4Rounded) expand_rounded();
  advance();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_tokens(tokens[i], 0, i);

  int acc[kPairs][2][kRowGroups / 2][4] = {};
  while (tile < tiles) {
    const bool last = step + 1 == steps;
    const int next_stage = (stage + 1) & (kStages - 1);
    int next_token0 = token0, next_row0 = row0;
    if (last) {
      locate<T>(p, tile + gridDim.x, next_token0, next_row0);
      if constexpr (kW4) locate_scales(next_row0);
    }
    if constexpr (kW4) load_group_scales(last ? 0 : step + 1);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i == kTurn) {
        // The next step has landed, and every warp has left the stage that is filled now.
        finish_load();
        cp_async_wait<kStages - 3>();
        __syncthreads();
        load_weights(next_stage);
      }
      load_parts(i);
      load_tokens(tokens[(i + kAhead) % 4], i + kAhead < kPairs ? stage : next_stage,
                  (i + kAhead) % kPairs);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint4 v = tokens[i % 4][n];
#pragma unroll
          for (int f = 0; f < kRowGroups / 2; ++f) {
            const uint32_t (&w)[4] = weights[f][half];
            mma_m16n8k32(acc[i][n][f], w[0], w[1], w[2], w[3], half ? v.z : v.x, half ? v.w : v.y);
          }
        }
      }
      if constexpr (kFormat == kW4Integer) {
        if (i >= kTurn) expand_words((i - kTurn) * kWordsPerPair, kWordsPerPair);
      }
    }
    if constexpr (kFormat == kW4Rounded) expand_rounded();
    advance();
    if (last) {
      float scale[kRowGroups], bias[kRowGroups];
#pragma unroll
      for (int j = 0; j < kRowGroups; ++j) {
        const int row = min(row0 + warp * kWarpRows + j * 8 + g, p.n_out - 1);
        scale[j] = p.scale[row];
        bias[j] = p.bias[row];
      }
      // Lane (g, t) loads those of tokens 2t and 2t + 1 of fragments g and g + 8 for the whole
      // warp.
      float2 of_tokens[T::kTokens / 64];
#pragma unroll
      for (int j = 0; j < T::kTokens / 64; ++j) {
        const int token = token0 + j * 64 + g * 8 + 2 * t;
        of_tokens[j].x = p.token_scale[min(token, p.tokens - 1)];
        of_tokens[j].y = p.token_scale[min(token + 1, p.tokens - 1)];
      }
      const int column = row0 + warp * kWarpRows + 8 * t;
      const bool vectors = p.n_out % 8 == 0;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        // 8 tokens x 32 rows. Before the transposes a lane has tokens 2t and 2t + 1 of rows g + 8j;
        // after the first, rows 8j + 2t and 8j + 2t + 1 of token g; after the second, 8t to 8t + 7.
        uint32_t words[kRowGroups];
        const float of_token[2] = {
            __shfl_sync(kAllLanes, of_tokens[i / 8].x, i % 8 * 4 + t),
            __shfl_sync(kAllLanes, of_tokens[i / 8].y, i % 8 * 4 + t),
        };
#pragma unroll
        for (int j = 0; j < kRowGroups; ++j) {
          int* pair = &acc[i / 2][i % 2][j / 2][j % 2 * 2];
          words[j] = movmatrix_trans(
              as_bits(__halves2half2(epilogue(pair[0], scale[j], of_token[0], bias[j]),
                                     epilogue(pair[1], scale[j], of_token[1], bias[j]))));
          pair[0] = pair[1] = 0;
        }
        transpose_quad(words);
        const int token = token0 + i * 8 + g;
        if (token >= p.tokens) continue;
        __half* y = p.y + static_cast<int64_t>(token) * p.n_out + column;
        if (vectors) {
          if (column < p.n_out) {
            *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
          }
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const __half2 pair = as_half2(words[j / 2]);
            if (column + j < p.n_out) y[j] = j % 2 ? __high2half(pair) : __low2half(pair);
          }
        }
      }
    }
    if (last) tile += gridDim.x;
    step = last ? 0 : step + 1;
    stage = next_stage;
    token0 = next_token0;
    row0 = next_row0;
  }
  cp_async_wait<0>();
}

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

enum Variant { kChoose = 0, kVector = 1, kSmall = 2, kMedium = 3, kLarge = 4 };

// Time of a tile shape when a multiprocessor gets `n` tiles at most: `full` for each set of blocks
// that fills it, and rest[n] for n more, which is no linear part of `full`: a block alone cannot
// hide its own latency. Microseconds for 80 steps, measured (bench_ops --variants); only their
// ratios matter.
struct TileTimes {
  double full;
  double rest[3];
};

template <class T>
double cost(const LinearArguments& p, int sm_count, const TileTimes& times) {
  const int64_t n = ceil_div(tile_count<T>(p), sm_count);
  return static_cast<double>(n / T::kBlocksPerSm) * times.full + times.rest[n % T::kBlocksPerSm];
}

template <Format kFormat>
Variant pick_variant(const LinearArguments& p, int sm_count) {
  if (p.tokens <= kVectorTokens) return kVector;
  constexpr TileTimes kTimes[][3] = {
      {{52, {0, 35, 49}}, {60, {0, 40}}, {62, {0}}},  // W8
      {{89, {0, 44, 62}}, {88, {0, 57}}, {86, {0}}},  // W4, FP16 scales
      {{62, {0, 36, 59}}, {66, {0, 45}}, {69, {0}}},  // W4, integer scales
  };
  const double small = cost<SmallTile>(p, sm_count, kTimes[kFormat][0]);
  const double medium = cost<MediumTile>(p, sm_count, kTimes[kFormat][1]);
  const double large = cost<LargeTile>(p, sm_count, kTimes[kFormat][2]);
  if (small < medium && small < large) return kSmall;
  return medium < large ? kMedium : kLarge;
}

template <Format kFormat>
cudaError_t launch_vector(const LinearArguments& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.n_out, kVectorRows));
  // The number of warps that shares the segments of k most evenly.
  const int64_t segments = ceil_div(p.n_in, kFormat == kW8 ? 64 : 128);
  int warps = kVectorMaxWarps;
  for (int w = kVectorMaxWarps; w >= kVectorMaxWarps / 2; --w) {
    if (ceil_div(segments, w) * w < ceil_div(segments, warps) * warps) warps = w;
  }
  auto* kernel = vector_kernel<kFormat, 1, 1>;
  if constexpr (kFormat == kW4Integer) {
    if (p.group_shift == 6) {
      kernel = p.tokens <= 4 ? vector_kernel<kFormat, 2, 1> : vector_kernel<kFormat, 2, 2>;
    } else if (p.group_shift == 5) {
      kernel = p.tokens <= 2   ? vector_kernel<kFormat, 4, 1>
               : p.tokens <= 4 ? vector_kernel<kFormat, 4, 2>
                               : vector_kernel<kFormat, 4, 4>;
    }
  }
  return launch(kernel, blocks, warps * kWarp, 0, stream, p);
}

template <Format kFormat, class T>
cudaError_t launch_tiles(const LinearArguments& p, int sm_count, cudaStream_t stream) {
  constexpr int kBytes = T::template kSharedBytes<kFormat != kW8>;
  const cudaError_t error = cudaFuncSetAttribute(
      tile_kernel<kFormat, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(tile_count<T>(p), sm_count * T::kBlocksPerSm);
  return launch(tile_kernel<kFormat, T>, blocks, T::kThreads, kBytes, stream, p);
}

template <Format kFormat>
int run_linear(const LinearArguments& p, int variant, const char* op, void* stream) {
  constexpr int64_t kMaxElements = int64_t{1} << 31;
  if (p.n_in <= 0 || p.n_in % 32 != 0 || p.n_in > 65536) {
    return refuse("%s: in_features %d is not a multiple of 32 up to 65536", op, p.n_in);
  }
  if (p.tokens < 0 || p.n_out <= 0 || static_cast<int64_t>(p.tokens) * p.n_in >= kMaxElements ||
      static_cast<int64_t>(p.n_out) * p.n_in >= kMaxElements) {
    return refuse("%s: %d tokens x %d outputs x %d inputs out of range", op, p.tokens, p.n_out,
                  p.n_in);
  }
  if (variant < kChoose || variant > kLarge || (variant == kVector && p.tokens > kVectorTokens)) {
    return refuse("%s: variant %d cannot run %d tokens", op, variant, p.tokens);
  }
  if (p.tokens == 0) return SSDI8_OK;
  int sm_count = 0;
  if (const int code = check(multiprocessors(&sm_count), op)) return code;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (variant == kChoose ? pick_variant<kFormat>(p, sm_count) : variant) {
    case kVector:
      return check(launch_vector<kFormat>(p, s), op);
    case kSmall:
      return check(launch_tiles<kFormat, SmallTile>(p, sm_count, s), op);
    case kMedium:
      return check(launch_tiles<kFormat, MediumTile>(p, sm_count, s), op);
    default:
      return check(launch_tiles<kFormat, LargeTile>(p, sm_count, s), op);
  }
}

// What both params structs call by the same name, and the weight.
template <class Params>
LinearArguments arguments_of(const Params& p, const int8_t* weight,
                             const void* group_scale = nullptr, int group_shift = 0) {
  auto* y = static_cast<__half*>(p.y);
  return {p.x, p.token_scale, weight,        group_scale,    p.scale,    p.bias,
          y,   p.tokens,      p.in_features, p.out_features, group_shift};
}

}  // namespace
}  // namespace ssdi8

int ssdi8_linear(const Ssdi8LinearParams* p, void* stream) {
  using namespace ssdi8;
  return run_linear<kW8>(arguments_of(*p, p->weight), p->variant, "linear", stream);
}

int ssdi8_linear_w4(const Ssdi8LinearW4Params* p, void* stream) {
  using namespace ssdi8;
  const int group = p->group_size;
  if ((group != 32 && group != 64 && group != 128) || p->in_features % group != 0) {
    return refuse(
        "linear_w4: group size %d is not 32, 64 or 128, or does not divide in_features %d", group,
        p->in_features);
  }
  const int shift = group == 32 ? 5 : group == 64 ? 6 : 7;
  const LinearArguments arguments = arguments_of(*p, p->packed, p->group_scale, shift);
  if (!p->integer_scales) return run_linear<kW4Rounded>(arguments, p->variant, "linear_w4", stream);
  return run_linear<kW4Integer>(arguments, p->variant, "linear_w4", stream);
}

size_t ssdi8_sizeof_linear(void) { return sizeof(Ssdi8LinearParams); }
size_t ssdi8_sizeof_linear_w4(void) { return sizeof(Ssdi8LinearW4Params); }
