// Rows of the embedding for tokens, and the zero residual of the first norm.
//
// ids (T) INT32 in [0, V); hidden (T, D) FP16; residual (T, D) FP32. The table is FP16 (V, D), or
// INT8 in words (V, D / 4) with a scale per row: byte k of word i is column k * D / 4 + i, the
// lower three plus 128; hidden = FP16(FP32(q) * scale), as the reference rounds it. A block per
// token.

#include "../common.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kVector = 8;  // values per 16-byte load of FP16
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const __half* __restrict__ table, const int32_t* __restrict__ ids,
                     __half* __restrict__ hidden, float* __restrict__ residual, int d_model) {
  const int64_t source = static_cast<int64_t>(ids[blockIdx.x]) * d_model;
  const int64_t target = static_cast<int64_t>(blockIdx.x) * d_model;
  for (int column = threadIdx.x * kVector; column < d_model; column += kThreads * kVector) {
    *reinterpret_cast<uint4*>(hidden + target + column) =
        *reinterpret_cast<const uint4*>(table + source + column);
    float4* zeros = reinterpret_cast<float4*>(residual + target + column);
    zeros[0] = zeros[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

__global__ void __launch_bounds__(kThreads)
    embedding_int8_kernel(const int32_t* __restrict__ packed, const float* __restrict__ scales,
                          const int32_t* __restrict__ ids, __half* __restrict__ hidden,
                          float* __restrict__ residual, int d_model) {
  const int words = d_model / 4, id = ids[blockIdx.x];
  const float scale = scales[id];
  const int32_t* row = packed + static_cast<int64_t>(id) * words;
  const int64_t target = static_cast<int64_t>(blockIdx.x) * d_model;
  for (int i = threadIdx.x; i < words; i += kThreads) {
    const int word = row[i];
    const int q[4] = {(word & 255) - 128, (word >> 8 & 255) - 128, (word >> 16 & 255) - 128,
                      word >> 24};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      hidden[target + k * words + i] = __float2half_rn(__fmul_rn(static_cast<float>(q[k]), scale));
      residual[target + k * words + i] = 0.0f;
    }
  }
}

// What both tables have in common.
int refuse_lookup(const char* op, int tokens, int d_model) {
  if (d_model <= 0 || d_model % kVector != 0) {
    return refuse("%s: d_model %d is not a multiple of %d", op, d_model, kVector);
  }
  return tokens < 0 ? refuse("%s: tokens %d out of range", op, tokens) : SSDI8_OK;
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launchers
// ---------------------------------------------------------------------------------------------

int ssdi8_embedding(const Ssdi8EmbeddingParams* p, void* stream) {
  using namespace ssdi8;
  if (const int code = refuse_lookup("embedding", p->tokens, p->d_model)) return code;
  if (p->tokens == 0) return SSDI8_OK;
  return check(launch(embedding_kernel, p->tokens, kThreads, 0, static_cast<cudaStream_t>(stream),
                      static_cast<const __half*>(p->table), p->input_ids,
                      static_cast<__half*>(p->hidden), p->residual, p->d_model),
               "embedding");
}

int ssdi8_embedding_int8(const Ssdi8EmbeddingInt8Params* p, void* stream) {
  using namespace ssdi8;
  if (const int code = refuse_lookup("embedding_int8", p->tokens, p->d_model)) return code;
  if (p->tokens == 0) return SSDI8_OK;
  return check(launch(embedding_int8_kernel, p->tokens, kThreads, 0,
                      static_cast<cudaStream_t>(stream), p->packed, p->scale, p->input_ids,
                      static_cast<__half*>(p->hidden), p->residual, p->d_model),
               "embedding_int8");
}

size_t ssdi8_sizeof_embedding(void) { return sizeof(Ssdi8EmbeddingParams); }
size_t ssdi8_sizeof_embedding_int8(void) { return sizeof(Ssdi8EmbeddingInt8Params); }
