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
// L = 1: step.cuh.
//
// Other plans that were tried, with their times: benchmarks/README.md.

#include "int8_carry.cuh"
#include "ssd.cuh"
#include "ssd_scan_fp16.cuh"
#include "step.cuh"

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
    const int hp = h * shape.headdim + pt * ssd::kTileP + min(p, shape.channels(pt) - 1);
    ssd::fill_channel<true>(shape, hp, h / (shape.nheads / shape.ngroups), scales, integer_gate,
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
    const ssd::Int8Carry<P, true> integer_carry(p.carries, p.scales.state_scale, shape, it, lane,
                                                tables);
    const ssd::Int8Carry<P, false> carry(p.carries, p.scales.state_scale, shape, it, lane, tables);
    ssd::Entering<P> entering;
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
  Arena arena(base);
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
  if (cudaError_t error = grant_shared(kernel, kBytes)) return error;
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
    auto* launch = shape.d_state == 64    ? ssd::launch_step<64>
                   : shape.d_state == 128 ? ssd::launch_step<128>
                                          : ssd::launch_step<256>;
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
