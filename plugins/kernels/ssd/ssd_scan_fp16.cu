// All of SSD with FP16 operands: scaling "none", in which no tensor of the recurrence is rounded to
// INT8. Also what INT8 has to beat.
//
// As ssd_scan.cu, in two launches: `prepare` computes what heads share, `scan` everything else for
// one chunk and 64 channels of a head per block. Nothing is quantized, so x is read into shared
// memory as it is, and two synchronisations remain. The chunk is ours to choose, because no
// scale depends on it: results differ by roundings alone.

#include <algorithm>

#include "ssd.cuh"
#include "ssd_scan_fp16.cuh"

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

namespace ssdi8 {
namespace {

using ssd::Item;
using ssd::Shape;

struct Operands {
  const uint4* b_units;
  const uint4* c_units;
  const uint4* cb_units;
};

template <int kN>
__global__ __launch_bounds__(ssd::kThreads) void prepare_kernel(Shape shape, ssd::Cumsum cumsum,
                                                                ssd::PrepareGroup group,
                                                                ssd::Scales scales, void* tables,
                                                                int cumsum_blocks, int* progress) {
  __shared__ __align__(16) __half raw[ssd::kCumsumHeads][ssd::kMaxChunk + 8];
  const int block = blockIdx.x;
  if (block < cumsum_blocks) {
    const int stride = cumsum_blocks * ssd::kThreads;
    const int flags = shape.lanes() * ssd::kFlags;
    for (int i = block * ssd::kThreads + threadIdx.x; i < flags; i += stride) progress[i] = 0;
    ssd::cumsum_block(shape, cumsum, block, raw, ssd::Fp16TableSink{shape, scales, tables});
    return;
  }
  const int index = (block - cumsum_blocks) * ssd::kWarps + threadIdx.x / 32;
  const int jobs =
      ssd::cb_jobs(shape.chunk) + ssd::c_jobs(shape.chunk) + ssd::b_jobs(shape.chunk, kN);
  if (index >= shape.group_chunks() * jobs) return;
  ssd::prepare_group<kN, true>(shape, group, index / jobs, index % jobs);
}

template <typename P>  // ssd::Plan
__global__ __launch_bounds__(P::kThreads, ssd::kFp16Resident<P>) void scan_kernel(
    Shape shape, const __half* x, const ssd::Fp16Tables<P::kChunk>* prepared, Operands operands,
    ssd::Carries carries, __half* y) {
  using Tables = ssd::Fp16Tables<P::kChunk>;
  SSDI8_DYNAMIC_SHARED(uint4, shared);
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  uint4* x16 = shared + sizeof(Tables) / sizeof(uint4);
  uint4* r16 = x16 + P::kX16Words;

  if (ssd::lane_of_work() >= shape.lanes()) return;
  ssd::Fp16RowScan<P> rows;
  // Each phase asks for the item again: the products need the registers.
  {
    ssd::StateReal<P> acc;
    {
      const Item it = ssd::make_item(shape, ssd::lane_of_work(), ssd::chunk_of_work());
      const uint4* b_units = operands.b_units + it.group_chunk * 2 * shape.b_units() * 32;
      ssd::Fp16StateOperands<P> state_operands;
      uint4 raw[P::kRowTiles][4];
      ssd::load_x<P>(shape, it, x, raw);
      const size_t index = (size_t(it.b) * shape.chunks + it.c) * shape.nheads + it.h;
      const auto* own = reinterpret_cast<const uint4*>(prepared + index);
      static_assert(sizeof(Tables) / sizeof(uint4) <= P::kThreads);
      if (threadIdx.x < sizeof(Tables) / sizeof(uint4)) {
        cp_async_16(shared_address(shared + threadIdx.x), own + threadIdx.x);
      }
      cp_async_commit();
      state_operands.load_first(b_units);
      ssd::copy_x<P>(raw, x16);
      cp_async_wait<0>();
      __syncthreads();
      ssd::fp16_state_product<P>(x16, tables.w_state, b_units, state_operands, acc);
    }
    const int lane = ssd::lane_of_work();
    const Item it = ssd::make_item(shape, lane, ssd::chunk_of_work());
    ssd::fp16_pass<P>(ssd::CarrySlot<P>(carries, shape, it, lane), acc, tables.gate, tables.b_scale,
                      r16);
  }
  const Item it = ssd::make_item(shape, ssd::lane_of_work(), ssd::chunk_of_work());
  const uint4* c_units = operands.c_units + it.group_chunk * 2 * shape.c_units() * 32;
  const uint4* cb_units = operands.cb_units + it.group_chunk * shape.cb_units() * 32;
  rows.load_first(c_units, cb_units);
  __syncthreads();
  rows.run(shape, c_units, cb_units, tables, x16, r16, y);
}

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

struct Workspace {
  void* tables;
  uint4* b_units;
  uint4* c_units;
  uint4* cb_units;
  uint4* carries;
  int* progress;
  size_t bytes;
};

template <int kChunk>
void* take_tables(Arena& arena, size_t count) {
  return arena.take<ssd::Fp16Tables<kChunk>>(count);
}

Workspace carve(const Shape& shape, void* base) {
  Arena arena(base);
  auto* take = shape.chunk == 128 ? take_tables<128> : take_tables<256>;
  Workspace w;
  w.tables = take(arena, size_t(shape.batch) * shape.chunks * shape.nheads);
  w.b_units = arena.take<uint4>(shape.group_chunks() * 2 * shape.b_units() * 32);
  w.c_units = arena.take<uint4>(shape.group_chunks() * 2 * shape.c_units() * 32);
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
  ssd::Scales scales{};
  scales.b_scale = p.b_scale;
  scales.c_scale = p.c_scale;
  scales.cb_scale = p.cb_scale;
  scales.d_skip = p.d_skip;
  const int cumsum_blocks = ssd::cumsum_blocks(shape);
  const size_t warps =
      shape.group_chunks() *
      (ssd::cb_jobs(shape.chunk) + ssd::c_jobs(shape.chunk) + ssd::b_jobs(shape.chunk, P::kN));
  if (cudaError_t error =
          launch(prepare_kernel<P::kN>, cumsum_blocks + ceil_div(warps, ssd::kWarps), ssd::kThreads,
                 0, stream, shape, cumsum, prepare, scales, w.tables, cumsum_blocks, w.progress)) {
    return error;
  }

  using Tables = ssd::Fp16Tables<P::kChunk>;
  constexpr size_t kBytes =
      sizeof(Tables) + (P::kX16Words + size_t(P::kN) * ssd::kTileP / 8) * sizeof(uint4);
  static_assert(kBytes <= kMaxSharedBytes);
  auto* kernel = scan_kernel<P>;
  if (cudaError_t error = grant_shared(kernel, kBytes)) return error;
  const dim3 grid = ssd::scan_grid(shape, ssd::kFp16Resident<P> * processors);
  return launch(kernel, grid, P::kThreads, kBytes, stream, shape, static_cast<const __half*>(p.x),
                static_cast<const Tables*>(w.tables), {w.b_units, w.c_units, w.cb_units},
                {p.ssm_state, p.ssm_state_out, w.carries, w.progress, p.state_fp32 != 0},
                static_cast<__half*>(p.y));
}

// Chunks of 256 hand the carry on half as often; chunks of 128 need fewer products, and their four
// warps wait for less. Where heads enough run side by side, they hide the carry.
constexpr int kChunks[] = {128, 256};

Shape with_chunk(Shape shape, int chunk) {
  shape.chunk = chunk;
  shape.chunks = static_cast<int>(ceil_div(shape.length, chunk));
  return shape;
}

template <int kN>
cudaError_t launch_plan(const Shape& shape, const Ssdi8SsdScanParams& p, cudaStream_t stream) {
  int processors = 0;
  if (cudaError_t error = multiprocessors(&processors)) return error;
  using Small = ssd::Plan<kN, 2, 4>;
  using Large = ssd::Plan<kN, 2, 8>;
  if (shape.lanes() >= ssd::kFp16Resident<Small> * processors) {
    return launch_scan<Small>(with_chunk(shape, Small::kChunk), p, processors, stream);
  }
  return launch_scan<Large>(with_chunk(shape, Large::kChunk), p, processors, stream);
}

}  // namespace

cudaError_t launch_ssd_scan_fp16(const Shape& shape, const Ssdi8SsdScanParams& p,
                                 cudaStream_t stream) {
  auto* launch = shape.d_state == 64    ? launch_plan<64>
                 : shape.d_state == 128 ? launch_plan<128>
                                        : launch_plan<256>;
  return launch(shape, p, stream);
}

// Of either chunk: how many multiprocessors there are is known when it runs.
size_t ssd_scan_fp16_workspace(const Shape& shape) {
  size_t most = 0;
  for (int chunk : kChunks) most = std::max(most, carve(with_chunk(shape, chunk), nullptr).bytes);
  return most;
}

}  // namespace ssdi8
