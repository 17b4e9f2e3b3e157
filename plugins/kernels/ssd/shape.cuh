// Sizes of a call, how a block computes a work item, and which item it is.

#ifndef SSDI8_SSD_SHAPE_CUH_
#define SSDI8_SSD_SHAPE_CUH_

#include <stddef.h>
#include <stdint.h>

#include "../gpu.cuh"

namespace ssdi8 {
namespace ssd {

constexpr int kThreads = 256;  // of the preparing kernels; Plan has those of work items
constexpr int kWarps = kThreads / 32;
constexpr int kTileP = 64;      // channels of a work item: one 128-byte line of x
constexpr int kMaxChunk = 256;  // also the bound of exact integer sums
constexpr int kUnitBytes = 512;
constexpr int kFlags = 16;  // of progress per lane of work: one per warp

struct Shape {
  int batch;
  int length;
  int nheads;
  int headdim;
  int ngroups;
  int d_state;
  int chunk;
  int chunks;
  int away;     // rounding half_away
  int dynamic;  // scaling "dynamic"
  int fp16;     // scaling "none"

  __host__ __device__ int p_tiles() const { return (headdim + kTileP - 1) / kTileP; }
  // Of the tile `pt` of a head: the last may have fewer, and works on zeros in place of the others.
  __host__ __device__ int channels(int pt) const {
    return headdim % kTileP == 0 || (pt + 1) * kTileP < headdim ? kTileP : headdim % kTileP;
  }
  __host__ __device__ int lanes() const { return batch * nheads * p_tiles(); }  // (b, h, P tile)
  // Units per (batch, chunk, group).
  __host__ __device__ size_t b_units() const { return size_t(chunk / 32) * (d_state / 16); }
  __host__ __device__ size_t c_units() const { return size_t(chunk / 16) * (d_state / 32); }
  __host__ __device__ size_t cb_units() const { return size_t(chunk / 16) * (chunk / 16); }
  __host__ __device__ size_t group_chunks() const { return size_t(batch) * chunks * ngroups; }
};

// How a block computes a work item: the chunk has 16 * kRowTiles * kWarps positions.
template <int kStateSize,  // N
          int kTiles,      // blocks of 16 rows of y per warp, and of 16 positions of x
          int kItemWarps>
struct Plan {
  static constexpr int kN = kStateSize;
  static constexpr int kRowTiles = kTiles;
  static constexpr int kWarps = kItemWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kChunk = 16 * kRowTiles * kWarps;
  // What registers are cut to; at N = 256 the state needs too many for a second block.
  static constexpr int kBlocksPerSm = kN == 256 || kWarps == 16 ? 1 : 2;

  // The part of the (64, N) state of a warp: kRows blocks of 16 channels and kSteps runs of 32
  // state columns. Value [row][step][v][e]: channel 8 slot(g) + 2 (first_row + row) + e / 2, column
  // of the run's 8 consecutive ones 2v + e % 2.
  static constexpr int kWarpColumns = kN == 64 || kWarps < 4 ? 2 : 4;
  static constexpr int kWarpRows = kWarps / kWarpColumns < 4 ? kWarps / kWarpColumns : 4;
  static constexpr int kStateWarps = kWarpRows * kWarpColumns;  // the others have no part
  static constexpr int kStateThreads = 32 * kStateWarps;
  static constexpr int kRows = 4 / kWarpRows;
  static constexpr int kSteps = kN / 32 / kWarpColumns;

  // Shared memory behind the tables, in 16-byte words.
  static constexpr int kRWords = kN * kTileP / 16;
  static constexpr int kXsWords = kChunk * kTileP / 16;
  static constexpr int kX16Words = kChunk * kTileP / 8;

  __device__ static int first_row() { return (threadIdx.x / 32) / kWarpColumns * kRows; }
  __device__ static int first_step() { return (threadIdx.x / 32) % kWarpColumns * kSteps; }
  // First channel (of e / 2 = 0) and first state column of this lane.
  __device__ static int channel(int row) {
    const int g = threadIdx.x % 32 / 4;
    return 8 * (g / 2 + 4 * (g % 2)) + 2 * (first_row() + row);
  }
  __device__ static int column(int step) {
    const int q = first_step() + step;
    return 64 * (q / 2) + 16 * (threadIdx.x % 4) + 8 * (q % 2);
  }
};

// One work item.
struct Item {
  int b;
  int c;
  int h;
  int pt;
  int group;        // of h
  int group_chunk;  // index of (batch, chunk, group)
  int start;        // first position of the chunk
  int valid;        // positions of the chunk that exist
  int p0;           // first channel in (H, P)
};

// The lane of work of this block: blocks start in the order x, y, z, so the chunks (y) of a lane
// (x, z) start in their order. Each phase asks again, because registers are what limits the
// kernels.
__device__ __forceinline__ int lane_of_work() {
  const int x = read_ctaid_x();
  return blockIdx.z * gridDim.x + x;
}
__device__ __forceinline__ int chunk_of_work() { return read_ctaid_y(); }

__device__ __forceinline__ int channels_of_work(const Shape& s) {
  return s.channels(s.p_tiles() == 1 ? 0 : lane_of_work() % 2);
}

__device__ __forceinline__ Item make_item(const Shape& s, int lane_index, int c) {
  Item it;
  const int bh = s.p_tiles() == 1 ? lane_index : lane_index / 2;
  it.pt = s.p_tiles() == 1 ? 0 : lane_index % 2;
  it.b = s.batch == 1 ? 0 : bh / s.nheads;
  it.h = bh - it.b * s.nheads;
  it.c = c;
  it.group = s.ngroups == 1 ? 0 : it.h / (s.nheads / s.ngroups);
  it.group_chunk = (it.b * s.chunks + c) * s.ngroups + it.group;
  it.start = c * s.chunk;
  it.valid = min(s.chunk, s.length - it.start);
  it.p0 = it.h * s.headdim + it.pt * kTileP;
  return it;
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_SHAPE_CUH_
