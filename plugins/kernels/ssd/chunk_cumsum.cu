// dt = clamp(softplus(dt_raw + dt_bias)), a_k = sum_{j <= k in its chunk} A . dt_j.
//
// zxbcdt (B, L, R) FP16, dt_raw its H columns from dt_column on; dt, a (B, H, L) FP32. One block
// per eight heads of one chunk: rows are read 16 bytes at a time and turned in shared memory, one
// warp sums one head. Sums carry a second FP32 word, in place of the FP64 of the reference: a
// differs by one rounding of the sum at most.

#include "ssd.cuh"

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

namespace ssdi8 {
namespace {

__global__ __launch_bounds__(ssd::kThreads) void chunk_cumsum_kernel(ssd::Shape shape,
                                                                     ssd::Cumsum params, float* dt,
                                                                     float* a) {
  __shared__ __align__(16) __half raw[ssd::kCumsumHeads][ssd::kMaxChunk + 8];
  ssd::cumsum_block(shape, params, blockIdx.x, raw, ssd::DecaySink{shape, dt, a});
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_chunk_cumsum(const Ssdi8ChunkCumsumParams* p, void* stream) {
  using namespace ssdi8;
  ssd::Shape shape{};
  // headdim, groups and d_state play no part here
  if (int code =
          ssd::make_shape("chunk_cumsum", p->batch, p->length, p->nheads, 64, 1, 64, p->chunk_size,
                          SSDI8_ROUNDING_HALF_EVEN, SSDI8_SCALING_STATIC, &shape)) {
    return code;
  }
  if (p->dt_column < 0 || p->dt_column + p->nheads > p->row_stride) {
    return refuse("chunk_cumsum: columns %d to %d of %d", p->dt_column, p->dt_column + p->nheads,
                  p->row_stride);
  }
  const ssd::Cumsum cumsum = ssd::cumsum_of(*p);
  return check(launch(chunk_cumsum_kernel, ssd::cumsum_blocks(shape), ssd::kThreads, 0,
                      static_cast<cudaStream_t>(stream), shape, cumsum, p->dt, p->a),
               "chunk_cumsum");
}

size_t ssdi8_sizeof_chunk_cumsum(void) { return sizeof(Ssdi8ChunkCumsumParams); }
