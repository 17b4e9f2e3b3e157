// The carry between chunks in the INT8 scan: how it moves on, and its INT8 copy for Scan1.

#ifndef SSDI8_SSD_INT8_CARRY_CUH_
#define SSDI8_SSD_INT8_CARRY_CUH_

#include "../common.cuh"
#include "carry.cuh"
#include "passing.cuh"
#include "quantize_x.cuh"
#include "rounding.cuh"
#include "shape.cuh"
#include "state_product.cuh"
#include "tables.cuh"

namespace ssdi8 {
namespace ssd {

// The state that enters the chunk, as a lane has it: of each run both channels of a row.
template <typename P>
using Entering = float[P::kRows * P::kSteps][2][8];

// The carry between chunks: in real units, or with gate Q0.7 as the bits of INT32 values.
template <typename P, bool kInteger>
struct Int8Carry : CarrySlot<P> {
  using Slot = CarrySlot<P>;
  static constexpr int kRuns = Slot::kRuns;
  static constexpr int kChannels = 2 * P::kRows;  // of a lane, side by side
  using Slot::it;
  using Slot::shape;

  const float* state_scale;
  Tables& tables;

  __device__ __forceinline__ Int8Carry(const Carries& carries, const float* state_scale,
                                       const Shape& shape, const Item& it, int lane, Tables& tables)
      : Slot(carries, shape, it, lane), state_scale(state_scale), tables(tables) {}

  __device__ __forceinline__ void load(int run, int channel, int step, float (&v)[8]) const {
    Slot::load(run, channel, step, v);
    if (kInteger && it.c == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = __int_as_float(integer_carry(v[i], tables.state_inverse[channel], shape.away));
      }
    }
  }

  __device__ __forceinline__ void store(int run, int channel, int step, float (&v)[8]) const {
    if (kInteger && it.c + 1 == shape.chunks) {
      const float scale = Slot::exists(channel) ? state_scale[it.p0 + channel] : 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int q = saturate(__float_as_int(v[i]), shape.away);
        v[i] = __fmul_rn(static_cast<float>(q), scale);
      }
    }
    Slot::store(run, channel, step, v);
  }

  // The carry after the chunk; acc holds the chunk's state, as state_product leaves it.
  __device__ __forceinline__ void advance(const float (&before)[8], const int (&acc)[4][4], int r,
                                          int channel, float (&after)[8]) const {
    const float multiplier = tables.state_multiplier[channel];
    const float gate = tables.gate;
    const int gate_q = kInteger ? integer_gate(gate, shape.away) : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float sum = __int_as_float(acc[i / 2][2 * r + i % 2]) - kMagic;
      const float state = __fmul_rn(sum, multiplier);
      if (kInteger) {
        after[i] = __int_as_float(
            pass_integer(__float_as_int(before[i]), gate_q, round_to_int8(state, shape.away)));
      } else {
        after[i] = pass_real(before[i], gate, state);
      }
    }
  }

  // The stored copy of the carry: two operand words.
  template <bool kAway>
  __device__ __forceinline__ uint2 quantized(const float (&v)[8], float inverse) const {
    int q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q[i] = kInteger ? max(__float_as_int(v[i]), kAway ? -127 : -128)
                      : round_value<kAway>(__fmul_rn(v[i], inverse));
    }
    if (kInteger) {
      return make_uint2(saturate4(q[0], q[1], q[2], q[3]), saturate4(q[4], q[5], q[6], q[7]));
    }
    return make_uint2(saturate_rounded<kAway>(q[0], q[1], q[2], q[3]),
                      saturate_rounded<kAway>(q[4], q[5], q[6], q[7]));
  }

  // Moves the carry one chunk on, as early as it can be: the next chunk of the head waits for it.
  // No warp needs the part of another.
  __device__ __forceinline__ void pass(const StateInt<P>& acc, Entering<P>& entering) const {
    Slot::wait();
    constexpr int kTogether = kRuns <= 2 ? kRuns : 1;  // as registers allow
#pragma unroll
    for (int first = 0; first < kRuns; first += kTogether) {
#pragma unroll
      for (int k = 0; k < 2 * kTogether; ++k) {
        const int run = first + k / 2, row = run / P::kSteps, step = run % P::kSteps;
        load(2 * run + k % 2, P::channel(row) + k % 2, step, entering[run][k % 2]);
      }
#pragma unroll
      for (int k = 0; k < 2 * kTogether; ++k) {
        const int run = first + k / 2, row = run / P::kSteps, step = run % P::kSteps;
        const int channel = P::channel(row) + k % 2;
        float after[8];
        advance(entering[run][k % 2], acc[row][step], k % 2, channel, after);
        store(2 * run + k % 2, channel, step, after);
      }
    }
    Slot::publish();
  }

  // Where the warps leave their largest values: a row of 64 channels for each that shares a row of
  // the state. The weights have been used by now.
  __device__ __forceinline__ float* tops() const {
    static_assert(P::kWarpColumns * kTileP <= kMaxChunk);
    return tables.w_state;
  }

  // Of scaling "dynamic", before the block synchronises and quantize runs.
  __device__ __forceinline__ void store_tops(const Entering<P>& entering) const {
    float top[kChannels] = {};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& largest = top[run / P::kSteps * 2 + r];
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(entering[run][r][i]));
      }
    }
    quad_max(top);
    float* row = tops() + threadIdx.x / 32 % P::kWarpColumns * kTileP + P::channel(0);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) row[own_channel() + i] = top[i];
  }

  // The channels whose scale a lane computes for its quad: as quad_max leaves them.
  static constexpr int kOwn = kChannels == 8 ? 2 : 1;
  __device__ __forceinline__ static int own_channel() {
    const int t = threadIdx.x % 4;
    return kChannels == 2 ? t / 2 : t * kOwn;
  }

  // 1 / scale of the state in each channel of the lane; writes the scales of Scan1.
  __device__ __forceinline__ void dynamic_inverses(float (&inverse)[kChannels]) const {
    float own[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int channel = P::channel(0) + own_channel() + i;
      float top = 0.0f;
#pragma unroll
      for (int w = 0; w < P::kWarpColumns; ++w) {
        top = fmaxf(top, tops()[w * kTileP + channel]);
      }
      const DynamicScale scale = dynamic_scale(top);
      own[i] = scale.inverse;
      if (P::first_step() == 0) {
        tables.scan1_scale[channel] = __fmul_rn(tables.c_scale, scale.step);
      }
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int t = kChannels == 2 ? 2 * i : i / kOwn;
      inverse[i] = __shfl_sync(kAllLanes, own[i % kOwn], t, 4);
    }
  }

  // The state that enters the chunk as operand of Scan1.
  __device__ __forceinline__ void quantize(const Entering<P>& entering, uint4* r_units) const {
    float inverse[kChannels];
    if (!kInteger && shape.dynamic) {
      dynamic_inverses(inverse);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) inverse[i] = tables.state_inverse[P::channel(0) + i];
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int row = run / P::kSteps, step = run % P::kSteps;
      uint2 words[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        words[r] = shape.away ? quantized<true>(entering[run][r], inverse[2 * row + r])
                              : quantized<false>(entering[run][r], inverse[2 * row + r]);
      }
      r_units[((P::first_step() + step) * 4 + P::first_row() + row) * 32 + threadIdx.x % 32] =
          make_uint4(words[0].x, words[0].y, words[1].x, words[1].y);
    }
  }
};

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_INT8_CARRY_CUH_
