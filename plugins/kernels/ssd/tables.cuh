// What the threads of a work item look up: decay, scales; filled by the item or by a kernel before.

#ifndef SSDI8_SSD_TABLES_CUH_
#define SSDI8_SSD_TABLES_CUH_

#include <stddef.h>

#include "../common.cuh"
#include "rounding.cuh"
#include "shape.cuh"

namespace ssdi8 {
namespace ssd {

struct alignas(16) Tables {
  int4 magic;  // four times kMagicInt: from memory, or the compiler sets it anew for each product
  // Of the decay, in the order of PreparedTables.
  float w_state[kMaxChunk];  // exp(a_last - a_k) * dt_k, times kTinyW if static and half-even
  float a2[kMaxChunk];       // a * log2(e)
  float a2_less[kMaxChunk];  // a2 - log2(dt * cb_scale)
  float gate;                // exp(a_last)
  float b_scale, c_scale;
  float d_skip;
  // Of the channels, in the order of PreparedTables: what "static" prepares.
  float x_inverse[kTileP];         // 1 / scale, times kTinyV if static and half-even
  float state_inverse[kTileP];     // static only
  float state_multiplier[kTileP];  // accumulator -> state
  float scan1_scale[kTileP];
  // Of the item.
  int group_chunk;
  int valid;
  size_t y_offset;  // of its first row and channel
};

// Those that an op has; of the channels, null with scaling "dynamic".
struct Scales {
  const float* x_scale;      // (H, P)
  const float* state_scale;  // (H, P)
  const float* b_scale;      // (G)
  const float* c_scale;      // (G)
  const float* cb_scale;     // (G)
  const float* d_skip;       // (H)
};

__device__ __forceinline__ float decay_weight(float end, float a_k, float dt_k) {
  return __fmul_rn(expf(__fsub_rn(end, a_k)), dt_k);
}

// Weights are multiplied last with "static", whose tiny factor they carry in part; first with
// "dynamic".
__device__ __forceinline__ float weight_factor(const Shape& shape) {
  return shape.away || shape.dynamic ? 1.0f : kTinyW;
}

// Writes the constants of channel hp at `first` and every kTileP floats from there, in the order of
// Tables. Of scaling "static".
template <bool kScan>
__device__ __forceinline__ void fill_channel(const Shape& shape, int hp, int group,
                                             const Scales& scales, bool integer_gate,
                                             float* first) {
  const float x_scale = scales.x_scale[hp], state_scale = scales.state_scale[hp];
  const float multiplier = __fmul_rn(x_scale, scales.b_scale[group]);
  first[0] = __frcp_rn(x_scale) * (shape.away ? 1.0f : kTinyV);
  first[kTileP] = __frcp_rn(state_scale);
  first[2 * kTileP] = integer_gate ? __fdiv_rn(multiplier, state_scale) : multiplier;
  if (kScan) first[3 * kTileP] = __fmul_rn(scales.c_scale[group], state_scale);
}

// What one thread sets.
__device__ __forceinline__ void finish_tables(const Shape& shape, const Item& it, Tables& tables) {
  tables.magic = make_int4(kMagicInt, kMagicInt, kMagicInt, kMagicInt);
  tables.group_chunk = it.group_chunk;
  tables.valid = it.valid;
  tables.y_offset = (size_t(it.b) * shape.length + it.start) * shape.nheads * shape.headdim + it.p0;
}

// From dt and a (B, H, L).
template <typename P, bool kState, bool kScan>
__device__ __forceinline__ void fill_tables(const Shape& shape, const Item& it, const float* dt,
                                            const float* a, const Scales& scales, bool integer_gate,
                                            Tables& tables) {
  const size_t first = (size_t(it.b) * shape.nheads + it.h) * shape.length + it.start;
  const int last = it.valid - 1;
  static_assert(P::kChunk <= P::kThreads, "a position per thread");
  const int k = threadIdx.x;
  if (k < P::kChunk) {
    const float a_k = a[first + min(k, last)];
    const float dt_k = k < it.valid ? dt[first + k] : 0.0f;
    if (kState) {
      const float a_last = a[first + last];
      tables.w_state[k] = decay_weight(a_last, a_k, dt_k) * weight_factor(shape);
      if (k == 0) tables.gate = expf(a_last);
    }
    if (kScan) {
      const float a2 = a_k * kLog2e;
      tables.a2[k] = a2;
      tables.a2_less[k] = a2 - __log2f(dt_k * scales.cb_scale[it.group]);
    }
  }
  // The scales go to the last warps: the first have more to do elsewhere.
  const int p = threadIdx.x - (P::kThreads - kTileP);
  if (p < 0) return;
  if (kState && !shape.dynamic) {
    const int hp = it.p0 + min(p, shape.channels(it.pt) - 1);
    fill_channel<kScan>(shape, hp, it.group, scales, integer_gate, tables.x_inverse + p);
  }
  if (p > 0) return;
  if (kState) tables.b_scale = scales.b_scale[it.group];
  if (kScan) tables.d_skip = scales.d_skip[it.h];
  finish_tables(shape, it, tables);
}

// Tables that a kernel before has written, for all items: the decay of (batch, chunk, head) and,
// with scaling "static", the constants of 64 channels of a head.
struct PreparedTables {
  float* decay;
  float* channels;

  __host__ __device__ static int decay_floats(int chunk) { return 3 * chunk + 4; }
  static constexpr int kChannelFloats = 4 * kTileP;

  __device__ float* decay_of(const Shape& s, int b, int c, int h) const {
    return decay + ((size_t(b) * s.chunks + c) * s.nheads + h) * decay_floats(s.chunk);
  }
  __device__ float* channels_of(const Shape& s, int h, int pt) const {
    return channels + size_t(h * s.p_tiles() + pt) * kChannelFloats;
  }
};

// Starts the copy of an item's tables; complete after cp_async_wait and a synchronisation.
template <typename P>
__device__ __forceinline__ void copy_tables(const Shape& shape, const Item& it,
                                            const PreparedTables& prepared, Tables& tables) {
  constexpr int kPerArray = P::kChunk / 4, kDecayWords = 3 * kPerArray + 1;
  constexpr int kWords = kDecayWords + PreparedTables::kChannelFloats / 4;
  const float* decay = prepared.decay_of(shape, it.b, it.c, it.h);
  const float* channels = prepared.channels_of(shape, it.h, it.pt);
  const int words = shape.dynamic ? kDecayWords : kWords;
  for (int i = threadIdx.x; i < words; i += P::kThreads) {
    const bool of_decay = i < kDecayWords;
    const float* from = of_decay ? decay + 4 * i : channels + 4 * (i - kDecayWords);
    const int array = i / kPerArray;
    float* to = !of_decay           ? tables.x_inverse + 4 * (i - kDecayWords)
                : i < 3 * kPerArray ? tables.w_state + array * kMaxChunk + 4 * (i % kPerArray)
                                    : &tables.gate;
    cp_async_16(shared_address(to), from);
  }
  cp_async_commit();
  if (threadIdx.x == 0) finish_tables(shape, it, tables);
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_TABLES_CUH_
