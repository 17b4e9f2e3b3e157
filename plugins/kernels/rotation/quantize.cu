// Rotation and quantization of a tensor that another op left in FP16: q = Q(R . x / token_scale).
//
// x (T, width) FP16, q (T, width) INT8, token_scale (T). See token.cuh.

#include "token.cuh"

namespace ssdi8 {
namespace {

struct Plain {
  const __half* x;
  int width;

  __device__ __forceinline__ void load(int64_t token, int e0, float (&v)[kVector]) const {
    load_channels(x + token * width + e0, true, v);
  }
};

}  // namespace
}  // namespace ssdi8

int ssdi8_quantize(const Ssdi8QuantizeParams* p, void* stream) {
  using namespace ssdi8;
  const Plain source = {static_cast<const __half*>(p->x), p->width};
  return rotate_and_quantize("quantize", source, *p, stream);
}

size_t ssdi8_sizeof_quantize(void) { return sizeof(Ssdi8QuantizeParams); }
