// A token whose channels lie in shared memory: rotated, then quantized by one scale.
//
// Of any width: the rotation is one matrix or equal ones along the diagonal, base (x)
// Sylvester(2^k) with base order 1, 12 or 20, as hadamard.py cuts a width. Channel (q * base + b) *
// 2^k + s of a token is entry (b, s) of block q. The Sylvester factor works on the k low bits of
// the channel alone, whatever the block: bits 0-2 in registers, where a thread puts 8 channels into
// shared memory
// (`put_channels`), then three bits at a time; the base matrix comes last (`rotate_token`).

#ifndef SSDI8_ROTATION_TOKEN_CUH_
#define SSDI8_ROTATION_TOKEN_CUH_

#include <math.h>
#include <stdint.h>

#include "../common.cuh"
#include "hadamard.cuh"

namespace ssdi8 {

constexpr int kTokenThreads = 512;      // at most, of the block that has a token
constexpr int kMostTokenWidth = 16384;  // 72 KiB of shared memory

struct TokenRotation {
  int width;
  int base;        // order of the base matrix
  int power_bits;  // k
  float root;      // 1 / sqrt(order)
  bool signs;      // hadamard.py's `signs` are multiplied before

  __host__ __device__ int order() const { return base << power_bits; }
  // Floats of a token.
  __host__ __device__ int shared_floats() const { return padded(width); }
};

struct TokenOutput {
  int8_t* quantized;          // (T, width)
  float* token_scale;         // (T)
  const float* static_scale;  // null: by the largest value of the token
  bool half_away;
};

// ---------------------------------------------------------------------------------------------
// host
// ---------------------------------------------------------------------------------------------

// Fills base and power of `rotation` if a Hadamard matrix has this order.
inline bool set_order(int order, TokenRotation* rotation) {
  for (int base : {1, 12, 20}) {
    const int power = order / base;
    if (order % base != 0 || power == 0 || (power & (power - 1)) != 0) continue;
    rotation->base = base;
    rotation->power_bits = 0;
    while (1 << rotation->power_bits < power) ++rotation->power_bits;
    rotation->root = static_cast<float>(1.0 / sqrt(static_cast<double>(order)));
    return true;
  }
  return false;
}

// The rotation of a width, as hadamard.py's `apply` has it, or a refusal.
inline int make_rotation(const char* op, int width, int kind, TokenRotation* rotation) {
  constexpr int kMostBlock = 256;
  if (width < kVector || width % kVector != 0 || width > kMostTokenWidth) {
    return refuse("%s: width %d is not a multiple of %d up to %d", op, width, kVector,
                  kMostTokenWidth);
  }
  *rotation = {width, 1, 0, 1.0f, kind == SSDI8_ROTATION_SIGNS};
  if (kind == SSDI8_ROTATION_NONE) return SSDI8_OK;
  if (kind == SSDI8_ROTATION_FULL && set_order(width, rotation)) return SSDI8_OK;
  if (kind != SSDI8_ROTATION_FULL && kind != SSDI8_ROTATION_BLOCKS &&
      kind != SSDI8_ROTATION_SIGNS) {
    return refuse("%s: rotation %d out of range", op, kind);
  }
  // 8 divides the width, so that the search ends.
  int order = width < kMostBlock ? width : kMostBlock;
  while (width % order != 0 || !set_order(order, rotation)) --order;
  return SSDI8_OK;
}

template <typename Params>
TokenOutput make_output(const Params& p) {
  return {p.quantized, p.token_scale, p.scaling == SSDI8_SCALING_STATIC ? p.scale : nullptr,
          p.rounding == SSDI8_ROUNDING_HALF_AWAY};
}

// Of the block that has a token.
inline int token_threads(int width) {
  const int vectors = width / kVector;
  const int rounds = static_cast<int>(ceil_div(vectors, kTokenThreads));
  return static_cast<int>(ceil_div(ceil_div(vectors, rounds), kWarp)) * kWarp;
}

// ---------------------------------------------------------------------------------------------
// device
// ---------------------------------------------------------------------------------------------

// Channels e0 to e0 + 7 of a token in FP16, which may begin at any address.
__device__ __forceinline__ void load_channels(const __half* row, bool aligned,
                                              float (&v)[kVector]) {
  const uint4 raw = aligned ? *reinterpret_cast<const uint4*>(row) : load_unaligned(row);
  const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void store_shared(float* own, const float (&v)[kVector]) {
  reinterpret_cast<float4*>(own)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(own)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
__device__ __forceinline__ void load_shared(const float* own, float (&v)[kVector]) {
  const float4 low = reinterpret_cast<const float4*>(own)[0];
  const float4 high = reinterpret_cast<const float4*>(own)[1];
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// Signs, and the bits of the rotation inside of 8 channels from e0 on.
__device__ __forceinline__ void put_channels(float* shared, int e0, const TokenRotation& rotation,
                                             float (&v)[kVector]) {
  if (rotation.signs) {
    const int order = rotation.order();
    int place = e0 % order;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (__popc(place & place >> 1) & 1) v[i] = -v[i];
      if (++place == order) place = 0;
    }
  }
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    if (bit >= rotation.power_bits) break;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >> bit & 1) continue;
      const float a = v[i], b = v[i + (1 << bit)];
      v[i] = a + b;
      v[i + (1 << bit)] = a - b;
    }
  }
  store_shared(shared + padded(e0), v);
}

// Bits `bit` to bit + kBits - 1 of all channels.
template <int kBits>
__device__ __forceinline__ void transform_bits(float* shared, int width, int bit) {
  constexpr int kCount = 1 << kBits;
  for (int group = threadIdx.x; group < width >> kBits; group += blockDim.x) {
    const int low = group & ((1 << bit) - 1);
    // Bits of the first channel and of i << bit are apart, so `padded` of their sum is the sum.
    float* own = shared + padded((group - low) * kCount + low);
    float v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = own[padded(i << bit)];
#pragma unroll
    for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i & step) continue;
        const float a = v[i], b = v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) own[padded(i << bit)] = v[i];
  }
}

// The base matrix, a thread making a column of a block.
template <int kBase>
__device__ __forceinline__ void transform_base(float* shared, int width, int power_bits) {
  for (int column = threadIdx.x; column < width / kBase; column += blockDim.x) {
    const int low = column & ((1 << power_bits) - 1);
    const int first = (column - low) * kBase + low;
    const auto place = [&](int i) { return shared + padded(first + (i << power_bits)); };
    float sums[kBase] = {};
    base_product([&](int i) { return *place(i); }, sums);
#pragma unroll
    for (int i = 0; i < kBase; ++i) *place(i) = sums[i];
  }
}

// What `put_channels` left, without the factor `root`. All threads; ends with a barrier.
template <int kBase>
__device__ __forceinline__ void rotate_token(float* shared, const TokenRotation& rotation) {
  __syncthreads();
  for (int bit = 3; bit < rotation.power_bits; bit += 3) {
    const int left = rotation.power_bits - bit;
    if (left == 1) {
      transform_bits<1>(shared, rotation.width, bit);
    } else if (left == 2) {
      transform_bits<2>(shared, rotation.width, bit);
    } else {
      transform_bits<3>(shared, rotation.width, bit);
    }
    __syncthreads();
  }
  if constexpr (kBase > 1) {
    transform_base<kBase>(shared, rotation.width, rotation.power_bits);
    __syncthreads();
  }
}

// Q(shared * root / scale). All threads.
__device__ __forceinline__ void quantize_token(const float* shared, const TokenRotation& rotation,
                                               const TokenOutput& out, int64_t token) {
  __shared__ float tops[kTokenThreads / kWarp];
  const int stride = blockDim.x * kVector;
  const bool is_static = out.static_scale != nullptr;
  float factor = rotation.root, scale, inverse;
  if (is_static) {
    scale = *out.static_scale;
    inverse = __frcp_rn(scale);
  } else {
    float top = 0.0f;
    for (int e0 = threadIdx.x * kVector; e0 < rotation.width; e0 += stride) {
      float v[kVector];
      load_shared(shared + padded(e0), v);
      top = fmaxf(top, largest(v));
    }
    top = warp_largest(top);
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) tops[threadIdx.x / kWarp] = top;
    __syncthreads();
    top = warp_largest(lane < blockDim.x / kWarp ? tops[lane] : 0.0f);
    scale = dynamic_scale(__fmul_rn(top, factor)).step;
    inverse = dynamic_scale(top).inverse;
    factor = 1.0f;
  }
  if (threadIdx.x == 0) out.token_scale[token] = scale;
  for (int e0 = threadIdx.x * kVector; e0 < rotation.width; e0 += stride) {
    float v[kVector];
    load_shared(shared + padded(e0), v);
    int q[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      q[i] = quantize(__fmul_rn(v[i], factor), inverse, out.half_away);
    }
    *reinterpret_cast<uint2*>(out.quantized + token * rotation.width + e0) =
        make_uint2(pack4(q[0], q[1], q[2], q[3]), pack4(q[4], q[5], q[6], q[7]));
  }
}

// ---------------------------------------------------------------------------------------------
// a kernel of tokens that need no other step
// ---------------------------------------------------------------------------------------------

// `source.load(token, e0, v)` gives channels e0 to e0 + 7 of a token. One block per token.
template <int kBase, typename Source>
__global__ void __launch_bounds__(kTokenThreads)
    rotate_and_quantize_kernel(Source source, TokenRotation rotation, TokenOutput out) {
  SSDI8_DYNAMIC_SHARED(float, shared);
  const int64_t token = blockIdx.x;
  for (int e0 = threadIdx.x * kVector; e0 < rotation.width; e0 += blockDim.x * kVector) {
    float v[kVector];
    source.load(token, e0, v);
    put_channels(shared, e0, rotation, v);
  }
  rotate_token<kBase>(shared, rotation);
  quantize_token(shared, rotation, out, token);
}

// Checks what all such ops have in common, and launches.
template <typename Source, typename Params>
int rotate_and_quantize(const char* op, const Source& source, const Params& p, void* stream) {
  TokenRotation rotation;
  if (const int code = make_rotation(op, p.width, p.rotation, &rotation)) return code;
  if (p.tokens < 0) return refuse("%s: tokens %d out of range", op, p.tokens);
  if (const int code = refuse_token_scaling(op, p.scaling, p.scale)) return code;
  if (p.tokens == 0) return SSDI8_OK;
  auto* kernel = rotation.base == 20   ? rotate_and_quantize_kernel<20, Source>
                 : rotation.base == 12 ? rotate_and_quantize_kernel<12, Source>
                                       : rotate_and_quantize_kernel<1, Source>;
  const size_t bytes = rotation.shared_floats() * sizeof(float);
  if (const cudaError_t error = grant_shared(kernel, bytes)) return check(error, op);
  return check(launch(kernel, p.tokens, token_threads(p.width), bytes,
                      static_cast<cudaStream_t>(stream), source, rotation, make_output(p)),
               op);
}

}  // namespace ssdi8

#endif  // SSDI8_ROTATION_TOKEN_CUH_
