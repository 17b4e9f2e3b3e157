// What stands between two linear layers, with rotation and quantization:
//   q = Q(R . f / token_scale),  f = max(x, 0)^2 or x * silu(gate).
//
// x and gate are columns of FP16 rows, which need not be aligned; q (T, width) INT8, token_scale
// (T). f is FP32 and lies in shared memory alone: squares of FP16 do not fit FP16. One block per
// token and one pass over memory, see ../rotation/token.cuh.

#include "../rotation/token.cuh"

namespace ssdi8 {
namespace {

// Columns of rows.
struct Columns {
  const __half* first;
  int64_t stride;
  bool aligned;

  Columns(const void* rows, int column, int stride)
      : first(static_cast<const __half*>(rows) + column),
        stride(stride),
        aligned(column % kVector == 0 && stride % kVector == 0) {}

  __device__ __forceinline__ void load(int64_t token, int e0, float (&v)[kVector]) const {
    load_channels(first + token * stride + e0, aligned, v);
  }
};

struct SquaredRelu {
  Columns x;

  __device__ __forceinline__ void load(int64_t token, int e0, float (&v)[kVector]) const {
    x.load(token, e0, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float positive = fmaxf(v[i], 0.0f);
      v[i] = __fmul_rn(positive, positive);
    }
  }
};

struct SiluGate {
  Columns x, gate;

  __device__ __forceinline__ void load(int64_t token, int e0, float (&v)[kVector]) const {
    float opened[kVector];
    x.load(token, e0, v);
    gate.load(token, e0, opened);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = __fmul_rn(v[i], silu(opened[i]));
  }
};

}  // namespace
}  // namespace ssdi8

int ssdi8_activation(const Ssdi8ActivationParams* p, void* stream) {
  using namespace ssdi8;
  if (p->x_column < 0 || p->x_stride < p->x_column + p->width) {
    return refuse("activation: row stride %d of x does not hold %d columns from %d on", p->x_stride,
                  p->width, p->x_column);
  }
  const Columns x(p->x, p->x_column, p->x_stride);
  if (p->activation == SSDI8_ACTIVATION_RELU2) {
    return rotate_and_quantize("activation", SquaredRelu{x}, *p, stream);
  }
  if (p->activation != SSDI8_ACTIVATION_SILU_GATE) {
    return refuse("activation: activation %d out of range", p->activation);
  }
  if (p->gate_stride < p->width) {
    return refuse("activation: row stride %d of gate does not hold %d columns", p->gate_stride,
                  p->width);
  }
  const SiluGate source = {x, Columns(p->gate, 0, p->gate_stride)};
  return rotate_and_quantize("activation", source, *p, stream);
}

size_t ssdi8_sizeof_activation(void) { return sizeof(Ssdi8ActivationParams); }
