// Causal attention with grouped queries over a cache of keys and values in INT8, to which a call
// appends its own tokens: ops/attention.py.
//
// caches (B, KV, T, d) INT8 with FP16 scales (B, KV, T); o (B, L, Q * d) FP16. Three kernels in the
// order of the stream: append.cuh writes the rows of this call, attend.cuh reads them with all
// others, and joins the ranges that the cache was split into if there are few queries.
//
// Nothing is computed on the host from the position, which lies on the device: one CUDA graph
// serves all tokens. How many blocks share the cache follows from its capacity; those behind the
// last token end at once.

#include <algorithm>

#include "../arena.cuh"
#include "../common.cuh"
#include "append.cuh"
#include "attend.cuh"

namespace ssdi8 {
namespace attention {
namespace {

constexpr int kMostSplits = 32;
// Rows of a KV head up to which warps share tokens instead of rows.
constexpr int kMostDecodeRows = 32;

int rows_of(const Ssdi8AttentionParams& p) { return p.length * (p.n_heads / p.n_kv_heads); }
bool is_decode(const Ssdi8AttentionParams& p) { return rows_of(p) <= kMostDecodeRows; }
int row_tiles(const Ssdi8AttentionParams& p) {
  return static_cast<int>(ceil_div(rows_of(p), is_decode(p) ? kRows : kAttendWarps * kRows));
}

// Enough blocks for two on each multiprocessor.
int splits_of(const Ssdi8AttentionParams& p) {
  int processors = 0;
  if (!is_decode(p) || multiprocessors(&processors) != cudaSuccess) return 1;
  const int64_t blocks = static_cast<int64_t>(row_tiles(p)) * p.n_kv_heads * p.batch;
  const int64_t wanted = std::min<int64_t>(ceil_div(2 * processors, blocks), kMostSplits);
  return static_cast<int>(std::min(wanted, ceil_div(p.capacity, kTile)));
}

// Rows of partial results, at most. Grows with batch and length alone, so that what the largest
// call needs is enough for all.
size_t most_parts(const Ssdi8AttentionParams& p) {
  int processors = 0;
  if (multiprocessors(&processors) != cudaSuccess) return 0;
  const int64_t tiles = ceil_div(std::min(rows_of(p), kMostDecodeRows), kRows);
  return (2 * processors + tiles * p.n_kv_heads * p.batch) * kRows;
}

struct Scratch {
  __half* q;
  float* partial;
  float2* maxima;
  size_t bytes;
};

Scratch carve(const Ssdi8AttentionParams& p) {
  Arena arena(p.workspace);
  Scratch s;
  const size_t rows = static_cast<size_t>(p.batch) * p.length * p.n_heads, parts = most_parts(p);
  s.q = arena.take<__half>(rows * p.head_dim);
  s.partial = arena.take<float>(parts * p.head_dim);
  s.maxima = arena.take<float2>(parts);
  s.bytes = arena.used();
  return s;
}

int refuse_sizes(const Ssdi8AttentionParams& p) {
  if (p.head_dim != 64 && p.head_dim != 80 && p.head_dim != 96 && p.head_dim != 128) {
    return refuse("attention: head_dim %d, not 64, 80, 96 or 128", p.head_dim);
  }
  if (p.batch < 1 || p.length < 1 || p.n_kv_heads < 1 || p.n_heads < 1 ||
      p.n_heads % p.n_kv_heads != 0) {
    return refuse("attention: batch %d, length %d, %d heads share %d", p.batch, p.length, p.n_heads,
                  p.n_kv_heads);
  }
  if (p.capacity < p.length) {
    return refuse("attention: a cache of %d tokens cannot take %d", p.capacity, p.length);
  }
  const int64_t columns = (static_cast<int64_t>(p.n_heads) + 2 * p.n_kv_heads) * p.head_dim;
  if (p.first_column < 0 || p.row_stride < p.first_column + columns) {
    return refuse("attention: row stride %d does not hold %lld columns from %d on", p.row_stride,
                  static_cast<long long>(columns), p.first_column);
  }
  if (!(p.rope_theta >= 0.0f)) return refuse("attention: rope_theta %g", p.rope_theta);
  if (p.rope_theta > 0.0f && p.capacity > kMostRotaryTokens) {
    return refuse("attention: rotary positions up to %d, not %d", kMostRotaryTokens, p.capacity);
  }
  return SSDI8_OK;
}

// The caches as they were, where the outputs are others.
cudaError_t copy_caches(const Ssdi8AttentionParams& p, cudaStream_t stream) {
  const size_t rows = static_cast<size_t>(p.batch) * p.n_kv_heads * p.capacity;
  const struct {
    void* to;
    const void* from;
    size_t bytes;
  } copies[] = {{p.k_cache_out, p.k_cache, rows * p.head_dim},
                {p.k_scale_out, p.k_scale, rows * sizeof(__half)},
                {p.v_cache_out, p.v_cache, rows * p.head_dim},
                {p.v_scale_out, p.v_scale, rows * sizeof(__half)}};
  for (const auto& copy : copies) {
    if (copy.to == copy.from) continue;
    const cudaError_t error =
        cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <int kHeadDim>
cudaError_t run(const Ssdi8AttentionParams& p, cudaStream_t stream) {
  const int splits = splits_of(p);
  const Scratch scratch = carve(p);
  if (const cudaError_t error = copy_caches(p, stream)) return error;

  const Append append = {static_cast<const __half*>(p.projected) + p.first_column,
                         p.position,
                         scratch.q,
                         p.k_cache_out,
                         static_cast<__half*>(p.k_scale_out),
                         p.v_cache_out,
                         static_cast<__half*>(p.v_scale_out),
                         p.length,
                         p.row_stride,
                         p.n_heads,
                         p.n_kv_heads,
                         p.capacity};
  const dim3 heads(p.length, ceil_div(p.n_heads + 2 * p.n_kv_heads, kAppendWarps), p.batch);
  const cudaError_t appended = launch(append_kernel<kHeadDim>, heads, kAppendWarps * kWarp, 0,
                                      stream, append, make_rotary(p.rope_theta, kHeadDim));
  if (appended != cudaSuccess) return appended;

  constexpr double kLog2e = 1.4426950408889634;
  const Attend attend = {scratch.q,
                         p.k_cache_out,
                         static_cast<const __half*>(p.k_scale_out),
                         p.v_cache_out,
                         static_cast<const __half*>(p.v_scale_out),
                         p.position,
                         static_cast<__half*>(p.o),
                         scratch.partial,
                         scratch.maxima,
                         p.length,
                         p.n_heads,
                         p.n_kv_heads,
                         p.capacity,
                         static_cast<float>(kLog2e / sqrt(static_cast<double>(kHeadDim)))};
  auto* kernel = is_decode(p) ? attend_kernel<kHeadDim, true> : attend_kernel<kHeadDim, false>;
  const size_t bytes =
      is_decode(p) ? shared_bytes<kHeadDim, true>() : shared_bytes<kHeadDim, false>();
  if (const cudaError_t error = grant_shared(kernel, bytes)) return error;
  const dim3 grid(row_tiles(p), p.n_kv_heads * p.batch, splits);
  const cudaError_t attended = launch(kernel, grid, kAttendThreads, bytes, stream, attend);
  if (attended != cudaSuccess || splits == 1) return attended;
  return launch(join_kernel<kHeadDim>, p.batch * p.length * p.n_heads, kHeadDim, 0, stream,
                scratch.partial, scratch.maxima, attend.o, splits);
}

}  // namespace
}  // namespace attention
}  // namespace ssdi8

int ssdi8_attention(const Ssdi8AttentionParams* p, void* stream) {
  using namespace ssdi8;
  using namespace ssdi8::attention;
  if (const int code = refuse_sizes(*p)) return code;
  auto* run_dim = p->head_dim == 64   ? run<64>
                  : p->head_dim == 80 ? run<80>
                  : p->head_dim == 96 ? run<96>
                                      : run<128>;
  return check(run_dim(*p, static_cast<cudaStream_t>(stream)), "attention");
}

size_t ssdi8_attention_workspace(const Ssdi8AttentionParams* p) {
  using namespace ssdi8::attention;
  return carve(*p).bytes;
}

size_t ssdi8_sizeof_attention(void) { return sizeof(Ssdi8AttentionParams); }
