// All of SSD: dt and its cumulative decay, chunk states, the recurrence between chunks, and y; for
// one token the recurrence on the unquantized state.
//
// x, y (B, L, H . P) FP16; b_q, c_q (B, L, G . N) INT8; zxbcdt (B, L, R) FP16 for dt; ssm_state and
// ssm_state_out (B, H, P, N) FP16 or FP32, possibly the same memory.
//
// L > 1, two launches. `prepare` computes what heads share or what costs little: dt and a, CB of
// the causal tiles, B and C in operand order. `scan` then does everything else for one chunk and 64
// channels of a head per block: x is read once, states and unquantized CB never exist in memory.
// The carry of the recurrence goes from chunk to chunk through a slot per (b, h, 64 channels): a
// warp publishes its part as soon as its chunk state is there, before y, so the chunks of a head
// overlap. Blocks are numbered so that a predecessor always has a smaller number and therefore has
// been started: waiting for it cannot deadlock. Chunk 256 has two plans: eight warps an item, two
// items on a processor; with fewer items than processors sixteen warps an item.
//
// L = 1: `step`, one pass over the state, 16 bytes per access.
//
// Other plans that were tried, with their times: benchmarks/README.md.

#include "ssd.cuh"
#include "ssd_scan_fp16.cuh"

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

namespace ssdi8 {
namespace {

using ssd::Item;
using ssd::Shape;
using ssd::Tables;

template <int kN>
__global__ __launch_bounds__(ssd::kThreads) void prepare_kernel(
    Shape shape, ssd::Cumsum cumsum, ssd::PrepareGroup group, ssd::Scales scales, bool integer_gate,
    ssd::PreparedTables tables, int cumsum_blocks, int* progress) {
  __shared__ __align__(16) __half raw[ssd::kCumsumHeads][ssd::kMaxChunk + 8];
  const int block = blockIdx.x;
  if (block < cumsum_blocks) {
    const int stride = cumsum_blocks * ssd::kThreads;
    const int flags = shape.lanes() * ssd::kFlags;
    for (int i = block * ssd::kThreads + threadIdx.x; i < flags; i += stride) {
      progress[i] = 0;
    }
    ssd::cumsum_block(shape, cumsum, block, raw, ssd::TableSink{shape, tables, scales});
    return;
  }
  const int jobs =
      ssd::cb_jobs(shape.chunk) + ssd::c_jobs(shape.chunk) + ssd::b_jobs(shape.chunk, kN);
  const int index = (block - cumsum_blocks) * ssd::kWarps + threadIdx.x / 32;
  const int group_jobs = shape.group_chunks() * jobs;
  if (index < group_jobs) {
    ssd::prepare_group<kN, false>(shape, group, index / jobs, index % jobs);
    return;
  }
  const int head_tile = index - group_jobs;  // 64 channels of a head
  const int h = head_tile / shape.p_tiles(), pt = head_tile % shape.p_tiles();
  if (shape.dynamic || h >= shape.nheads) return;
  for (int p = threadIdx.x % 32; p < ssd::kTileP; p += 32) {
    ssd::fill_channel<true>(shape, h * shape.headdim + pt * ssd::kTileP + p,
                            h / (shape.nheads / shape.ngroups), scales, integer_gate,
                            tables.channels_of(shape, h, pt) + p);
  }
}

struct Scan {
  const __half* x;
  ssd::PreparedTables tables;
  ssd::Scales scales;
  ssd::Carries carries;
  const uint4* b_units;
  const uint4* c_units;
  const uint4* cb_units;
  __half* y;
  bool integer_gate;
};

// The state that enters the chunk, as a lane has it: of each run both channels of a row.
template <typename P>
using Entering = float[P::kRows * P::kSteps][2][8];

// The carry between chunks: in real units, or with gate Q0.7 as the bits of INT32 values.
template <typename P, bool kInteger>
struct Carry : ssd::CarrySlot<P> {
  using Slot = ssd::CarrySlot<P>;
  static constexpr int kRuns = Slot::kRuns;
  static constexpr int kChannels = 2 * P::kRows;  // of a lane, side by side
  using Slot::it;
  using Slot::shape;

  const float* state_scale;
  Tables& tables;

  __device__ __forceinline__ Carry(const Scan& p, const Shape& shape, const Item& it, int lane,
                                   Tables& tables)
      : Slot(p.carries, shape, it, lane), state_scale(p.scales.state_scale), tables(tables) {}

  __device__ __forceinline__ void load(int run, int channel, int step, float (&v)[8]) const {
    Slot::load(run, channel, step, v);
    if (kInteger && it.c == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = __int_as_float(ssd::integer_carry(v[i], tables.state_inverse[channel], shape.away));
      }
    }
  }

  __device__ __forceinline__ void store(int run, int channel, int step, float (&v)[8]) const {
    if (kInteger && it.c + 1 == shape.chunks) {
      const float scale = state_scale[it.p0 + channel];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int q = ssd::saturate(__float_as_int(v[i]), shape.away);
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
    const int gate_q = kInteger ? ssd::integer_gate(gate, shape.away) : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float sum = __int_as_float(acc[i / 2][2 * r + i % 2]) - ssd::kMagic;
      const float state = __fmul_rn(sum, multiplier);
      if (kInteger) {
        after[i] = __int_as_float(
            ssd::pass_integer(__float_as_int(before[i]), gate_q, round_to_int8(state, shape.away)));
      } else {
        after[i] = ssd::pass_real(before[i], gate, state);
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
                      : ssd::round_value<kAway>(__fmul_rn(v[i], inverse));
    }
    if (kInteger) {
      return make_uint2(ssd::saturate4(q[0], q[1], q[2], q[3]),
                        ssd::saturate4(q[4], q[5], q[6], q[7]));
    }
    return make_uint2(ssd::saturate_rounded<kAway>(q[0], q[1], q[2], q[3]),
                      ssd::saturate_rounded<kAway>(q[4], q[5], q[6], q[7]));
  }

  // Moves the carry one chunk on, as early as it can be: the next chunk of the head waits for it.
  // No warp needs the part of another.
  __device__ __forceinline__ void pass(const ssd::StateInt<P>& acc, Entering<P>& entering) const {
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
    static_assert(P::kWarpColumns * ssd::kTileP <= ssd::kMaxChunk);
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
    ssd::quad_max(top);
    float* row = tops() + threadIdx.x / 32 % P::kWarpColumns * ssd::kTileP + P::channel(0);
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
        top = fmaxf(top, tops()[w * ssd::kTileP + channel]);
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

// What the presets edge-* ask for of a model with headdim 64 and one group. A kernel that knows it
// is half as long, which spares misses of the instruction cache.
bool is_usual(const Shape& shape, bool integer_gate) {
  return shape.dynamic && !shape.away && shape.headdim == ssd::kTileP && shape.ngroups == 1 &&
         !integer_gate;
}

template <typename P, bool kUsual>  // ssd::Plan
__global__ __launch_bounds__(P::kThreads, P::kBlocksPerSm) void scan_kernel(Shape given, Scan p) {
  Shape shape = given;
  if (kUsual) {
    shape.dynamic = 1;
    shape.away = 0;
    shape.headdim = ssd::kTileP;
    shape.ngroups = 1;
  }
  const bool integer_gate = !kUsual && p.integer_gate;
  SSDI8_DYNAMIC_SHARED(uint4, shared);
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  uint4* r_units = shared + sizeof(Tables) / sizeof(uint4);
  uint4* xs = r_units + P::kRWords;
  uint4* x16 = xs + P::kXsWords;

  if (ssd::lane_of_work() >= shape.lanes()) return;
  constexpr bool kAllPass = P::kStateWarps == P::kWarps;
  ssd::RowScan<P> rows;
  {
    const Item it = ssd::make_item(shape, ssd::lane_of_work(), ssd::chunk_of_work());
    uint4 raw[P::kRowTiles][4];
    ssd::load_x<P>(shape, it, p.x, raw);
    ssd::copy_tables<P>(shape, it, p.tables, tables);
    cp_async_wait<0>();
    __syncthreads();
    if (shape.dynamic) {
      ssd::find_scales<P>(raw, reinterpret_cast<float*>(xs), tables);
      __syncthreads();
    }
    ssd::quantize_x<P>(shape, raw, tables, xs);
    ssd::copy_x<P>(raw, x16);
  }
  {
    const int lane = ssd::lane_of_work();
    const Item it = ssd::make_item(shape, lane, ssd::chunk_of_work());
    const uint4* b_units = p.b_units + it.group_chunk * shape.b_units() * 32;
    ssd::StateOperands<P> operands;
    const bool passes = kAllPass || threadIdx.x / 32 < P::kStateWarps;
    if (passes) operands.load_first(b_units);
    __syncthreads();
    const Carry<P, true> integer_carry(p, shape, it, lane, tables);
    const Carry<P, false> carry(p, shape, it, lane, tables);
    Entering<P> entering;
    if (passes) {
      ssd::StateInt<P> acc;
      ssd::state_product<P>(xs, b_units, operands, acc);
      rows.load_first(it.group_chunk, p.c_units, p.cb_units);
      if (integer_gate) {
        integer_carry.pass(acc, entering);
        integer_carry.quantize(entering, r_units);
      } else {
        carry.pass(acc, entering);
        if (shape.dynamic) carry.store_tops(entering);
      }
    } else {
      rows.load_first(it.group_chunk, p.c_units, p.cb_units);
    }
    if (shape.dynamic) __syncthreads();
    if (passes && !integer_gate) carry.quantize(entering, r_units);
  }
  __syncthreads();
  rows.run(shape, p.c_units, p.cb_units, tables, x16, r_units, p.y);
}

// --- one token --------------------------------------------------------------------------------

constexpr int kStepThreads = 128;

struct Step {
  const __half* x;
  const int8_t* b_q;
  const int8_t* c_q;
  const __half* zxbcdt;
  const void* ssm_state;
  const float* dt_bias;
  const float* a_rate;
  const float* d_skip;
  const float* b_scale;
  const float* c_scale;
  __half* y;
  void* ssm_state_out;
  int nheads;
  int headdim;
  int ngroups;
  int row_stride;
  int dt_column;
  float dt_min;
  float dt_max;
};

// A row of N values takes N / 8 lanes; a warp takes kRows sets of rows, all loads first.
template <int kN, int kRows, bool kFp32>
__global__ __launch_bounds__(kStepThreads) void step_kernel(Step p) {
  constexpr int kLanesPerRow = kN / 8;
  constexpr int kRowsPerWarp = 32 / kLanesPerRow;
  constexpr int kBlockRows = kStepThreads / 32 * kRowsPerWarp * kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks_per_head = p.headdim / kBlockRows;
  const int bh = blockIdx.x / blocks_per_head;
  const int b = bh / p.nheads, h = bh % p.nheads, group = h / (p.nheads / p.ngroups);
  const int first =
      blockIdx.x % blocks_per_head * kBlockRows + warp * kRowsPerWarp * kRows + lane / kLanesPerRow;
  const int column = lane % kLanesPerRow * 8;

  float state[kRows][8];
  float x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const size_t row = size_t(bh) * p.headdim + first + r * kRowsPerWarp;
    ssd::load_state8(p.ssm_state, row * kN + column, kFp32, state[r]);
    x[r] = __half2float(p.x[row]);
  }
  const size_t bn = (size_t(b) * p.ngroups + group) * kN + column;
  const int2 b_bits = *reinterpret_cast<const int2*>(p.b_q + bn);
  const int2 c_bits = *reinterpret_cast<const int2*>(p.c_q + bn);
  const float raw = __half2float(p.zxbcdt[size_t(b) * p.row_stride + p.dt_column + h]);
  const float v = __fadd_rn(raw, p.dt_bias[h]);
  const float softplus = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
  const float dt = fminf(fmaxf(softplus, p.dt_min), p.dt_max);
  const float decay = expf(__fmul_rn(dt, p.a_rate[h]));
  const float b_scale = p.b_scale[group], c_scale = p.c_scale[group], d_skip = p.d_skip[h];
  float b_row[8], c_row[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    b_row[i] = __fmul_rn(static_cast<float>(reinterpret_cast<const int8_t*>(&b_bits)[i]), b_scale);
    c_row[i] = __fmul_rn(static_cast<float>(reinterpret_cast<const int8_t*>(&c_bits)[i]), c_scale);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const size_t row = size_t(bh) * p.headdim + first + r * kRowsPerWarp;
    const float dt_x = __fmul_rn(dt, x[r]);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      state[r][i] = __fadd_rn(__fmul_rn(state[r][i], decay), __fmul_rn(dt_x, b_row[i]));
      sum = fmaf(state[r][i], c_row[i], sum);
    }
    ssd::store_state8(p.ssm_state_out, row * kN + column, kFp32, state[r]);
#pragma unroll
    for (int offset = kLanesPerRow / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (column == 0) p.y[row] = __float2half_rn(fmaf(d_skip, x[r], sum));
  }
}

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

struct Workspace {
  ssd::PreparedTables tables;
  uint4* b_units;
  uint4* c_units;
  uint4* cb_units;
  uint4* carries;
  int* progress;
  size_t bytes;
};

Workspace carve(const Shape& shape, void* base) {
  ssd::Arena arena(base);
  const size_t heads = size_t(shape.batch) * shape.chunks * shape.nheads;
  Workspace w;
  w.tables.decay = arena.take<float>(heads * ssd::PreparedTables::decay_floats(shape.chunk));
  w.tables.channels = arena.take<float>(size_t(shape.nheads) * shape.p_tiles() *
                                        ssd::PreparedTables::kChannelFloats);
  w.b_units = arena.take<uint4>(shape.group_chunks() * shape.b_units() * 32);
  w.c_units = arena.take<uint4>(shape.group_chunks() * shape.c_units() * 32);
  w.cb_units = arena.take<uint4>(shape.group_chunks() * shape.cb_units() * 32);
  w.carries = arena.take<uint4>(size_t(shape.lanes()) * shape.d_state * ssd::kTileP / 4);
  w.progress = arena.take<int>(size_t(shape.lanes()) * ssd::kFlags);
  w.bytes = arena.used();
  return w;
}

template <typename P>
cudaError_t launch_scan(const Shape& shape, const Ssdi8SsdScanParams& p, int processors,
                        cudaStream_t stream) {
  const Workspace w = carve(shape, p.workspace);
  const ssd::Cumsum cumsum = ssd::cumsum_of(p);
  const ssd::PrepareGroup prepare = {p.b_q,      p.c_q,     p.b_scale, p.c_scale,
                                     p.cb_scale, w.b_units, w.c_units, w.cb_units};
  const ssd::Scales scales = {p.x_scale, p.state_scale, p.b_scale, p.c_scale, p.cb_scale, p.d_skip};
  const bool integer_gate = p.gate == SSDI8_GATE_Q0_7;
  const int cumsum_blocks = ssd::cumsum_blocks(shape);
  const size_t warps =
      shape.group_chunks() *
          (ssd::cb_jobs(shape.chunk) + ssd::c_jobs(shape.chunk) + ssd::b_jobs(shape.chunk, P::kN)) +
      (shape.dynamic ? 0 : size_t(shape.nheads) * shape.p_tiles());
  if (cudaError_t error =
          launch(prepare_kernel<P::kN>, cumsum_blocks + ceil_div(warps, ssd::kWarps), ssd::kThreads,
                 0, stream, shape, cumsum, prepare, scales, integer_gate, w.tables, cumsum_blocks,
                 w.progress)) {
    return error;
  }

  const Scan scan = {static_cast<const __half*>(p.x),
                     w.tables,
                     scales,
                     {p.ssm_state, p.ssm_state_out, w.carries, w.progress, p.state_fp32 != 0},
                     w.b_units,
                     w.c_units,
                     w.cb_units,
                     static_cast<__half*>(p.y),
                     integer_gate};
  constexpr size_t kWords = P::kRWords + P::kXsWords + P::kX16Words;
  constexpr size_t kBytes = sizeof(Tables) + kWords * sizeof(uint4);
  static_assert(kBytes <= kMaxSharedBytes);
  auto* kernel = scan_kernel<P, false>;
  if constexpr (P::kN == 128) {  // of all published models
    if (is_usual(shape, integer_gate)) kernel = scan_kernel<P, true>;
  }
  if (cudaError_t error = ssd::grant_shared(kernel, kBytes)) return error;
  const dim3 grid = ssd::scan_grid(shape, 2 * processors);
  return launch(kernel, grid, P::kThreads, kBytes, stream, shape, scan);
}

// Sixteen warps on an item halve its latency, eight twice per processor the time of many.
template <int kN>
cudaError_t launch_chunk(const Shape& shape, const Ssdi8SsdScanParams& p, cudaStream_t stream) {
  int processors = 0;
  if (cudaError_t error = multiprocessors(&processors)) return error;
  if (shape.chunk == 64) return launch_scan<ssd::Plan<kN, 1, 4>>(shape, p, processors, stream);
  if (shape.chunk == 128) return launch_scan<ssd::Plan<kN, 1, 8>>(shape, p, processors, stream);
  if constexpr (kN <= 128) {  // more state than that needs the registers of fewer warps
    if (shape.lanes() * shape.chunks <= processors) {
      return launch_scan<ssd::Plan<kN, 1, 16>>(shape, p, processors, stream);
    }
  }
  return launch_scan<ssd::Plan<kN, 2, 8>>(shape, p, processors, stream);
}

template <int kN>
cudaError_t launch_step(const Ssdi8SsdScanParams& p, cudaStream_t stream) {
  const Step step = {static_cast<const __half*>(p.x),
                     p.b_q,
                     p.c_q,
                     static_cast<const __half*>(p.zxbcdt),
                     p.ssm_state,
                     p.dt_bias,
                     p.a_rate,
                     p.d_skip,
                     p.b_scale,
                     p.c_scale,
                     static_cast<__half*>(p.y),
                     p.ssm_state_out,
                     p.nheads,
                     p.headdim,
                     p.ngroups,
                     p.row_stride,
                     p.dt_column,
                     p.dt_min,
                     p.dt_max};
  constexpr int kRows = 2;
  constexpr int kBlockRows = kStepThreads / 32 * (32 / (kN / 8)) * kRows;
  static_assert(64 % kBlockRows == 0, "a block stays inside one head");
  const int blocks = p.batch * p.nheads * (p.headdim / kBlockRows);
  auto* kernel = p.state_fp32 ? step_kernel<kN, kRows, true> : step_kernel<kN, kRows, false>;
  return launch(kernel, blocks, kStepThreads, 0, stream, step);
}

int make_shape(const Ssdi8SsdScanParams& p, Shape* shape) {
  return ssd::make_shape("ssd_scan", p.batch, p.length, p.nheads, p.headdim, p.ngroups, p.d_state,
                         p.chunk_size, p.rounding, p.scaling, shape);
}

}  // namespace
}  // namespace ssdi8

int ssdi8_ssd_scan(const Ssdi8SsdScanParams* p, void* stream) {
  using namespace ssdi8;
  ssd::Shape shape{};
  if (int code = make_shape(*p, &shape)) return code;
  if (int code = ssd::check_gate("ssd_scan", p->gate, shape)) return code;
  if (p->dt_column < 0 || p->dt_column + p->nheads > p->row_stride) {
    return refuse("ssd_scan: columns %d to %d of %d", p->dt_column, p->dt_column + p->nheads,
                  p->row_stride);
  }
  if (int code = ssd::check_scale("ssd_scan", shape, "x_scale", p->x_scale)) return code;
  if (int code = ssd::check_scale("ssd_scan", shape, "state_scale", p->state_scale)) return code;
  const auto enqueue = static_cast<cudaStream_t>(stream);
  if (shape.length == 1) {
    auto* launch = shape.d_state == 64    ? launch_step<64>
                   : shape.d_state == 128 ? launch_step<128>
                                          : launch_step<256>;
    return check(launch(*p, enqueue), "ssd_scan");
  }
  if (shape.fp16) return check(launch_ssd_scan_fp16(shape, *p, enqueue), "ssd_scan");
  auto* launch = shape.d_state == 64    ? launch_chunk<64>
                 : shape.d_state == 128 ? launch_chunk<128>
                                        : launch_chunk<256>;
  return check(launch(shape, *p, enqueue), "ssd_scan");
}

size_t ssdi8_ssd_scan_workspace(const Ssdi8SsdScanParams* p) {
  ssdi8::ssd::Shape shape{};
  if (p->length == 1 || ssdi8::make_shape(*p, &shape)) return 0;
  if (shape.fp16) return ssdi8::ssd_scan_fp16_workspace(shape);
  return ssdi8::carve(shape, nullptr).bytes;
}

size_t ssdi8_sizeof_ssd_scan(void) { return sizeof(Ssdi8SsdScanParams); }
