// What the ops of SSD share: shapes, attributes, and what has to hold between them.

#ifndef SSDI8_TENSORRT_SSD_H_
#define SSDI8_TENSORRT_SSD_H_

#include <cfloat>
#include <cstdint>
#include <limits>
#include <vector>

#include "choices.h"
#include "description.h"

namespace ssdi8::plugin {

template <typename P>
using Shape = std::vector<Size<P>>;

// (B, L, H * P)
template <typename P>
Shape<P> inner_shape() {
  int64_t (*width)(const P&) = [](const P& p) { return int64_t{p.nheads} * p.headdim; };
  return {Size<P>::kBatch, Size<P>::kLength, width};
}

// (B, L, G * N)
template <typename P>
Shape<P> group_shape() {
  int64_t (*width)(const P&) = [](const P& p) { return int64_t{p.ngroups} * p.d_state; };
  return {Size<P>::kBatch, Size<P>::kLength, width};
}

// (B, H, L)
template <typename P>
Shape<P> decay_shape() {
  return {Size<P>::kBatch, &P::nheads, Size<P>::kLength};
}

// (B, C, H, P, N)
template <typename P>
Shape<P> chunk_shape() {
  const Size<P> chunks(Size<P>::kChunks, &P::chunk_size);
  return {Size<P>::kBatch, chunks, &P::nheads, &P::headdim, &P::d_state};
}

// (B, H, P, N)
template <typename P>
Shape<P> state_shape() {
  return {Size<P>::kBatch, &P::nheads, &P::headdim, &P::d_state};
}

// (B, C, H, P)
template <typename P>
Shape<P> chunk_scale_shape() {
  Shape<P> shape = chunk_shape<P>();
  shape.pop_back();
  return shape;
}

// (H, P)
template <typename P>
Shape<P> channel_shape() {
  return {&P::nheads, &P::headdim};
}

// The SSM state, as the graph carries it.
template <typename P>
TypeOf<P> state_type() {
  return {kHalf, kFloat, &P::state_fp32};
}

// The states of chunks, and those that are passed between them.
template <typename P>
DataType chunk_type(const P& p) {
  if (p.scaling == SSDI8_SCALING_NONE) return kHalf;
  return p.gate == SSDI8_GATE_FP32 ? kFloat : kInt8;
}
template <typename P>
DataType passed_type(const P& p) {
  return p.scaling == SSDI8_SCALING_NONE ? kHalf : kInt8;
}

template <typename P>
std::vector<Field<P>> geometry_fields() {
  return {
      size_field("chunk_size", &P::chunk_size), size_field("nheads", &P::nheads),
      size_field("headdim", &P::headdim),       size_field("ngroups", &P::ngroups),
      size_field("d_state", &P::d_state),
  };
}

template <typename P>
std::vector<Field<P>> time_step_fields() {
  return {
      size_field("dt_column", &P::dt_column, 0),
      real_field("dt_min", &P::dt_min, 0.0, FLT_MAX),
      real_field("dt_max", &P::dt_max, 0.0, std::numeric_limits<double>::infinity()),
  };
}

template <typename P>
std::vector<Field<P>> operator+(std::vector<Field<P>> a, const std::vector<Field<P>>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

template <typename P>
bool check_groups(const char* op, const P& p) {
  if (p.nheads % p.ngroups == 0) return true;
  return log_error("%s: nheads %d is not a multiple of ngroups %d", op, p.nheads, p.ngroups);
}

template <typename P>
bool check_gate(const char* op, const P& p) {
  if (p.gate == SSDI8_GATE_FP32 || p.scaling == SSDI8_SCALING_STATIC) return true;
  return log_error("%s: gate q0.7 needs scaling static", op);
}

template <typename P>
bool check_time_step(const char* op, const P& p) {
  if (p.dt_min <= p.dt_max) return true;
  return log_error("%s: dt_min %g is above dt_max %g", op, p.dt_min, p.dt_max);
}

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_SSD_H_
