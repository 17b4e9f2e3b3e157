// Phase 1 of a work item: x into operand order, with its dynamic scales.

#ifndef SSDI8_SSD_QUANTIZE_X_CUH_
#define SSDI8_SSD_QUANTIZE_X_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "mma.cuh"
#include "rounding.cuh"
#include "shape.cuh"
#include "tables.cuh"

namespace ssdi8 {
namespace ssd {

// The 16 * kRowTiles positions of a warp. Rows past the end repeat the last: their dt is 0.
template <typename P>
__device__ __forceinline__ void load_x(const Shape& shape, const Item& it, const __half* x,
                                       uint4 (&raw)[P::kRowTiles][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int pitch = shape.nheads * shape.headdim, last = it.valid - 1;
  const int channel = 8 * (g / 2 + 4 * (g % 2));
  const bool exists = shape.headdim % kTileP == 0 || channel < shape.channels(it.pt);
  const __half* first = x + (size_t(it.b) * shape.length + it.start) * pitch + it.p0 + channel;
#pragma unroll
  for (int j = 0; j < P::kRowTiles; ++j) {
    const int row = 16 * (P::kRowTiles * warp + j) + 4 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw[j][i] = make_uint4(0, 0, 0, 0);
      if (exists) raw[j][i] = load16_global(first + min(row + i, last) * pitch);
    }
  }
}

// The largest |x . w| of each channel over the positions of a warp, weights being positive: a row
// of 64 channels per warp in `tops`.
template <typename P>
__device__ __forceinline__ void store_tops(const uint4 (&raw)[P::kRowTiles][4],
                                           const Tables& tables, float* tops) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float top[8] = {};
#pragma unroll
  for (int j = 0; j < P::kRowTiles; ++j) {
    const int first = 16 * (P::kRowTiles * warp + j) + 4 * t;
    const float4 weights = *reinterpret_cast<const float4*>(tables.w_state + first);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float w = reinterpret_cast<const float*>(&weights)[k];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = reinterpret_cast<const uint32_t*>(&raw[j][k])[i];
        const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&bits));
        top[2 * i] = fmaxf(top[2 * i], fabsf(__fmul_rn(v.x, w)));
        top[2 * i + 1] = fmaxf(top[2 * i + 1], fabsf(__fmul_rn(v.y, w)));
      }
    }
  }
  quad_max(top);
  *reinterpret_cast<float2*>(tops + warp * kTileP + 8 * (g / 2 + 4 * (g % 2)) + 2 * t) =
      make_float2(top[0], top[1]);
}

// The scales of x, scaling "dynamic". `tops` is scratch memory of 64 floats per warp, free after
// the next synchronisation. Synchronises once.
template <typename P>
__device__ __forceinline__ void find_scales(const uint4 (&raw)[P::kRowTiles][4], float* tops,
                                            Tables& tables) {
  store_tops<P>(raw, tables, tops);
  __syncthreads();
  const int p = threadIdx.x;
  if (p >= kTileP) return;
  float top = 0.0f;
#pragma unroll
  for (int warp = 0; warp < P::kWarps; ++warp) top = fmaxf(top, tops[warp * kTileP + p]);
  const DynamicScale scale = dynamic_scale(top);
  tables.x_inverse[p] = scale.inverse;
  tables.state_multiplier[p] = __fmul_rn(scale.step, tables.b_scale);
}

// Four positions of the same 8 channels, times a weight per position, as INT8 operand words:
// words[i] belongs to channels 2i and 2i + 1.
template <bool kAway, bool kDynamic>
__device__ __forceinline__ void quantize_words(const uint4 (&raw)[4], const float* inverse,
                                               const float4& w, uint2 (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 scale = *reinterpret_cast<const float2*>(inverse + 2 * i);
    int q0[4], q1[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t bits = reinterpret_cast<const uint32_t*>(&raw[k])[i];
      const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&bits));
      const float weight = reinterpret_cast<const float*>(&w)[k];
      if (kDynamic) {
        q0[k] = round_byte<kAway>(__fmul_rn(v.x, weight), scale.x);
        q1[k] = round_byte<kAway>(__fmul_rn(v.y, weight), scale.y);
      } else {
        q0[k] = round_product<kAway>(__fmul_rn(v.x, scale.x), weight);
        q1[k] = round_product<kAway>(__fmul_rn(v.y, scale.y), weight);
      }
    }
    words[i] =
        kDynamic ? make_uint2(pack4(q0[0], q0[1], q0[2], q0[3]), pack4(q1[0], q1[1], q1[2], q1[3]))
                 : make_uint2(saturate_rounded<kAway>(q0[0], q0[1], q0[2], q0[3]),
                              saturate_rounded<kAway>(q1[0], q1[1], q1[2], q1[3]));
  }
}

// w . x as units [step of 32][pair of column blocks], A operand.
template <typename P>
__device__ __forceinline__ void quantize_x(const Shape& shape, const uint4 (&raw)[P::kRowTiles][4],
                                           const Tables& tables, uint4* xs) {
  constexpr int kJobs = P::kRowTiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float* inverse = tables.x_inverse + 8 * (g / 2 + 4 * (g % 2));
  uint2 words[kJobs][4];
#pragma unroll
  for (int j = 0; j < kJobs; ++j) {
    const float4 w =
        *reinterpret_cast<const float4*>(tables.w_state + 16 * (kJobs * warp + j) + 4 * t);
    if (shape.dynamic) {
      if (shape.away) {
        quantize_words<true, true>(raw[j], inverse, w, words[j]);
      } else {
        quantize_words<false, true>(raw[j], inverse, w, words[j]);
      }
    } else if (shape.away) {
      quantize_words<true, false>(raw[j], inverse, w, words[j]);
    } else {
      quantize_words<false, false>(raw[j], inverse, w, words[j]);
    }
  }
  uint4* unit = xs + kJobs * warp / 2 * 4 * 32 + lane;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kJobs == 2) {
      const uint2 low = words[0][i], high = words[kJobs - 1][i];
      unit[i * 32] = make_uint4(low.x, low.y, high.x, high.y);
    } else {
      uint32_t* word = reinterpret_cast<uint32_t*>(unit + i * 32);
      const int half = warp % 2;
      word[2 * half] = words[0][i].x;
      word[2 * half + 1] = words[0][i].y;
    }
  }
}

// x16: units [step of 16][pair of column blocks], B operand.
template <typename P>
__device__ __forceinline__ void copy_x(const uint4 (&raw)[P::kRowTiles][4], uint4* x16) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < P::kRowTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t r0 = reinterpret_cast<const uint32_t*>(&raw[j][0])[i];
      const uint32_t r1 = reinterpret_cast<const uint32_t*>(&raw[j][1])[i];
      const uint32_t r2 = reinterpret_cast<const uint32_t*>(&raw[j][2])[i];
      const uint32_t r3 = reinterpret_cast<const uint32_t*>(&raw[j][3])[i];
      x16[((P::kRowTiles * warp + j) * 4 + i) * 32 + lane] =
          make_uint4(__byte_perm(r0, r1, 0x5410), __byte_perm(r2, r3, 0x5410),
                     __byte_perm(r0, r1, 0x7632), __byte_perm(r2, r3, 0x7632));
    }
  }
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_QUANTIZE_X_CUH_
