// y = exp(a_m) . C R  +  sum_{k <= m} CB . exp(a_m - a_k) . dt_k . x_k  +  D . x.
//
// x, y (B, L, H . P) FP16; b_q, c_q (B, L, G . N) INT8; dt, a (B, H, L) FP32; passed (B, C, H, P,
// N) INT8. CB = Q(C_q . B_q^T) is FP16, rounded to integers with scaling "static"; with "none"
// passed is FP16 too, and so are all products of the second launch. Two launches: CB of the causal
// tiles, once per group and in operand order, then one block per chunk and 64 channels of a head
// (ssd.cuh). D goes into the diagonal of the weighted CB before that is rounded to FP16.

#include "ssd.cuh"

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

namespace ssdi8 {
namespace {

using ssd::Item;
using ssd::Shape;
using ssd::Tables;

template <int kN, bool kFp16>
__global__ __launch_bounds__(ssd::kThreads) void cb_kernel(Shape shape, ssd::PrepareGroup params) {
  const int jobs = ssd::cb_jobs(shape.chunk) + ssd::c_jobs(shape.chunk);
  const int index = blockIdx.x * ssd::kWarps + threadIdx.x / 32;
  if (index >= shape.group_chunks() * jobs) return;
  ssd::prepare_group<kN, kFp16>(shape, params, index / jobs, index % jobs);
}

// The first of two channels of a lane. Where a tile has fewer than 64, the last two stand in for
// the others, of which nothing is stored.
__device__ __forceinline__ int passed_channel(int pair, int channels) {
  const int g = threadIdx.x % 32 / 4;
  return min(8 * (g / 2 + 4 * (g % 2)) + 2 * pair, channels - 2);
}

// The state entering the chunk, (channels, N) INT8 rows, as B operand of Scan1.
template <typename P>
__device__ __forceinline__ void load_passed(const int8_t* passed, int channels, uint4* r_units) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  for (int job = warp; job < P::kN / 16; job += P::kWarps) {
    const int n64 = job / 4, pair = job % 4;
    const int8_t* row = passed + passed_channel(pair, channels) * P::kN + 64 * n64 + 16 * t;
    const uint4 r0 = ssd::load16_global(row), r1 = ssd::load16_global(row + P::kN);
    uint4* unit = r_units + (n64 * 8 + pair) * 32 + lane;
    unit[0] = make_uint4(r0.x, r0.y, r1.x, r1.y);
    unit[4 * 32] = make_uint4(r0.z, r0.w, r1.z, r1.w);
  }
}

// The same in FP16: the units that fp16_pass writes.
template <typename P>
__device__ __forceinline__ void load_passed(const __half* passed, int channels, uint4* r16) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  for (int job = warp; job < P::kN / 8; job += P::kWarps) {
    const int run = job / 4, pair = job % 4;
    const __half* row =
        passed + passed_channel(pair, channels) * P::kN + 64 * (run / 2) + 16 * t + 8 * (run % 2);
    const uint4 r0 = ssd::load16_global(row), r1 = ssd::load16_global(row + P::kN);
    uint4* unit = r16 + (run * 8 + pair) * 32 + lane;
    unit[0] = make_uint4(r0.x, r0.y, r1.x, r1.y);
    unit[4 * 32] = make_uint4(r0.z, r0.w, r1.z, r1.w);
  }
}

// First row, in (B, C, H, P), of the state that enters the chunk of an item.
__device__ __forceinline__ size_t passed_row(const Shape& shape, const Item& it) {
  const size_t head = (size_t(it.b) * shape.chunks + it.c) * shape.nheads + it.h;
  return head * shape.headdim + it.pt * ssd::kTileP;
}

struct Scan {
  const __half* x;
  const float* dt;
  const float* a;
  const void* passed;  // INT8 or FP16
  const float* passed_scale;
  ssd::Scales scales;
  const uint4* c_units;
  const uint4* cb_units;
  __half* y;
};

template <typename P>  // ssd::Plan
__global__ __launch_bounds__(P::kThreads, P::kBlocksPerSm) void chunk_scan_kernel(Shape shape,
                                                                                  Scan p) {
  SSDI8_DYNAMIC_SHARED(uint4, shared);
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  uint4* r_units = shared + sizeof(Tables) / sizeof(uint4);
  uint4* x16 = r_units + P::kRWords;

  {
    const Item it = ssd::make_item(shape, ssd::lane_of_work(), ssd::chunk_of_work());
    uint4 raw[P::kRowTiles][4];
    ssd::load_x<P>(shape, it, p.x, raw);
    const size_t state = passed_row(shape, it);
    const int channels = shape.channels(it.pt);
    load_passed<P>(static_cast<const int8_t*>(p.passed) + state * P::kN, channels, r_units);
    ssd::fill_tables<P, false, true>(shape, it, p.dt, p.a, p.scales, false, tables);
    if (threadIdx.x < ssd::kTileP) {
      tables.scan1_scale[threadIdx.x] =
          __fmul_rn(p.scales.c_scale[it.group],
                    p.passed_scale[state + min(static_cast<int>(threadIdx.x), channels - 1)]);
    }
    ssd::copy_x<P>(raw, x16);
  }
  const Item it = ssd::make_item(shape, ssd::lane_of_work(), ssd::chunk_of_work());
  ssd::RowScan<P> rows;
  rows.load_first(it.group_chunk, p.c_units, p.cb_units);
  __syncthreads();
  rows.run(shape, p.c_units, p.cb_units, tables, x16, r_units, p.y);
}

// With scaling "none".
template <typename P>
__global__ __launch_bounds__(P::kThreads,
                             ssd::kFp16Resident<P>) void fp16_chunk_scan_kernel(Shape shape,
                                                                                Scan p) {
  using Tables = ssd::Fp16Tables<P::kChunk>;
  SSDI8_DYNAMIC_SHARED(uint4, shared);
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  uint4* r16 = shared + sizeof(Tables) / sizeof(uint4);
  uint4* x16 = r16 + 2 * P::kRWords;

  {
    const Item it = ssd::make_item(shape, ssd::lane_of_work(), ssd::chunk_of_work());
    uint4 raw[P::kRowTiles][4];
    ssd::load_x<P>(shape, it, p.x, raw);
    load_passed<P>(static_cast<const __half*>(p.passed) + passed_row(shape, it) * P::kN,
                   shape.channels(it.pt), r16);
    ssd::fill_fp16_tables<P, false, true>(shape, it, p.dt, p.a, p.scales, tables);
    ssd::copy_x<P>(raw, x16);
  }
  const Item it = ssd::make_item(shape, ssd::lane_of_work(), ssd::chunk_of_work());
  const uint4* c_units = p.c_units + it.group_chunk * 2 * shape.c_units() * 32;
  const uint4* cb_units = p.cb_units + it.group_chunk * shape.cb_units() * 32;
  ssd::Fp16RowScan<P> rows;
  rows.load_first(c_units, cb_units);
  __syncthreads();
  rows.run(shape, c_units, cb_units, tables, x16, r16, p.y);
}

struct Workspace {
  uint4* c_units;
  uint4* cb_units;
  size_t bytes;
};

Workspace carve(const Shape& shape, void* base) {
  Arena arena(base);
  Workspace w;
  w.c_units = arena.take<uint4>(shape.group_chunks() * (shape.fp16 + 1) * shape.c_units() * 32);
  w.cb_units = arena.take<uint4>(shape.group_chunks() * shape.cb_units() * 32);
  w.bytes = arena.used();
  return w;
}

template <int kN, bool kFp16>
cudaError_t launch_cb(const Shape& shape, const Ssdi8ChunkScanParams& p, const Workspace& w,
                      cudaStream_t stream) {
  const ssd::PrepareGroup prepare = {p.b_q,      p.c_q,   p.b_scale, p.c_scale,
                                     p.cb_scale, nullptr, w.c_units, w.cb_units};
  const size_t warps =
      shape.group_chunks() * (ssd::cb_jobs(shape.chunk) + ssd::c_jobs(shape.chunk));
  return launch(cb_kernel<kN, kFp16>, ceil_div(warps, ssd::kWarps), ssd::kThreads, 0, stream, shape,
                prepare);
}

Scan scan_of(const Ssdi8ChunkScanParams& p, const Workspace& w) {
  return {static_cast<const __half*>(p.x),
          p.dt,
          p.a,
          p.passed,
          p.passed_scale,
          {nullptr, nullptr, p.b_scale, p.c_scale, p.cb_scale, p.d_skip},
          w.c_units,
          w.cb_units,
          static_cast<__half*>(p.y)};
}

template <typename P>
cudaError_t launch_chunk_scan(const Shape& shape, const Ssdi8ChunkScanParams& p,
                              cudaStream_t stream) {
  const Workspace w = carve(shape, p.workspace);
  if (cudaError_t error = launch_cb<P::kN, false>(shape, p, w, stream)) return error;
  constexpr size_t kWords = P::kRWords + P::kX16Words;
  constexpr size_t kBytes = sizeof(Tables) + kWords * sizeof(uint4);
  static_assert(kBytes <= kMaxSharedBytes);
  auto* kernel = chunk_scan_kernel<P>;
  if (cudaError_t error = grant_shared(kernel, kBytes)) return error;
  return launch(kernel, dim3(shape.lanes(), shape.chunks), P::kThreads, kBytes, stream, shape,
                scan_of(p, w));
}

template <typename P>
cudaError_t launch_fp16_chunk_scan(const Shape& shape, const Ssdi8ChunkScanParams& p,
                                   cudaStream_t stream) {
  const Workspace w = carve(shape, p.workspace);
  if (cudaError_t error = launch_cb<P::kN, true>(shape, p, w, stream)) return error;
  constexpr size_t kBytes =
      sizeof(ssd::Fp16Tables<P::kChunk>) + (2 * P::kRWords + P::kX16Words) * sizeof(uint4);
  static_assert(kBytes <= kMaxSharedBytes);
  auto* kernel = fp16_chunk_scan_kernel<P>;
  if (cudaError_t error = grant_shared(kernel, kBytes)) return error;
  return launch(kernel, dim3(shape.lanes(), shape.chunks), P::kThreads, kBytes, stream, shape,
                scan_of(p, w));
}

template <int kN>
cudaError_t launch_chunk(const Shape& shape, const Ssdi8ChunkScanParams& p, cudaStream_t stream) {
  if (shape.fp16) {
    auto* launch = shape.chunk == 256   ? launch_fp16_chunk_scan<ssd::Plan<kN, 2, 8>>
                   : shape.chunk == 128 ? launch_fp16_chunk_scan<ssd::Plan<kN, 2, 4>>
                                        : launch_fp16_chunk_scan<ssd::Plan<kN, 2, 2>>;
    return launch(shape, p, stream);
  }
  if (shape.chunk == 256) return launch_chunk_scan<ssd::Plan<kN, 2, 8>>(shape, p, stream);
  if (shape.chunk == 128) return launch_chunk_scan<ssd::Plan<kN, 1, 8>>(shape, p, stream);
  return launch_chunk_scan<ssd::Plan<kN, 1, 4>>(shape, p, stream);
}

int make_shape(const Ssdi8ChunkScanParams& p, Shape* shape) {
  return ssd::make_shape("chunk_scan", p.batch, p.length, p.nheads, p.headdim, p.ngroups, p.d_state,
                         p.chunk_size, p.rounding, p.scaling, shape);
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_chunk_scan(const Ssdi8ChunkScanParams* p, void* stream) {
  using namespace ssdi8;
  ssd::Shape shape{};
  if (int code = make_shape(*p, &shape)) return code;
  auto* launch = shape.d_state == 64    ? launch_chunk<64>
                 : shape.d_state == 128 ? launch_chunk<128>
                                        : launch_chunk<256>;
  return check(launch(shape, *p, static_cast<cudaStream_t>(stream)), "chunk_scan");
}

size_t ssdi8_chunk_scan_workspace(const Ssdi8ChunkScanParams* p) {
  ssdi8::ssd::Shape shape{};
  if (ssdi8::make_shape(*p, &shape)) return 0;
  return ssdi8::carve(shape, nullptr).bytes;
}

size_t ssdi8_sizeof_chunk_scan(void) { return sizeof(Ssdi8ChunkScanParams); }
