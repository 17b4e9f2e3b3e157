// INT8 linear layers: y = FP16(FP32(x . weight^T) * scale[row] * token_scale[token] + bias[row]),
// the sum exact.
//
// x (T, In) INT8; y (T, Out) FP16; token_scale (T), scale, bias (Out) FP32. The weight is
//   W8: (Out, In) INT8;
//   W4: (Out, In / 2), byte 4i + j plus 128 = 16 * q4[8i + 4 + j] + q4[8i + j], expanded on the fly
//       to the INT8 value round_half_even((q4 - 8) * group_scale[row, k / group_size]), saturated,
//       or, with integer scales, (q4 - 8) * group_scale, which is INT8 as it is.
//
// The order of k inside a product is free, as long as both operands use the same one. Here the lane
// with t = lane % 4 takes 16 consecutive k of every 64, for both operands. So a fragment for two
// m16n8k32 is one 16-byte load per row, from shared or from device memory alike: eight lanes read
// 128 contiguous bytes (no bank conflict, no swizzle, no ldmatrix), and 8 packed bytes of W4 are
// exactly the 16 weights that the lane needs. Rows of the weight are the 16-row operand: its four
// registers mix rows, so it is assembled once per step, while the 8-column operand (tokens), which
// every product changes, is used in the registers that the load filled.
//
// Two variants: vector.cuh for up to eight tokens, tiles.cuh for more.

#include <algorithm>

#include "../common.cuh"
#include "arguments.cuh"
#include "tiles.cuh"
#include "vector.cuh"

namespace ssdi8 {
namespace linear {
namespace {

enum Variant { kChoose = 0, kVector = 1, kSmall = 2, kMedium = 3, kLarge = 4 };

// Time of a tile shape when a multiprocessor gets `n` tiles at most: `full` for each set of blocks
// that fills it, and rest[n] for n more, which is no linear part of `full`: a block alone cannot
// hide its own latency. Microseconds for 80 steps, measured (bench_ops --variants); only their
// ratios matter.
struct TileTimes {
  double full;
  double rest[3];
};

template <class T>
double cost(const LinearArguments& p, int sm_count, const TileTimes& times) {
  const int64_t n = ceil_div(tile_count<T>(p), sm_count);
  return static_cast<double>(n / T::kBlocksPerSm) * times.full + times.rest[n % T::kBlocksPerSm];
}

template <Format kFormat>
Variant pick_variant(const LinearArguments& p, int sm_count) {
  if (p.tokens <= kVectorTokens) return kVector;
  constexpr TileTimes kTimes[][3] = {
      {{52, {0, 35, 49}}, {60, {0, 40}}, {62, {0}}},  // W8
      {{89, {0, 44, 62}}, {88, {0, 57}}, {86, {0}}},  // W4, FP16 scales
      {{62, {0, 36, 59}}, {66, {0, 45}}, {69, {0}}},  // W4, integer scales
  };
  const double small = cost<SmallTile>(p, sm_count, kTimes[kFormat][0]);
  const double medium = cost<MediumTile>(p, sm_count, kTimes[kFormat][1]);
  const double large = cost<LargeTile>(p, sm_count, kTimes[kFormat][2]);
  if (small < medium && small < large) return kSmall;
  return medium < large ? kMedium : kLarge;
}

template <Format kFormat>
cudaError_t launch_vector(const LinearArguments& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.n_out, kVectorRows));
  // The number of warps that shares the segments of k most evenly.
  const int64_t segments = ceil_div(p.n_in, kFormat == kW8 ? 64 : 128);
  int warps = kVectorMaxWarps;
  for (int w = kVectorMaxWarps; w >= kVectorMaxWarps / 2; --w) {
    if (ceil_div(segments, w) * w < ceil_div(segments, warps) * warps) warps = w;
  }
  auto* kernel = vector_kernel<kFormat, 1, 1>;
  if constexpr (kFormat == kW4Integer) {
    if (p.group_shift == 6) {
      kernel = p.tokens <= 4 ? vector_kernel<kFormat, 2, 1> : vector_kernel<kFormat, 2, 2>;
    } else if (p.group_shift == 5) {
      kernel = p.tokens <= 2   ? vector_kernel<kFormat, 4, 1>
               : p.tokens <= 4 ? vector_kernel<kFormat, 4, 2>
                               : vector_kernel<kFormat, 4, 4>;
    }
  }
  return launch(kernel, blocks, warps * kWarp, 0, stream, p);
}

template <Format kFormat, class T>
cudaError_t launch_tiles(const LinearArguments& p, int sm_count, cudaStream_t stream) {
  constexpr int kBytes = T::template kSharedBytes < kFormat != kW8 > ;
  const cudaError_t error = cudaFuncSetAttribute(
      tile_kernel<kFormat, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(tile_count<T>(p), sm_count * T::kBlocksPerSm);
  return launch(tile_kernel<kFormat, T>, blocks, T::kThreads, kBytes, stream, p);
}

template <Format kFormat>
int run_linear(const LinearArguments& p, int variant, const char* op, void* stream) {
  constexpr int64_t kMaxElements = int64_t{1} << 31;
  if (p.n_in <= 0 || p.n_in % 32 != 0 || p.n_in > 65536) {
    return refuse("%s: in_features %d is not a multiple of 32 up to 65536", op, p.n_in);
  }
  if (p.tokens < 0 || p.n_out <= 0 || static_cast<int64_t>(p.tokens) * p.n_in >= kMaxElements ||
      static_cast<int64_t>(p.n_out) * p.n_in >= kMaxElements) {
    return refuse("%s: %d tokens x %d outputs x %d inputs out of range", op, p.tokens, p.n_out,
                  p.n_in);
  }
  if (variant < kChoose || variant > kLarge || (variant == kVector && p.tokens > kVectorTokens)) {
    return refuse("%s: variant %d cannot run %d tokens", op, variant, p.tokens);
  }
  if (p.tokens == 0) return SSDI8_OK;
  int sm_count = 0;
  if (const int code = check(multiprocessors(&sm_count), op)) return code;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (variant == kChoose ? pick_variant<kFormat>(p, sm_count) : variant) {
    case kVector:
      return check(launch_vector<kFormat>(p, s), op);
    case kSmall:
      return check(launch_tiles<kFormat, SmallTile>(p, sm_count, s), op);
    case kMedium:
      return check(launch_tiles<kFormat, MediumTile>(p, sm_count, s), op);
    default:
      return check(launch_tiles<kFormat, LargeTile>(p, sm_count, s), op);
  }
}

// What both params structs call by the same name, and the weight.
template <class Params>
LinearArguments arguments_of(const Params& p, const int8_t* weight,
                             const void* group_scale = nullptr, int group_shift = 0) {
  auto* y = static_cast<__half*>(p.y);
  return {p.x, p.token_scale, weight,        group_scale,    p.scale,    p.bias,
          y,   p.tokens,      p.in_features, p.out_features, group_shift};
}

}  // namespace
}  // namespace linear
}  // namespace ssdi8

int ssdi8_linear(const Ssdi8LinearParams* p, void* stream) {
  using namespace ssdi8;
  using namespace ssdi8::linear;
  return run_linear<kW8>(arguments_of(*p, p->weight), p->variant, "linear", stream);
}

int ssdi8_linear_w4(const Ssdi8LinearW4Params* p, void* stream) {
  using namespace ssdi8;
  using namespace ssdi8::linear;
  const int group = p->group_size;
  if ((group != 32 && group != 64 && group != 128) || p->in_features % group != 0) {
    return refuse(
        "linear_w4: group size %d is not 32, 64 or 128, or does not divide in_features %d", group,
        p->in_features);
  }
  const int shift = group == 32 ? 5 : group == 64 ? 6 : 7;
  const LinearArguments arguments = arguments_of(*p, p->packed, p->group_scale, shift);
  if (!p->integer_scales) return run_linear<kW4Rounded>(arguments, p->variant, "linear_w4", stream);
  return run_linear<kW4Integer>(arguments, p->variant, "linear_w4", stream);
}

size_t ssdi8_sizeof_linear(void) { return sizeof(Ssdi8LinearParams); }
size_t ssdi8_sizeof_linear_w4(void) { return sizeof(Ssdi8LinearW4Params); }
