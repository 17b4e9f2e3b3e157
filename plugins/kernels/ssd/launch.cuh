// What the launchers of the SSD ops check and share.

#ifndef SSDI8_SSD_LAUNCH_CUH_
#define SSDI8_SSD_LAUNCH_CUH_

#include <stddef.h>

#include "../arena.cuh"
#include "../common.cuh"
#include "../kernels.h"
#include "cumsum.cuh"
#include "shape.cuh"

namespace ssdi8 {
namespace ssd {

// Fills `shape`, or refuses.
inline int make_shape(const char* op, int batch, int length, int nheads, int headdim, int ngroups,
                      int d_state, int chunk, int rounding, int scaling, Shape* shape) {
  if (batch < 1 || length < 1 || nheads < 1 || ngroups < 1 || nheads % ngroups != 0) {
    return refuse("%s: batch %d, length %d, %d heads in %d groups", op, batch, length, nheads,
                  ngroups);
  }
  if (headdim != 32 && headdim != 64 && headdim != 80 && headdim != 128) {
    return refuse("%s: headdim %d, not 32, 64, 80 or 128", op, headdim);
  }
  if (d_state != 64 && d_state != 128 && d_state != 256) {
    return refuse("%s: d_state %d, not 64, 128 or 256", op, d_state);
  }
  if (chunk != 64 && chunk != 128 && chunk != 256) {
    return refuse("%s: chunk_size %d, not 64, 128 or 256", op, chunk);
  }
  if (rounding != SSDI8_ROUNDING_HALF_EVEN && rounding != SSDI8_ROUNDING_HALF_AWAY) {
    return refuse("%s: rounding %d", op, rounding);
  }
  if (scaling != SSDI8_SCALING_STATIC && scaling != SSDI8_SCALING_DYNAMIC &&
      scaling != SSDI8_SCALING_NONE) {
    return refuse("%s: scaling %d", op, scaling);
  }
  *shape = {batch,
            length,
            nheads,
            headdim,
            ngroups,
            d_state,
            chunk,
            static_cast<int>(ceil_div(length, chunk)),
            rounding == SSDI8_ROUNDING_HALF_AWAY,
            scaling == SSDI8_SCALING_DYNAMIC,
            scaling == SSDI8_SCALING_NONE};
  return SSDI8_OK;
}

inline int check_gate(const char* op, int gate, const Shape& shape) {
  if (gate == SSDI8_GATE_Q0_7 && (shape.dynamic || shape.fp16)) {
    return refuse("%s: scaling %s with gate Q0.7", op, shape.dynamic ? "dynamic" : "none");
  }
  if (gate == SSDI8_GATE_FP32 || gate == SSDI8_GATE_Q0_7) return SSDI8_OK;
  return refuse("%s: gate %d", op, gate);
}

// Scaling "static" needs its inputs.
inline int check_scale(const char* op, const Shape& shape, const char* name, const float* scale) {
  if (shape.dynamic || shape.fp16 || scale != nullptr) return SSDI8_OK;
  return refuse("%s: scaling static needs %s", op, name);
}

// What an op with its own dt takes it from.
template <typename Params>
Cumsum cumsum_of(const Params& p) {
  return {static_cast<const __half*>(p.zxbcdt),
          p.dt_bias,
          p.a_rate,
          p.row_stride,
          p.dt_column,
          p.dt_min,
          p.dt_max};
}

// Blocks of a scan over chunks, of which the chip holds `slots` at once. All lanes of work walk the
// chunks side by side if the chip holds them, else as few as fill it, so that their carries stay in
// the small L2 of a board.
inline dim3 scan_grid(const Shape& shape, int slots) {
  const int rounds = shape.lanes() / slots > 1 ? shape.lanes() / slots : 1;
  const int together = static_cast<int>(ceil_div(shape.lanes(), rounds));
  return dim3(together, shape.chunks, ceil_div(shape.lanes(), together));
}

}  // namespace ssd
}  // namespace ssdi8

#endif  // SSDI8_SSD_LAUNCH_CUH_
