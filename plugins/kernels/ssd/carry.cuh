// How the state travels between the blocks that compute the chunks of a head: through a slot of
// memory per (b, h, 64 channels) and a flag for each warp's part of it.

#ifndef SSDI8_SSD_CARRY_CUH_
#define SSDI8_SSD_CARRY_CUH_

#include <stddef.h>
#include <stdint.h>

#include "../common.cuh"
#include "passing.cuh"
#include "shape.cuh"

namespace ssdi8 {
namespace ssd {

struct Carries {
  const void* ssm_state;
  void* ssm_state_out;
  uint4* slots;   // per lane of work: 64 * N words, each warp's part in the order of its lanes
  int* progress;  // per lane of work and warp: chunks whose carry is published
  bool state_fp32;
};

// A warp's part of the carry: runs of eight state values per lane. Read from ssm_state before the
// first chunk and written to ssm_state_out after the last, else kept in the slot.
template <typename P>
struct CarrySlot {
  static constexpr int kRuns = P::kRows * P::kSteps;

  const Carries& p;
  const Shape& shape;
  const Item& it;
  uint4* slot;
  int* progress;

  __device__ __forceinline__ CarrySlot(const Carries& p, const Shape& shape, const Item& it,
                                       int lane)
      : p(p),
        shape(shape),
        it(it),
        slot(p.slots + size_t(lane) * (P::kN * kTileP / 4)),
        progress(p.progress + lane * kFlags + threadIdx.x / 32) {}

  __device__ __forceinline__ size_t index(int channel, int step) const {
    const size_t row =
        (size_t(it.b) * shape.nheads + it.h) * shape.headdim + it.pt * kTileP + channel;
    return row * P::kN + P::column(step);
  }
  __device__ __forceinline__ bool exists(int channel) const {
    return shape.headdim % kTileP == 0 || channel < shape.channels(it.pt);
  }
  __device__ __forceinline__ uint4* own(int run) const {
    return slot + run * 2 * P::kStateThreads + threadIdx.x;
  }

  __device__ __forceinline__ void load(int run, int channel, int step, float (&v)[8]) const {
    if (it.c == 0) {
      if (exists(channel)) {
        load_state8(p.ssm_state, index(channel, step), p.state_fp32, v);
        return;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = 0.0f;
      return;
    }
    const uint4 low = __ldcg(own(run)), high = __ldcg(own(run) + P::kStateThreads);
    const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(bits[i]);
  }

  __device__ __forceinline__ void store(int run, int channel, int step, const float (&v)[8]) const {
    if (it.c + 1 == shape.chunks) {
      if (exists(channel)) {
        store_state8(p.ssm_state_out, index(channel, step), p.state_fp32, v);
      }
      return;
    }
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(v);
    __stcg(own(run), make_uint4(bits[0], bits[1], bits[2], bits[3]));
    __stcg(own(run) + P::kStateThreads, make_uint4(bits[4], bits[5], bits[6], bits[7]));
  }

  // Until the chunk before has stored this warp's part. Relaxed, since acquiring empties L1, on
  // which the operands count: the carry is read with __ldcg, from L2, where the release has put it
  // before the flag, and only after the branch on the flag.
  __device__ __forceinline__ void wait() const {
    if (it.c == 0) return;
    if (threadIdx.x % 32 == 0) {
      while (load_relaxed(progress) < it.c) {
      }
    }
    __syncwarp();
  }

  // Tells the next chunk that this warp's part is stored.
  __device__ __forceinline__ void publish() const {
    if (it.c + 1 == shape.chunks) return;
    __syncwarp();
    if (threadIdx.x % 32 == 0) store_release(progress, it.c + 1);
  }
};

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_CARRY_CUH_
