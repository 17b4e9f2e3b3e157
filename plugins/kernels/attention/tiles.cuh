// 64 tokens of the caches in shared memory, as operands of FP16 matrix instructions.
//
// Of 16 tokens, lane 4g + t of a warp has those from 4t to 4t + 3, as columns 2t and 2t + 1 of the
// first and of the second product with K, and so as operand of the product with V: a word of INT8.
// Channels of K are permuted the same way, which q follows.

#ifndef SSDI8_ATTENTION_TILES_CUH_
#define SSDI8_ATTENTION_TILES_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "../common.cuh"

namespace ssdi8 {
namespace attention {

constexpr int kTile = 64;  // tokens
constexpr int kAttendWarps = 4;
constexpr int kAttendThreads = kAttendWarps * kWarp;

// The caches of one head.
struct Caches {
  const int8_t* k;
  const __half* k_scale;
  const int8_t* v;
  const __half* v_scale;
  int tokens;  // that are read
};

template <int kHeadDim>
struct Tile {
  // A multiple of 4 words that is no multiple of 8: eight rows meet no bank twice.
  static constexpr int kPitch = kHeadDim % 32 == 0 ? kHeadDim + 16 : kHeadDim + 32;
  static constexpr int kTokenPitch = kTile + 16;

  alignas(16) int8_t k[kTile][kPitch];
  alignas(16) int8_t v[kHeadDim][kTokenPitch];
  alignas(16) float k_factor[kTile];  // k_scale, and what turns scores into powers of 2
  alignas(16) __half v_scale[kTile];

  // Starts to copy K.
  __device__ __forceinline__ void start_keys(const Caches& caches, int first) {
    constexpr int kChunks = kHeadDim / 16;
    for (int i = threadIdx.x; i < kTile * kChunks; i += kAttendThreads) {
      const int token = i / kChunks, chunk = i % kChunks;
      const bool valid = first + token < caches.tokens;
      const int64_t row = valid ? first + token : 0;
      cp_async_16(shared_address(&k[token][16 * chunk]), caches.k + row * kHeadDim + 16 * chunk,
                  valid);
    }
    cp_async_commit();
  }
};

// V and the scales of a tile, on their way from global to shared memory. V is transposed, four
// tokens by four channels.
template <int kHeadDim>
struct ValuesUnderWay {
  static constexpr int kUnits = kHeadDim / 4 * (kTile / 4);
  static constexpr int kOwn = (kUnits + kAttendThreads - 1) / kAttendThreads;

  uint32_t words[kOwn][4];
  __half scale;

  // Four quads of channels by eight of tokens are the units of a warp.
  __device__ __forceinline__ static int channel_of(int unit) {
    return 16 * (unit / kWarp / 2) + 4 * (unit % 4);
  }
  __device__ __forceinline__ static int token_of(int unit) {
    return 32 * (unit / kWarp % 2) + 4 * (unit % kWarp / 4);
  }

  __device__ __forceinline__ void load(const Caches& caches, int first) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int unit = own * kAttendThreads + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + token_of(unit) + i;
        const bool valid = unit < kUnits && token < caches.tokens;
        const int8_t* source = caches.v + static_cast<int64_t>(token) * kHeadDim + channel_of(unit);
        words[own][i] = valid ? *reinterpret_cast<const uint32_t*>(source) : 0;
      }
    }
    const int token = first + threadIdx.x % kTile;
    const __half* scales = threadIdx.x < kTile ? caches.k_scale : caches.v_scale;
    // What lies behind the tokens may be NaN, which no weight of 0 takes away.
    scale = token < caches.tokens ? scales[token] : __ushort_as_half(0);
  }

  __device__ __forceinline__ void store(Tile<kHeadDim>& tile, float score_factor) const {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int unit = own * kAttendThreads + threadIdx.x;
      if (unit >= kUnits) continue;
      const uint32_t(&w)[4] = words[own];
      const uint32_t low[2] = {__byte_perm(w[0], w[1], 0x5140), __byte_perm(w[2], w[3], 0x5140)};
      const uint32_t high[2] = {__byte_perm(w[0], w[1], 0x7362), __byte_perm(w[2], w[3], 0x7362)};
      const uint32_t columns[4] = {
          __byte_perm(low[0], low[1], 0x5410), __byte_perm(low[0], low[1], 0x7632),
          __byte_perm(high[0], high[1], 0x5410), __byte_perm(high[0], high[1], 0x7632)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<uint32_t*>(&tile.v[channel_of(unit) + i][token_of(unit)]) = columns[i];
      }
    }
    const int token = threadIdx.x % kTile;
    if (threadIdx.x < kTile) {
      tile.k_factor[token] = __half2float(scale) * score_factor;
    } else {
      tile.v_scale[token] = scale;
    }
  }
};

// Four INT8 as two pairs of FP16: as bits behind 1024 they are 1152 too large.
__device__ __forceinline__ void to_halves(uint32_t word, __half2 (&pairs)[2]) {
  constexpr uint32_t k1024 = 0x64646464u;
  const __half2 excess = __half2half2(__ushort_as_half(0x6480));  // 1152
  const uint32_t biased = word ^ 0x80808080u;
  const uint32_t low = __byte_perm(biased, k1024, 0x4140);
  const uint32_t high = __byte_perm(biased, k1024, 0x4342);
  pairs[0] = __hsub2(reinterpret_cast<const __half2&>(low), excess);
  pairs[1] = __hsub2(reinterpret_cast<const __half2&>(high), excess);
}

__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace attention
}  // namespace ssdi8

#endif  // SSDI8_ATTENTION_TILES_CUH_
