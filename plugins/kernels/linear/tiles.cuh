// Tiles of tokens x rows (64 x 128, 128 x 128, 128 x 256), compute bound. Four stages of 64 k by
// cp.async; a warp owns all tokens of the tile and 32 rows, so that a W4 weight is expanded once
// per tile. The pipeline runs on across tiles: while one is written, the next one loads. Blocks
// stay (grid = what fits) and walk the tiles so that 1024 rows of the weight serve all tokens
// before the next 1024 are read: on a board the weight does not fit the L2 cache.
//
// Rejected, with the time of the 128 x 128 tile over the present one (H100, In 2560, Out 10576,
// 2048 tokens):
//   tokens as the 16-row operand (four moves per product)    1.2
//   all copies of a step in one burst                        1.07
//   two steps per loop, unrolled (spare moves return)        1.15
// mma.sync reaches 1290 TOP/s there, two thirds of what Hopper's own instructions do.

#ifndef SSDI8_LINEAR_TILES_CUH_
#define SSDI8_LINEAR_TILES_CUH_

#include <type_traits>

#include "../common.cuh"
#include "arguments.cuh"
#include "w4.cuh"

namespace ssdi8 {
namespace linear {

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

}  // namespace linear
}  // namespace ssdi8

#endif  // SSDI8_LINEAR_TILES_CUH_
