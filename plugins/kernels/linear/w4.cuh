// 4-bit weights: eight in a word to eight INT8 values, by FP16 or by integer group scales.

#ifndef SSDI8_LINEAR_W4_CUH_
#define SSDI8_LINEAR_W4_CUH_

#include "../common.cuh"

namespace ssdi8 {
namespace linear {

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

}  // namespace linear
}  // namespace ssdi8

#endif  // SSDI8_LINEAR_W4_CUH_
