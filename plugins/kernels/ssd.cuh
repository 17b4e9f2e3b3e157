// Device code that the SSD kernels share: the operand layouts and the four phases of one work item.
//
// A work item is one chunk of 64 channels of one head. The warps of a block compute, in this order,
//   quantize_x     x (K, 64) -> shared memory, in the operand order of the matrix instructions:
//                  Q(w . x) for the state, Q(w' . x) for INT8 Scan2, x itself for FP16 Scan2;
//                  scaling "dynamic": after find_scales, which takes the scales from the maxima
//   state_product  Q(w . x)^T . B_q, the chunk state, in registers
//   (passing)      the state entering the chunk -> INT8 operand in shared memory
//   RowScan        y = Scan1 + INT8 Scan2 left of the diagonal tiles + FP16 Scan2 on them + D . x
//
// Operand order. A unit is what one warp feeds to matrix instructions with one 16-byte access per
// lane: 512 bytes, lane by lane, no bank conflict and no byte permutation after the producer. Lane
// (g, t) = (lane / 4, lane % 4) of m16n8k32 holds four consecutive contraction indices 4t .. 4t + 3
// of row (A) or column (B) g. The following index maps are free, because rows and columns of a
// product may come in any order as long as both operands agree:
//   channels   column g of column block j is channel 8 slot(g) + j, slot(g) = g / 2 + 4 (g % 2). A
//              lane then loads x in 16 bytes, and its results of column blocks 0..7 are again 16
//              consecutive bytes of y, four lanes side by side.
//   state      step q = 2Q + s contracts the words n = 64Q + 16t + 8s + {0..3} and {4..7}, so that
//              a lane reads rows of C in 16 bytes and the state in runs of 8.
// A unit holds one row block of A as {row g, row g + 8} x {k low, k high}, low first, or two column
// blocks of B, each with k low and k high side by side: what the instructions want in neighbouring
// registers.
//
// Integer results leave the accumulators without a conversion instruction: they start at kMagicInt,
// whose bits read as FP32 are 1.5 . 2^23, so the sum read as FP32 is 1.5 . 2^23 + sum, exactly, for
// |sum| <= 2^22 = 128 . 128 . 256.

#ifndef SSDI8_SSD_CUH_
#define SSDI8_SSD_CUH_

#include <cuda_fp16.h>
#include <stdint.h>

#include "common.cuh"
#include "kernels.h"

namespace ssdi8 {
namespace ssd {

constexpr int kThreads = 256;  // of the preparing kernels; Plan has those of work items
constexpr int kWarps = kThreads / 32;
constexpr int kTileP = 64;      // channels of a work item: one 128-byte line of x
constexpr int kScanTile = 64;   // positions of a Scan2 tile
constexpr int kMaxChunk = 256;  // also the bound of exact integer sums
constexpr int kMaxTiles = kMaxChunk / kScanTile;
constexpr int kUnitBytes = 512;
constexpr int kFlags = 16;  // of progress per lane of work: one per warp
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMaxFp16 = 65504.0f;
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
constexpr int kMagicInt = 0x4B400000;  // its bits

// ------------------------------------------------------------------------------------------------
// Rounding
// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_approx(float v) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
  return e;
}

// Four integers, saturated, into the bytes of a word, v0 lowest.
__device__ __forceinline__ uint32_t saturate4(int v0, int v1, int v2, int v3) {
  uint32_t high, word;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(v3), "r"(v2));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(v1), "r"(v0), "r"(high));
  return word;
}

// Round to an integer that saturate4 saturates correctly. The half-even form adds 1.5 * 2^23 in
// FP32, which rounds; it is right for |v| < 1.2e7, five orders of magnitude past saturation.
template <bool kAway>
__device__ __forceinline__ int round_int(float v) {
  if (kAway) return max(__float2int_rz(__fadd_rn(v, copysignf(0.5f, v))), -127);
  return __float_as_int(__fadd_rn(v, kMagic)) - kMagicInt;
}

// The same for the many values of a work item. Half-even goes through the denormal numbers: in
// units of 2^-149 an FP32 result is an integer, rounded by the FMA that computes it, and its bits
// are that integer; 128 is added so that the saturating conversion to unsigned bytes clips both
// ends. Weights and scales carry kTinyV and kTinyW, whose product is 2^-149.
constexpr float kTinyV = 0x1p-75f;
constexpr float kTinyW = 0x1p-74f;

template <bool kAway>
__device__ __forceinline__ int round_product(float v, float w) {
  if (kAway) return round_int<true>(__fmul_rn(v, w));
  return __float_as_int(__fmaf_rn(v, w, __int_as_float(128)));
}

template <bool kAway>
__device__ __forceinline__ int round_value(float v) {
  return kAway ? round_int<true>(v) : round_product<false>(v, __int_as_float(1));
}

// The scale of values of which the largest is `top`: 1 / scale, and the scale.
struct DynamicScale {
  float inverse;
  float step;
};
constexpr float kLeastTop = 1e-30f;
constexpr float kMostSteps = 127.0f;

__device__ __forceinline__ DynamicScale dynamic_scale(float top) {
  top = fmaxf(top, kLeastTop);
  return {__fdiv_rn(kMostSteps, top), __fdiv_rn(top, kMostSteps)};
}

// v * inverse rounded to an integer in the lowest byte, for values that need no saturation: their
// scale is dynamic.
template <bool kAway>
__device__ __forceinline__ int round_byte(float v, float inverse) {
  if (kAway) return round_int<true>(__fmul_rn(v, inverse));
  return __float_as_int(__fmaf_rn(v, inverse, kMagic));
}

// The largest value of each entry over the lanes of a quad: lane t ends with entries t * n / 4 and
// following, with n = 2 with entry t / 2.
template <int n>
__device__ __forceinline__ void quad_max(float (&v)[n]) {
  static_assert(n == 2 || n == 4 || n == 8);
  const bool upper = threadIdx.x & 2;
  [[maybe_unused]] const bool odd = threadIdx.x & 1;
#pragma unroll
  for (int i = 0; i < n / 2; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[n / 2 + i], 2);
    v[i] = fmaxf(upper ? v[n / 2 + i] : v[i], other);
  }
  if constexpr (n == 2) {
    v[0] = fmaxf(v[0], __shfl_xor_sync(kAllLanes, v[0], 1));
  } else {
#pragma unroll
    for (int i = 0; i < n / 4; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, odd ? v[i] : v[n / 4 + i], 1);
      v[i] = fmaxf(odd ? v[n / 4 + i] : v[i], other);
    }
  }
}

// Four results of round_product or round_value.
template <bool kAway>
__device__ __forceinline__ uint32_t saturate_rounded(int v0, int v1, int v2, int v3) {
  if (kAway) return saturate4(v0, v1, v2, v3);
  uint32_t high, word;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(v3), "r"(v2));
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(v1), "r"(v0), "r"(high));
  return word ^ 0x80808080u;
}

// A row factor with 22 significant bits: then factor * kMagic is exact and one FMA turns an
// accumulator into factor * sum, correctly rounded.
struct RowFactor {
  float factor;
  float offset;
};
__device__ __forceinline__ RowFactor row_factor(float exponent) {
  const float f = __int_as_float(__float_as_int(exp2_approx(exponent)) & ~3);
  return {f, -kMagic * f};
}

// ------------------------------------------------------------------------------------------------
// Matrix instructions
// ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma_int8(int (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The same with d starting at `c`, four times kMagicInt.
__device__ __forceinline__ void mma_int8_first(int (&d)[4], const uint4& a, uint32_t b0,
                                               uint32_t b1, const int4& c) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c.x), "r"(c.y), "r"(c.z),
        "r"(c.w));
}

__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ uint4 load16_global(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}

// ------------------------------------------------------------------------------------------------
// Shapes
// ------------------------------------------------------------------------------------------------

struct Shape {
  int batch;
  int length;
  int nheads;
  int headdim;
  int ngroups;
  int d_state;
  int chunk;
  int chunks;
  int tiled;    // Scan2 left of the diagonal tiles in INT8
  int away;     // rounding half_away
  int dynamic;  // scaling "dynamic"

  __host__ __device__ int p_tiles() const { return headdim / kTileP; }
  __host__ __device__ int lanes() const { return batch * nheads * p_tiles(); }  // (b, h, P tile)
  // Units per (batch, chunk, group).
  __host__ __device__ size_t b_units() const { return size_t(chunk / 32) * (d_state / 16); }
  __host__ __device__ size_t c_units() const { return size_t(chunk / 16) * (d_state / 32); }
  __host__ __device__ size_t cb8_units() const { return size_t(chunk / 16) * (chunk / 32); }
  __host__ __device__ size_t cb16_units() const { return size_t(chunk / 16) * (chunk / 16); }
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
  static constexpr int kWarpColumns = kN == 64 ? 2 : 4;
  static constexpr int kWarpRows = kWarps / kWarpColumns < 4 ? kWarps / kWarpColumns : 4;
  static constexpr int kStateWarps = kWarpRows * kWarpColumns;  // the others have no part
  static constexpr int kStateThreads = 32 * kStateWarps;
  static constexpr int kRows = 4 / kWarpRows;
  static constexpr int kSteps = kN / 32 / kWarpColumns;

  // Shared memory behind the tables, in 16-byte words.
  static constexpr int kRWords = kN * kTileP / 16;
  static constexpr int kXsWords = kChunk * kTileP / 16;
  static constexpr int kX16Words = kChunk * kTileP / 8;
  static constexpr int kXtWords = (kChunk - kScanTile) * kTileP / 16;

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
// kernels: `volatile` keeps the compiler from carrying it along.
__device__ __forceinline__ int lane_of_work() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return blockIdx.z * gridDim.x + x;
}

__device__ __forceinline__ Item make_item(const Shape& s, int lane_index, int c) {
  Item it;
  const int bh = s.headdim == kTileP ? lane_index : lane_index / 2;
  it.pt = s.headdim == kTileP ? 0 : lane_index % 2;
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

// ------------------------------------------------------------------------------------------------
// Preparation, once per group: CB in operand order, B transposed
// ------------------------------------------------------------------------------------------------

// 16 consecutive int8 of a row, zeros where the row does not exist.
__device__ __forceinline__ uint4 row_bytes(const int8_t* base, int row, int valid, size_t pitch,
                                           int column) {
  if (row >= valid) return make_uint4(0, 0, 0, 0);
  return load16_global(base + size_t(row) * pitch + column);
}

// One warp: CB of rows 16i .. 16i + 15 and columns 32s .. 32s + 31, in units of cb_scale: as one
// INT8 unit (left of the diagonal tile) or as FP16 units of 16 columns each, rounded to integers
// with scaling "static".
template <int kN, bool kAway>
__device__ __forceinline__ void prepare_cb_unit(const Shape& shape, const int8_t* b_rows,
                                                const int8_t* c_rows, int valid, int i, int s,
                                                float requantizer, uint4* cb8, uint4* cb16) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const size_t pitch = size_t(shape.ngroups) * kN;
  int acc[4][4];
#pragma unroll
  for (int v = 0; v < 4; ++v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[v][e] = 0;
  }
#pragma unroll
  for (int n64 = 0; n64 < kN / 64; ++n64) {
    const int column = 64 * n64 + 16 * t;
    const uint4 a0 = row_bytes(c_rows, 16 * i + g, valid, pitch, column);
    const uint4 a1 = row_bytes(c_rows, 16 * i + g + 8, valid, pitch, column);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      // Columns in the order that leaves four consecutive ones in a lane's accumulators.
      const int k = 32 * s + 16 * (v / 2) + 4 * (g / 2) + 2 * (v % 2) + g % 2;
      const uint4 b = row_bytes(b_rows, k, valid, pitch, column);
      mma_int8(acc[v], make_uint4(a0.x, a1.x, a0.y, a1.y), b.x, b.y);
      mma_int8(acc[v], make_uint4(a0.z, a1.z, a0.w, a1.w), b.z, b.w);
    }
  }
  float cb[4][4];
#pragma unroll
  for (int v = 0; v < 4; ++v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) cb[v][e] = __fmul_rn(static_cast<float>(acc[v][e]), requantizer);
  }
  if (shape.tiled && s / 2 < i / 4) {
    int q[4][4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
#pragma unroll
      for (int e = 0; e < 4; ++e) q[v][e] = round_int<kAway>(cb[v][e]);
    }
    cb8[(size_t(i) * (shape.chunk / 32) + s) * 32 + lane] =
        make_uint4(saturate4(q[0][0], q[0][1], q[1][0], q[1][1]),
                   saturate4(q[0][2], q[0][3], q[1][2], q[1][3]),
                   saturate4(q[2][0], q[2][1], q[3][0], q[3][1]),
                   saturate4(q[2][2], q[2][3], q[3][2], q[3][3]));
    return;
  }
  const auto to_fp16 = [&](float v) {
    if (shape.dynamic) return fmaxf(-kMaxFp16, fminf(v, kMaxFp16));
    return static_cast<float>(max(kAway ? -127 : -128, min(round_int<kAway>(v), 127)));
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (2 * s + half > i) break;
    uint32_t word[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int v = 2 * half + w / 2, e = 2 * (w % 2);
      const __half2 pair = __floats2half2_rn(to_fp16(cb[v][e]), to_fp16(cb[v][e + 1]));
      word[w] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    cb16[(size_t(i) * (shape.chunk / 16) + 2 * s + half) * 32 + lane] =
        make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// One warp: B^T of positions 32s .. 32s + 31 and 64 state columns as four units. A lane owns every
// second of 16 columns and packs four positions of each with byte permutations.
__device__ __forceinline__ void prepare_b_units(const int8_t* b_rows, int valid, size_t pitch,
                                                int d_state, int s, int n64, uint4* b_units) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t select = g % 2 ? 0x7351 : 0x6240;
  uint32_t word[2][8];  // [positions +0 / +16][column of the run of 16, own parity]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row[i] =
          row_bytes(b_rows, 32 * s + 16 * half + 4 * t + i, valid, pitch, 64 * n64 + 16 * (g / 2));
    }
    const uint32_t* r0 = reinterpret_cast<const uint32_t*>(&row[0]);
    const uint32_t* r1 = reinterpret_cast<const uint32_t*>(&row[1]);
    const uint32_t* r2 = reinterpret_cast<const uint32_t*>(&row[2]);
    const uint32_t* r3 = reinterpret_cast<const uint32_t*>(&row[3]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t low = __byte_perm(r0[w], r1[w], select);  // bytes e of both, then e + 2
      const uint32_t high = __byte_perm(r2[w], r3[w], select);
      word[half][2 * w] = __byte_perm(low, high, 0x5410);
      word[half][2 * w + 1] = __byte_perm(low, high, 0x7632);
    }
  }
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    b_units[(size_t(s) * (d_state / 16) + 4 * n64 + u) * 32 + lane] =
        make_uint4(word[0][2 * u], word[1][2 * u], word[0][2 * u + 1], word[1][2 * u + 1]);
  }
}

// One warp: C of rows 16i .. 16i + 15 as units, one per 32 state columns.
template <int kN>
__device__ __forceinline__ void prepare_c_units(const int8_t* c_rows, int valid, size_t pitch,
                                                int i, uint4* c_units) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint4* unit = c_units + size_t(i) * (kN / 32) * 32 + lane;
#pragma unroll
  for (int n64 = 0; n64 < kN / 64; ++n64) {
    const uint4 low = row_bytes(c_rows, 16 * i + g, valid, pitch, 64 * n64 + 16 * t);
    const uint4 high = row_bytes(c_rows, 16 * i + g + 8, valid, pitch, 64 * n64 + 16 * t);
    unit[2 * n64 * 32] = make_uint4(low.x, high.x, low.y, high.y);
    unit[(2 * n64 + 1) * 32] = make_uint4(low.z, high.z, low.w, high.w);
  }
}

// Jobs of one warp for one (batch, chunk, group): CB units of the lower triangle, C, then B.
__host__ __device__ inline int cb_jobs(int chunk) {
  const int steps = chunk / 32;  // rows 32r + 0..31 meet steps 0 .. r
  return steps * (steps + 1);
}
__host__ __device__ inline int c_jobs(int chunk) { return chunk / 16; }
__host__ __device__ inline int b_jobs(int chunk, int d_state) {
  return (chunk / 32) * (d_state / 64);
}

struct PrepareGroup {
  const int8_t* b_q;
  const int8_t* c_q;
  const float* b_scale;
  const float* c_scale;
  const float* cb_scale;
  uint4* b_units;  // null: not wanted
  uint4* c_units;  // null: CB and C not wanted
  uint4* cb8;
  uint4* cb16;
};

template <int kN>
__device__ __forceinline__ void prepare_group(const Shape& shape, const PrepareGroup& p,
                                              int group_chunk_index, int job) {
  const int group = group_chunk_index % shape.ngroups;
  const int bc = group_chunk_index / shape.ngroups;
  const int c = bc % shape.chunks, b = bc / shape.chunks;
  const int start = c * shape.chunk;
  const int valid = min(shape.chunk, shape.length - start);
  const size_t pitch = size_t(shape.ngroups) * kN;
  const size_t first = (size_t(b) * shape.length + start) * pitch + size_t(group) * kN;
  if (p.c_units != nullptr) {
    if (job < cb_jobs(shape.chunk)) {
      int r = 0;  // rows of 32; job counts (row of 16, step) pairs row by row
      while (job >= (r + 1) * (r + 2)) ++r;
      const int rest = job - r * (r + 1);
      const int i = 2 * r + rest / (r + 1), s = rest % (r + 1);
      const float requantizer =
          __fdiv_rn(__fmul_rn(p.c_scale[group], p.b_scale[group]), p.cb_scale[group]);
      uint4* cb8 = p.cb8 + group_chunk_index * shape.cb8_units() * 32;
      uint4* cb16 = p.cb16 + group_chunk_index * shape.cb16_units() * 32;
      if (shape.away) {
        prepare_cb_unit<kN, true>(shape, p.b_q + first, p.c_q + first, valid, i, s, requantizer,
                                  cb8, cb16);
      } else {
        prepare_cb_unit<kN, false>(shape, p.b_q + first, p.c_q + first, valid, i, s, requantizer,
                                   cb8, cb16);
      }
      return;
    }
    job -= cb_jobs(shape.chunk);
    if (job < c_jobs(shape.chunk)) {
      prepare_c_units<kN>(p.c_q + first, valid, pitch, job,
                          p.c_units + group_chunk_index * shape.c_units() * 32);
      return;
    }
    job -= c_jobs(shape.chunk);
  }
  if (p.b_units != nullptr && job < b_jobs(shape.chunk, kN)) {
    prepare_b_units(p.b_q + first, valid, pitch, kN, job / (kN / 64), job % (kN / 64),
                    p.b_units + group_chunk_index * shape.b_units() * 32);
  }
}

// ------------------------------------------------------------------------------------------------
// Shared memory of a work item
// ------------------------------------------------------------------------------------------------

struct alignas(16) Tables {
  int4 magic;  // four times kMagicInt: from memory, or the compiler sets it anew for each product
  // Of the decay, in the order of PreparedTables.
  float w_state[kMaxChunk];   // exp(a_last - a_k) * dt_k, times kTinyW if static and half-even
  float w_tile[kMaxChunk];    // likewise, with the decay r at the end of k's tile for a_last
  float a2[kMaxChunk];        // a * log2(e)
  float a2_less[kMaxChunk];   // a2 - log2(dt * cb_scale)
  float tile_end[kMaxTiles];  // r * log2(e) of each tile
  float gate;                 // exp(a_last)
  float b_scale, c_scale, cb_scale;
  // Of the channels, in the order of PreparedTables; only what "static" prepares: the first of
  // `tiles`, which is all of them, and all else.
  float x_inverse[kTileP];         // 1 / scale, times kTinyV if static and half-even
  float state_inverse[kTileP];     // static only
  float state_multiplier[kTileP];  // accumulator -> state
  float scan1_scale[kTileP];
  struct Tile {
    float x_inverse[kTileP];
    float scale[kTileP];  // INT8 Scan2 accumulator -> y
  } tiles[kMaxTiles - 1];
  // Of the item.
  float d_skip;
  int group_chunk;
  size_t y_offset;  // of its first row and channel

  // From one tile to the next.
  __device__ static int tile_pitch(const Shape& shape) {
    return shape.dynamic ? sizeof(Tile) / sizeof(float) : 0;
  }
};

// Those that an op has; of the channels, null with scaling "dynamic".
struct Scales {
  const float* x_scale;       // (H, P)
  const float* x_tile_scale;  // (H, P)
  const float* state_scale;   // (H, P)
  const float* b_scale;       // (G)
  const float* c_scale;       // (G)
  const float* cb_scale;      // (G)
  const float* d_skip;        // (H)
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
template <bool kState, bool kScan>
__device__ __forceinline__ void fill_channel(const Shape& shape, int hp, int group,
                                             const Scales& scales, bool integer_gate,
                                             float* first) {
  const float tiny_v = shape.away ? 1.0f : kTinyV;
  if (kState) {
    const float x_scale = scales.x_scale[hp], state_scale = scales.state_scale[hp];
    const float multiplier = __fmul_rn(x_scale, scales.b_scale[group]);
    first[0] = __frcp_rn(x_scale) * tiny_v;
    first[kTileP] = __frcp_rn(state_scale);
    first[2 * kTileP] = integer_gate ? __fdiv_rn(multiplier, state_scale) : multiplier;
    if (kScan) first[3 * kTileP] = __fmul_rn(scales.c_scale[group], state_scale);
  }
  if (kScan && shape.tiled) {
    const float tile_scale = scales.x_tile_scale[hp];
    first[4 * kTileP] = __frcp_rn(tile_scale) * tiny_v;
    first[5 * kTileP] = tile_scale * scales.cb_scale[group];
  }
}

// What one thread sets.
__device__ __forceinline__ void finish_tables(const Shape& shape, const Item& it,
                                              const Scales& scales, Tables& tables) {
  tables.magic = make_int4(kMagicInt, kMagicInt, kMagicInt, kMagicInt);
  if (scales.d_skip != nullptr) tables.d_skip = scales.d_skip[it.h];
  tables.group_chunk = it.group_chunk;
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
      const float r = a[first + min(k | (kScanTile - 1), last)];
      const float a2 = a_k * kLog2e;
      tables.w_tile[k] = decay_weight(r, a_k, dt_k) * weight_factor(shape);
      tables.a2[k] = a2;
      tables.a2_less[k] = a2 - __log2f(dt_k * scales.cb_scale[it.group]);
      if (k % kScanTile == 0) tables.tile_end[k / kScanTile] = r * kLog2e;
    }
  }
  // The scales go to the last warps: the first have more to do elsewhere.
  const int p = threadIdx.x - (P::kThreads - kTileP);
  if (p < 0) return;
  if (!shape.dynamic) {
    fill_channel<kState, kScan>(shape, it.p0 + p, it.group, scales, integer_gate,
                                tables.x_inverse + p);
  }
  if (p > 0) return;
  if (kState) tables.b_scale = scales.b_scale[it.group];
  if (kScan) tables.cb_scale = scales.cb_scale[it.group];
  finish_tables(shape, it, scales, tables);
}

// Tables that a kernel before has written, for all items: the decay of (batch, chunk, head) and,
// with scaling "static", the constants of 64 channels of a head.
struct PreparedTables {
  float* decay;
  float* channels;

  __host__ __device__ static int decay_floats(int chunk) { return 4 * chunk + kMaxTiles + 4; }
  static constexpr int kChannelFloats = 6 * kTileP;

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
                                            const PreparedTables& prepared, const Scales& scales,
                                            Tables& tables) {
  constexpr int kPerArray = P::kChunk / 4, kDecayWords = P::kChunk + (kMaxTiles + 4) / 4;
  constexpr int kWords = kDecayWords + PreparedTables::kChannelFloats / 4;
  const float* decay = prepared.decay_of(shape, it.b, it.c, it.h);
  const float* channels = prepared.channels_of(shape, it.h, it.pt);
  const int words = shape.dynamic ? kDecayWords : kWords;
  for (int i = threadIdx.x; i < words; i += P::kThreads) {
    const bool of_decay = i < kDecayWords;
    const float* from = of_decay ? decay + 4 * i : channels + 4 * (i - kDecayWords);
    const int array = i / kPerArray;
    float* to = !of_decay           ? tables.x_inverse + 4 * (i - kDecayWords)
                : i < 4 * kPerArray ? tables.w_state + array * kMaxChunk + 4 * (i % kPerArray)
                                    : tables.tile_end + 4 * (i - 4 * kPerArray);
    cp_async_16(shared_address(to), from);
  }
  cp_async_commit();
  if (threadIdx.x == 0) finish_tables(shape, it, scales, tables);
}

// ------------------------------------------------------------------------------------------------
// Phase 1: x into operand order
// ------------------------------------------------------------------------------------------------

// The 16 * kRowTiles positions of a warp. Rows past the end repeat the last: their dt is 0.
template <typename P>
__device__ __forceinline__ void load_x(const Shape& shape, const Item& it, const __half* x,
                                       uint4 (&raw)[P::kRowTiles][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int pitch = shape.nheads * shape.headdim, last = it.valid - 1;
  const __half* first =
      x + (size_t(it.b) * shape.length + it.start) * pitch + it.p0 + 8 * (g / 2 + 4 * (g % 2));
#pragma unroll
  for (int j = 0; j < P::kRowTiles; ++j) {
    const int row = 16 * (P::kRowTiles * warp + j) + 4 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[j][i] = load16_global(first + min(row + i, last) * pitch);
  }
}

// The largest |x . w| of each channel over the positions of a warp, weights being positive: a row
// of 64 channels per warp in `tops`, those of the state and then those of the tiles.
template <typename P, bool kState, bool kTile>
__device__ __forceinline__ void store_tops(const uint4 (&raw)[P::kRowTiles][4],
                                           const Tables& tables, float* tops) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float state[8] = {}, tile[8] = {};
#pragma unroll
  for (int j = 0; j < P::kRowTiles; ++j) {
    const int first = 16 * (P::kRowTiles * warp + j) + 4 * t;
    const float4 w_state = *reinterpret_cast<const float4*>(tables.w_state + first);
    const float4 w_tile = *reinterpret_cast<const float4*>(tables.w_tile + first);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = reinterpret_cast<const uint32_t*>(&raw[j][k])[i];
        const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&bits));
        if (kState) {
          const float w = reinterpret_cast<const float*>(&w_state)[k];
          state[2 * i] = fmaxf(state[2 * i], fabsf(__fmul_rn(v.x, w)));
          state[2 * i + 1] = fmaxf(state[2 * i + 1], fabsf(__fmul_rn(v.y, w)));
        }
        if (kTile) {
          const float w = reinterpret_cast<const float*>(&w_tile)[k];
          tile[2 * i] = fmaxf(tile[2 * i], fabsf(__fmul_rn(v.x, w)));
          tile[2 * i + 1] = fmaxf(tile[2 * i + 1], fabsf(__fmul_rn(v.y, w)));
        }
      }
    }
  }
  float2* own = reinterpret_cast<float2*>(tops + warp * kTileP + 8 * (g / 2 + 4 * (g % 2)) + 2 * t);
  if (kState) {
    quad_max(state);
    *own = make_float2(state[0], state[1]);
  }
  if (kTile) {
    quad_max(tile);
    own[P::kWarps * kTileP / 2] = make_float2(tile[0], tile[1]);
  }
}

// Whether a warp's positions are in INT8 tiles: the last tile has no rows below its diagonal tile.
template <typename P>
__device__ __forceinline__ bool has_tile(const Shape& shape) {
  return shape.tiled && 16 * P::kRowTiles * int(threadIdx.x / 32) < P::kChunk - kScanTile;
}

// The scales of x in a chunk and in its tiles, scaling "dynamic". `tops` is scratch memory of two
// rows of 64 floats per warp, free after the next synchronisation. Synchronises once.
template <typename P, bool kState, bool kScan>
__device__ __forceinline__ void find_scales(const Shape& shape, const uint4 (&raw)[P::kRowTiles][4],
                                            float* tops, Tables& tables) {
  if (kScan && has_tile<P>(shape)) {
    store_tops<P, kState, true>(raw, tables, tops);
  } else if (kState) {
    store_tops<P, true, false>(raw, tables, tops);
  }
  __syncthreads();
  constexpr int kWarpsOfTile = kScanTile / (16 * P::kRowTiles);
  const int tiles = kScan && shape.tiled ? P::kChunk / kScanTile - 1 : 0;
  for (int i = threadIdx.x; i < (kState + tiles) * kTileP; i += P::kThreads) {
    const int p = i % kTileP, tile = i / kTileP - kState;
    if (kState && tile < 0) {
      float top = 0.0f;
#pragma unroll
      for (int warp = 0; warp < P::kWarps; ++warp) top = fmaxf(top, tops[warp * kTileP + p]);
      const DynamicScale scale = dynamic_scale(top);
      tables.x_inverse[p] = scale.inverse;
      tables.state_multiplier[p] = __fmul_rn(scale.step, tables.b_scale);
    } else {
      const float* own = tops + (P::kWarps + tile * kWarpsOfTile) * kTileP + p;
      float top = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarpsOfTile; ++warp) top = fmaxf(top, own[warp * kTileP]);
      const DynamicScale scale = dynamic_scale(top);
      tables.tiles[tile].x_inverse[p] = scale.inverse;
      tables.tiles[tile].scale[p] = __fmul_rn(scale.step, tables.cb_scale);
    }
  }
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

// A warp's positions as units [step of 32][pair of column blocks]; as A (kRows) or as B operand.
template <typename P, bool kRows>
__device__ __forceinline__ void quantize_units(const Shape& shape,
                                               const uint4 (&raw)[P::kRowTiles][4],
                                               const float* inverse, const float* weights,
                                               uint4* units) {
  constexpr int kJobs = P::kRowTiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float* own_inverse = inverse + 8 * (g / 2 + 4 * (g % 2));
  uint2 words[kJobs][4];
#pragma unroll
  for (int j = 0; j < kJobs; ++j) {
    const float4 w = *reinterpret_cast<const float4*>(weights + 16 * (kJobs * warp + j) + 4 * t);
    if (shape.dynamic) {
      if (shape.away) {
        quantize_words<true, true>(raw[j], own_inverse, w, words[j]);
      } else {
        quantize_words<false, true>(raw[j], own_inverse, w, words[j]);
      }
    } else if (shape.away) {
      quantize_words<true, false>(raw[j], own_inverse, w, words[j]);
    } else {
      quantize_words<false, false>(raw[j], own_inverse, w, words[j]);
    }
  }
  uint4* unit = units + kJobs * warp / 2 * 4 * 32 + lane;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kJobs == 2) {
      const uint2 low = words[0][i], high = words[kJobs - 1][i];
      unit[i * 32] = kRows ? make_uint4(low.x, low.y, high.x, high.y)
                           : make_uint4(low.x, high.x, low.y, high.y);
    } else {
      uint32_t* word = reinterpret_cast<uint32_t*>(unit + i * 32);
      const int half = warp % 2;
      word[kRows ? 2 * half : half] = words[0][i].x;
      word[kRows ? 2 * half + 1 : half + 2] = words[0][i].y;
    }
  }
}

// xs, xt: units [step of 32][pair of column blocks], A and B operands.
template <typename P, bool kState, bool kScan>
__device__ __forceinline__ void quantize_x(const Shape& shape, const uint4 (&raw)[P::kRowTiles][4],
                                           const Tables& tables, uint4* xs, uint4* xt) {
  const int warp = threadIdx.x / 32;
  if (kState) quantize_units<P, true>(shape, raw, tables.x_inverse, tables.w_state, xs);
  if (!kScan) return;
  if (has_tile<P>(shape)) {
    const int tile = 16 * P::kRowTiles * warp / kScanTile;
    const float* inverse = tables.tiles[0].x_inverse + tile * Tables::tile_pitch(shape);
    quantize_units<P, false>(shape, raw, inverse, tables.w_tile, xt);
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

// ------------------------------------------------------------------------------------------------
// Phase 2: the chunk state
// ------------------------------------------------------------------------------------------------

template <typename P>
using StateInt = int[P::kRows][P::kSteps][4][4];

// Operands of B^T some steps ahead of their use.
template <typename P>
struct StateOperands {
  static constexpr int kStepsOfChunk = P::kChunk / 32;
  static constexpr int kWanted = 8 / P::kSteps;  // 64 registers
  static constexpr int kAhead = kWanted < kStepsOfChunk ? kWanted : kStepsOfChunk;
  uint4 b[kAhead][P::kSteps * 2];

  __device__ __forceinline__ void load(const uint4* unit, int s) {
#pragma unroll
    for (int pair = 0; pair < 2 * P::kSteps; ++pair) {
      b[s % kAhead][pair] = load16_global(unit + (s * (P::kN / 16) + pair) * 32);
    }
  }
  __device__ __forceinline__ const uint4* unit(const uint4* b_units) const {
    return b_units + P::first_step() * 2 * 32 + threadIdx.x % 32;
  }
  __device__ __forceinline__ void load_first(const uint4* b_units) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(unit(b_units), s);
  }
};

// acc (read as FP32) = kMagic + Q(w . x)^T . B_q.
template <typename P>
__device__ __forceinline__ void state_product(const uint4* xs, const uint4* b_units,
                                              StateOperands<P>& operands, StateInt<P>& acc) {
  const uint4* a_unit = xs + P::first_row() * 32 + threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < P::kRows; ++row) {
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[row][step][v][e] = kMagicInt;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < P::kChunk / 32; ++s) {
    uint4 a[P::kRows];
#pragma unroll
    for (int row = 0; row < P::kRows; ++row) a[row] = load16(a_unit + (4 * s + row) * 32);
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint4 b = operands.b[s % operands.kAhead][2 * step + pair];
#pragma unroll
        for (int row = 0; row < P::kRows; ++row) {
          mma_int8(acc[row][step][2 * pair], a[row], b.x, b.y);
          mma_int8(acc[row][step][2 * pair + 1], a[row], b.z, b.w);
        }
      }
    }
    if (s + operands.kAhead < P::kChunk / 32) {
      operands.load(operands.unit(b_units), s + operands.kAhead);
    }
  }
}

// ------------------------------------------------------------------------------------------------
// Phase 3: y
// ------------------------------------------------------------------------------------------------

// FP16 weights CB . exp(a_m - a_k) . dt_k of 16 columns, as A operand. `position` is the first of
// the lane's columns, counted from the first of the lane's rows (used with kDiagonal only).
template <bool kDiagonal>
__device__ __forceinline__ uint4 scan_weights(const uint4& cb, const float4& less, float a0,
                                              float a1, int position, float d_skip) {
  uint4 weights;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t bits = reinterpret_cast<const uint32_t*>(&cb)[w];
    float2 v = __half22float2(*reinterpret_cast<const __half2*>(&bits));
    const float am = w % 2 ? a1 : a0;
    float e0 = am - (w / 2 ? less.z : less.x), e1 = am - (w / 2 ? less.w : less.y);
    if (kDiagonal) {
      const int past = position + 2 * (w / 2) - 8 * (w % 2);  // columns right of the diagonal
      if (past > 0) e0 = -INFINITY;
      if (past + 1 > 0) e1 = -INFINITY;
      v.x = fmaf(v.x, exp2_approx(e0), past == 0 ? d_skip : 0.0f);
      v.y = fmaf(v.y, exp2_approx(e1), past + 1 == 0 ? d_skip : 0.0f);
    } else {
      v.x *= exp2_approx(e0);
      v.y *= exp2_approx(e1);
    }
    const __half2 packed = __floats2half2_rn(v.x, v.y);
    reinterpret_cast<uint32_t*>(&weights)[w] = *reinterpret_cast<const uint32_t*>(&packed);
  }
  return weights;
}

// The rows of y of a warp, 16 at a time. With two blocks of rows they are paired so that every warp
// has the same number of products left of and on the diagonal.
template <typename P>
struct RowScan {
  static constexpr int kStepsOfC = P::kN / 32;
  // Loaded ahead for the next 16 rows.
  uint4 c[kStepsOfC];
  uint4 cb_0, cb_1;   // CB of the first tile left of the diagonal tile
  uint4 cb_diagonal;  // CB of the first 16 columns in FP16

  __device__ __forceinline__ static int tile_of(int m) {
    const int warp = threadIdx.x / 32;
    return m == 0 ? warp : 2 * P::kWarps - 1 - warp;
  }
  // First column block of 16 in FP16.
  __device__ __forceinline__ static int first_diagonal(const Shape& shape, int tile) {
    return shape.tiled ? tile / 4 * 4 : 0;
  }
  __device__ __forceinline__ static const uint4* unit8_of(const uint4* cb8, int group_chunk,
                                                          int tile) {
    return cb8 + (group_chunk * (P::kChunk / 16) + tile) * (P::kChunk / 32) * 32 + threadIdx.x % 32;
  }
  __device__ __forceinline__ static const uint4* unit16_of(const uint4* cb16, int group_chunk,
                                                           int tile, int s) {
    return cb16 + ((group_chunk * (P::kChunk / 16) + tile) * (P::kChunk / 16) + s) * 32 +
           threadIdx.x % 32;
  }

  __device__ __forceinline__ void load_c(const uint4* c_units, int group_chunk, int tile) {
    const uint4* unit = c_units + (group_chunk * (P::kChunk / 16) + tile) * kStepsOfC * 32;
#pragma unroll
    for (int q = 0; q < kStepsOfC; ++q) c[q] = load16_global(unit + q * 32 + threadIdx.x % 32);
  }
  __device__ __forceinline__ void load_left(const uint4* unit8) {
    cb_0 = load16_global(unit8);
    cb_1 = load16_global(unit8 + 32);
  }

  // For the first rows; before run, as early as registers allow.
  __device__ __forceinline__ void load_first(const Shape& shape, int group_chunk,
                                             const uint4* c_units, const uint4* cb8,
                                             const uint4* cb16) {
    const int tile = tile_of(0);
    load_c(c_units, group_chunk, tile);
    load_left(unit8_of(cb8, group_chunk, tile));
    cb_diagonal = load16_global(unit16_of(cb16, group_chunk, tile, first_diagonal(shape, tile)));
  }

  __device__ __forceinline__ void run(const Shape& shape, const Item& it, const uint4* c_units,
                                      const uint4* cb8, const uint4* cb16, const Tables& tables,
                                      const uint4* xt, const uint4* x16, const uint4* r_units,
                                      __half* y_out) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int4 magic = tables.magic;
    const volatile Tables& place = tables;  // read when needed: the loops need the registers
#pragma unroll 1
    for (int m = 0; m < P::kRowTiles; ++m) {
      const int tile = tile_of(m);
      if (16 * tile >= it.valid) break;  // so are the rows of m + 1
      const float a0 = tables.a2[16 * tile + g], a1 = tables.a2[16 * tile + g + 8];
      const int group_chunk = place.group_chunk;
      const bool more = m + 1 < P::kRowTiles;

      float y[8][4];
      {  // Scan1
        int acc[8][4];
#pragma unroll
        for (int q = 0; q < kStepsOfC; ++q) {
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            const uint4 r = load16(r_units + (q * 4 + pair) * 32 + lane);
            if (q == 0) {
              mma_int8_first(acc[2 * pair], c[q], r.x, r.y, magic);
              mma_int8_first(acc[2 * pair + 1], c[q], r.z, r.w, magic);
            } else {
              mma_int8(acc[2 * pair], c[q], r.x, r.y);
              mma_int8(acc[2 * pair + 1], c[q], r.z, r.w);
            }
          }
        }
        if (more) load_c(c_units, group_chunk, tile_of(m + 1));
        const RowFactor f0 = row_factor(a0), f1 = row_factor(a1);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float2 s0 = *reinterpret_cast<const float2*>(tables.scan1_scale + 8 * t + 2 * pair);
          const float2 s1 =
              *reinterpret_cast<const float2*>(tables.scan1_scale + 32 + 8 * t + 2 * pair);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const RowFactor& f = e < 2 ? f0 : f1;
            const float2& scale = e % 2 ? s1 : s0;
            y[2 * pair][e] = fmaf(__int_as_float(acc[2 * pair][e]), f.factor, f.offset) * scale.x;
            y[2 * pair + 1][e] =
                fmaf(__int_as_float(acc[2 * pair + 1][e]), f.factor, f.offset) * scale.y;
          }
        }
      }

      // Scan2 left of the diagonal tile: INT8, the row factor in the epilogue.
      const int left = shape.tiled ? tile / 4 : 0;
      const uint4* unit8 = unit8_of(cb8, group_chunk, tile);
      const uint4* x_unit = xt + lane;
      const float* end = tables.tile_end;
      const float* tile_scale = tables.tiles[0].scale + 8 * t;
#pragma unroll 1
      for (int k64 = 0; k64 < left; ++k64) {
        unit8 += 2 * 32;
        const uint4 a_0 = cb_0, a_1 = cb_1;
        if (k64 + 1 < left) load_left(unit8);
        const float r = *end;
        const RowFactor f0 = row_factor(a0 - r), f1 = row_factor(a1 - r);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          int acc[2][4];
          const uint4 x_0 = load16(x_unit + pair * 32), x_1 = load16(x_unit + (4 + pair) * 32);
          mma_int8_first(acc[0], a_0, x_0.x, x_0.y, magic);
          mma_int8_first(acc[1], a_0, x_0.z, x_0.w, magic);
          mma_int8(acc[0], a_1, x_1.x, x_1.y);
          mma_int8(acc[1], a_1, x_1.z, x_1.w);
          const float2 s0 = *reinterpret_cast<const float2*>(tile_scale + 2 * pair);
          const float2 s1 = *reinterpret_cast<const float2*>(tile_scale + 32 + 2 * pair);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const RowFactor& f = e < 2 ? f0 : f1;
            const float2& scale = e % 2 ? s1 : s0;
            y[2 * pair][e] =
                fmaf(fmaf(__int_as_float(acc[0][e]), f.factor, f.offset), scale.x, y[2 * pair][e]);
            y[2 * pair + 1][e] = fmaf(fmaf(__int_as_float(acc[1][e]), f.factor, f.offset), scale.y,
                                      y[2 * pair + 1][e]);
          }
        }
        x_unit += 8 * 32;
        ++end;
        tile_scale += Tables::tile_pitch(shape);
      }

      // Scan2 on the diagonal tile: FP16, the decay element by element; D on the diagonal itself.
      if (more) load_left(unit8_of(cb8, group_chunk, tile_of(m + 1)));
      int s = first_diagonal(shape, tile);
      const uint4* unit16 = unit16_of(cb16, group_chunk, tile, s);
      x_unit = x16 + s * 4 * 32 + lane;
      const float4* less = reinterpret_cast<const float4*>(tables.a2_less + 16 * s + 4 * t);
      const auto accumulate = [&](const uint4& weights) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const uint4 x = load16(x_unit + pair * 32);
          mma_fp16(y[2 * pair], weights, x.x, x.y);
          mma_fp16(y[2 * pair + 1], weights, x.z, x.w);
        }
      };
#pragma unroll 1
      for (; s < tile; ++s) {
        unit16 += 32;
        const uint4 cb = cb_diagonal;
        cb_diagonal = load16_global(unit16);
        accumulate(scan_weights<false>(cb, *less, a0, a1, 0, 0.0f));
        x_unit += 4 * 32;
        less += 4;
      }
      const uint4 cb = cb_diagonal;
      if (more) {
        const int next = tile_of(m + 1);
        cb_diagonal =
            load16_global(unit16_of(cb16, group_chunk, next, first_diagonal(shape, next)));
      }
      accumulate(scan_weights<true>(cb, *less, a0, a1, 4 * t - g, tables.d_skip));

      const int pitch = shape.nheads * shape.headdim;
      __half* out = y_out + place.y_offset + (16 * tile + g) * pitch + 8 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (16 * tile + g + 8 * half >= it.valid) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint4 word;
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            const __half2 packed =
                __floats2half2_rn(y[2 * pair][2 * half + e], y[2 * pair + 1][2 * half + e]);
            reinterpret_cast<uint32_t*>(&word)[pair] = *reinterpret_cast<const uint32_t*>(&packed);
          }
          *reinterpret_cast<uint4*>(out + 8 * half * pitch + 32 * e) = word;
        }
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------
// dt and its cumulative decay
// ------------------------------------------------------------------------------------------------

constexpr int kCumsumHeads = kWarps;  // one warp per head

struct Cumsum {
  const __half* zxbcdt;  // (B, L, row_stride)
  const float* dt_bias;
  const float* decay;  // A
  int row_stride;
  int dt_column;
  float dt_min;
  float dt_max;
};

// A sum to about 48 bits: the reference adds in FP64, which these chips do slowly.
struct WideSum {
  float high;
  float low;
  __device__ __forceinline__ void add(float h, float l) {
    const float sum = __fadd_rn(high, h);
    const float part = __fsub_rn(sum, high);
    const float error = __fadd_rn(__fsub_rn(high, __fsub_rn(sum, part)), __fsub_rn(h, part));
    low = __fadd_rn(__fadd_rn(low, l), error);
    high = sum;
  }
};

// dt and a of one chunk of eight heads: a lane owns kPerLane consecutive positions of one head and
// hands them to `sink`. Past the end of the sequence dt is 0 and a stays.
template <int kPerLane, class Sink>
__device__ __forceinline__ void cumsum_chunk(const Shape& shape, const Cumsum& p, int b, int c,
                                             int first_head, __half (*raw)[kMaxChunk + 8],
                                             const Sink& sink) {
  const int start = c * shape.chunk, valid = min(shape.chunk, shape.length - start);
  const int heads = min(kCumsumHeads, shape.nheads - first_head);
  const int row = threadIdx.x;
  if (row < valid) {
    const size_t offset =
        (size_t(b) * shape.length + start + row) * p.row_stride + p.dt_column + first_head;
    if (heads == kCumsumHeads && p.row_stride % 8 == 0 && (p.dt_column + first_head) % 8 == 0) {
      const uint4 bits = load16_global(p.zxbcdt + offset);
#pragma unroll
      for (int h = 0; h < kCumsumHeads; ++h)
        raw[h][row] = reinterpret_cast<const __half*>(&bits)[h];
    } else {
      for (int h = 0; h < heads; ++h) raw[h][row] = p.zxbcdt[offset + h];
    }
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = first_head + warp;
  if (warp >= heads) return;
  const float bias = p.dt_bias[h], rate = p.decay[h];
  float dt[kPerLane];
  WideSum local[kPerLane];
  WideSum sum = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int k = lane * kPerLane + i;
    const float v = __fadd_rn(k < valid ? __half2float(raw[warp][k]) : 0.0f, bias);
    const float softplus = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
    dt[i] = k < valid ? fminf(fmaxf(softplus, p.dt_min), p.dt_max) : 0.0f;
    const float product = __fmul_rn(rate, dt[i]);
    sum.add(product, fmaf(rate, dt[i], -product));
    local[i] = sum;
  }
  WideSum before = sum;  // of all lanes up to this one, then without it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float high = __shfl_up_sync(kAllLanes, before.high, distance);
    const float low = __shfl_up_sync(kAllLanes, before.low, distance);
    if (lane >= distance) before.add(high, low);
  }
  before.high = __shfl_up_sync(kAllLanes, before.high, 1);
  before.low = __shfl_up_sync(kAllLanes, before.low, 1);
  if (lane == 0) before = {0.0f, 0.0f};

  float a[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    local[i].add(before.high, before.low);
    a[i] = __fadd_rn(local[i].high, local[i].low);
  }
  sink(b, c, h, dt, a);
}

// Writes dt and a as tensors (B, H, L).
struct DecaySink {
  const Shape& shape;
  float* dt;
  float* a;

  template <int kPerLane>
  __device__ __forceinline__ void operator()(int b, int c, int h, const float (&dt_k)[kPerLane],
                                             const float (&a_k)[kPerLane]) const {
    const int position = c * shape.chunk + threadIdx.x % 32 * kPerLane;
    const size_t first = (size_t(b) * shape.nheads + h) * shape.length + position;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2) {
      if (shape.length % 2 == 0 && position + i < shape.length) {
        *reinterpret_cast<float2*>(dt + first + i) = make_float2(dt_k[i], dt_k[i + 1]);
        *reinterpret_cast<float2*>(a + first + i) = make_float2(a_k[i], a_k[i + 1]);
        continue;
      }
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        if (position + j >= shape.length) return;
        dt[first + j] = dt_k[j];
        a[first + j] = a_k[j];
      }
    }
  }
};

// Writes what the items of a chunk and head look up: the decay part of Tables.
struct TableSink {
  const Shape& shape;
  const PreparedTables& tables;
  const Scales& scales;

  template <int kPerLane>
  __device__ __forceinline__ void operator()(int b, int c, int h, const float (&dt)[kPerLane],
                                             const float (&a)[kPerLane]) const {
    constexpr int kChunk = 32 * kPerLane, kLanesOfTile = kScanTile / kPerLane;
    const int lane = threadIdx.x % 32;
    const float a_last = __shfl_sync(kAllLanes, a[kPerLane - 1], 31);
    const float r = __shfl_sync(kAllLanes, a[kPerLane - 1], lane | (kLanesOfTile - 1));
    const float factor = weight_factor(shape);
    const int group = h / (shape.nheads / shape.ngroups);
    const float cb_scale = scales.cb_scale[group];
    float* to = tables.decay_of(shape, b, c, h);
    float4 row;  // an array of four, or a half of it, at a time
#pragma unroll
    for (int array = 0; array < 4; ++array) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float a2 = a[i] * kLog2e;
        const float v = array == 0   ? decay_weight(a_last, a[i], dt[i]) * factor
                        : array == 1 ? decay_weight(r, a[i], dt[i]) * factor
                        : array == 2 ? a2
                                     : a2 - __log2f(dt[i] * cb_scale);
        reinterpret_cast<float*>(&row)[i % 4] = v;
        float* at = to + array * kChunk + lane * kPerLane + i;
        if (i % 4 == 3) *reinterpret_cast<float4*>(at - 3) = row;
        if (kPerLane == 2 && i == 1) *reinterpret_cast<float2*>(at - 1) = make_float2(row.x, row.y);
      }
    }
    to += 4 * kChunk;
    if (lane % kLanesOfTile == 0) to[lane / kLanesOfTile] = r * kLog2e;
    if (lane == 0) {
      *reinterpret_cast<float4*>(to + kMaxTiles) =
          make_float4(expf(a_last), scales.b_scale[group], scales.c_scale[group], cb_scale);
    }
  }
};

template <class Sink>
__device__ __forceinline__ void cumsum_block(const Shape& shape, const Cumsum& p, int block,
                                             __half (*raw)[kMaxChunk + 8], const Sink& sink) {
  const int head_blocks = (shape.nheads + kCumsumHeads - 1) / kCumsumHeads;
  const int first_head = block % head_blocks * kCumsumHeads;
  const int bc = block / head_blocks, c = bc % shape.chunks, b = bc / shape.chunks;
  if (shape.chunk == 256) {
    cumsum_chunk<8>(shape, p, b, c, first_head, raw, sink);
  } else if (shape.chunk == 128) {
    cumsum_chunk<4>(shape, p, b, c, first_head, raw, sink);
  } else {
    cumsum_chunk<2>(shape, p, b, c, first_head, raw, sink);
  }
}

inline int cumsum_blocks(const Shape& shape) {
  return shape.batch * shape.chunks * int(ceil_div(shape.nheads, kCumsumHeads));
}

// ------------------------------------------------------------------------------------------------
// Passing: one step of the recurrence for one state value
// ------------------------------------------------------------------------------------------------

constexpr int kGateBits = 7;

// The FP32 carry: one multiplication and one addition, each rounded.
__device__ __forceinline__ float pass_real(float carry, float gate, float state) {
  return __fadd_rn(__fmul_rn(gate, carry), state);
}

// The released integer carry: halves of the shifted product go up.
__device__ __forceinline__ int pass_integer(int carry, int gate, int state) {
  return ((carry * gate + (1 << (kGateBits - 1))) >> kGateBits) + state;
}

__device__ __forceinline__ int integer_gate(float gate, bool away) {
  return round_to_int8(gate * (1 << kGateBits), away);
}

// A start state in steps of its scale, rounded but not saturated.
__device__ __forceinline__ int integer_carry(float state, float inverse, bool away) {
  const float v = __fmul_rn(state, inverse);
  if (!away) return __float2int_rn(v);
  return __float2int_rz(__fadd_rn(v, copysignf(0.5f, v)));
}

__device__ __forceinline__ int saturate(int carry, bool away) {
  return max(min(carry, 127), away ? -127 : -128);
}

// Eight state values in a row, FP16 or FP32.
__device__ __forceinline__ void load_state8(const void* base, size_t index, bool fp32,
                                            float (&v)[8]) {
  if (fp32) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
    const float4 low = p[0], high = p[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  } else {
    const uint4 bits = load16(static_cast<const __half*>(base) + index);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __half2float(reinterpret_cast<const __half*>(&bits)[i]);
  }
}

__device__ __forceinline__ void store_state8(void* base, size_t index, bool fp32,
                                             const float (&v)[8]) {
  if (fp32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
    p[0] = make_float4(v[0], v[1], v[2], v[3]);
    p[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    uint4 bits;
#pragma unroll
    for (int i = 0; i < 8; ++i) reinterpret_cast<__half*>(&bits)[i] = __float2half_rn(v[i]);
    *reinterpret_cast<uint4*>(static_cast<__half*>(base) + index) = bits;
  }
}

// ------------------------------------------------------------------------------------------------
// Launchers: what all of them check
// ------------------------------------------------------------------------------------------------

// Fills `shape`, or refuses. scan_tile = chunk stands for an op without tiles.
inline int make_shape(const char* op, int batch, int length, int nheads, int headdim, int ngroups,
                      int d_state, int chunk, int scan_tile, int rounding, int scaling,
                      Shape* shape) {
  if (batch < 1 || length < 1 || nheads < 1 || ngroups < 1 || nheads % ngroups != 0) {
    return refuse("%s: batch %d, length %d, %d heads in %d groups", op, batch, length, nheads,
                  ngroups);
  }
  if (headdim != 64 && headdim != 128) return refuse("%s: headdim %d, not 64 or 128", op, headdim);
  if (d_state != 64 && d_state != 128 && d_state != 256) {
    return refuse("%s: d_state %d, not 64, 128 or 256", op, d_state);
  }
  if (chunk != 64 && chunk != 128 && chunk != 256) {
    return refuse("%s: chunk_size %d, not 64, 128 or 256", op, chunk);
  }
  if (scan_tile != chunk && scan_tile != kScanTile) {
    return refuse("%s: scan_tile %d, not %d or the chunk size %d", op, scan_tile, kScanTile, chunk);
  }
  if (rounding != SSDI8_HALF_EVEN && rounding != SSDI8_HALF_AWAY) {
    return refuse("%s: rounding %d", op, rounding);
  }
  if (scaling != SSDI8_SCALING_STATIC && scaling != SSDI8_SCALING_DYNAMIC) {
    return refuse("%s: scaling %d", op, scaling);
  }
  *shape = {batch,
            length,
            nheads,
            headdim,
            ngroups,
            d_state,
            chunk,
            static_cast<int>(ceil_div(length, chunk)),
            scan_tile < chunk,
            rounding == SSDI8_HALF_AWAY,
            scaling == SSDI8_SCALING_DYNAMIC};
  return SSDI8_OK;
}

inline int check_gate(const char* op, int gate, const Shape& shape) {
  if (gate == SSDI8_GATE_Q0_7 && shape.dynamic) {
    return refuse("%s: scaling dynamic with gate Q0.7", op);
  }
  if (gate == SSDI8_GATE_FP32 || gate == SSDI8_GATE_Q0_7) return SSDI8_OK;
  return refuse("%s: gate %d", op, gate);
}

// Scaling "static" needs its inputs.
inline int check_scale(const char* op, const Shape& shape, const char* name, const float* scale) {
  if (shape.dynamic || scale != nullptr) return SSDI8_OK;
  return refuse("%s: scaling static needs %s", op, name);
}

// Grants `kernel` its dynamic shared memory; call before each launch.
template <typename Kernel>
cudaError_t grant_shared(Kernel* kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

// Bytes of scratch memory, handed out in 256-byte steps.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_CUH_
