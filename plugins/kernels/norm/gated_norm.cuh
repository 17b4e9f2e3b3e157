// The gated norms of any width that has a rotation: gated_norm.cu.

#ifndef SSDI8_NORM_GATED_NORM_CUH_
#define SSDI8_NORM_GATED_NORM_CUH_

#include <stdint.h>

namespace ssdi8 {

// Where the gate stands: r = norm(y * silu(z)) * weight, or norm(y) * weight * silu(z).
enum class GatePlace { kBeforeNorm, kBehindNorm };

// The fields of Ssdi8RmsNormGatedParams and Ssdi8NormThenGateParams.
struct GatedNorm {
  const void* y;
  const void* zxbcdt;
  const float* weight;
  const float* scale;
  int8_t* quantized;
  float* token_scale;
  int tokens;
  int width;
  int row_stride;
  int ngroups;
  float eps;
  int rounding;
  int scaling;
};

template <typename Params>
GatedNorm gated_norm_of(const Params& p) {
  return {p.y,       p.zxbcdt,     p.weight,  p.scale, p.quantized, p.token_scale, p.tokens,
          p.d_inner, p.row_stride, p.ngroups, p.eps,   p.rounding,  p.scaling};
}

// Checks its arguments first.
int launch_gated_norm(const char* op, const GatedNorm& norm, GatePlace gate, void* stream);

}  // namespace ssdi8

#endif  // SSDI8_NORM_GATED_NORM_CUH_
