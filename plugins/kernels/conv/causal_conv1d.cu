// Depthwise causal convolution and SiLU with carried state:
//   s = silu(bias + sum_w weight[:, w] * xBC[t - W + 1 + w]);  x = FP16(s), B, C = Q(s / scale[g]),
// where asked with s . diag(signs) . H_N / sqrt(N) in each group for the s of B and C.
//
// zxbcdt (B, L, R) FP16, of which columns E .. E + E2 are read (x, B, C); conv_state (B, W - 1, E2)
// FP16 holds the rows before this call, oldest first; x (B, L, E) FP16; B, C (B, L, GN) INT8.
//
// A thread owns 4 channels and a run of tokens: it keeps the last W - 1 rows in registers, so each
// input row is read once per run plus W - 1 times at its start (cached). Four rows are loaded
// before the first is used. One token (decode) is a run of length 1: the same kernel. The thread
// with a sequence's first run also writes its new state, after reading the old one, so the two may
// be the same memory.
//
// The sum is rounded after each product and each addition, in the order of the reference: exact.
// SiLU and the rotation are FP32: x may differ by 1 ulp of FP16, B and C by 1 LSB, near a rounding
// boundary. A group's channels lie in one warp, or two of one block (N = 256): the rotation is a
// butterfly between their registers.

#include "../common.cuh"

namespace ssdi8 {
namespace {

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

constexpr int kChannels = 4;  // per thread: an 8-byte load
constexpr int kBatchOfRows = 4;
constexpr int kThreads = 128;

struct Row {
  __half2 low, high;
};

__device__ __forceinline__ Row load_row(const __half* p) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  return {reinterpret_cast<const __half2&>(raw.x), reinterpret_cast<const __half2&>(raw.y)};
}

// Of a row that may begin at any value.
__device__ __forceinline__ Row load_unaligned_row(const __half* p) {
  return {__halves2half2(p[0], p[1]), __halves2half2(p[2], p[3])};
}

__device__ __forceinline__ void store_row(__half* p, Row row) {
  *reinterpret_cast<uint2*>(p) = make_uint2(reinterpret_cast<const uint32_t&>(row.low),
                                            reinterpret_cast<const uint32_t&>(row.high));
}

// One step of the butterfly: with the value of the thread whose number differs in one bit.
__device__ __forceinline__ float butterfly(float own, float other, bool bit) {
  return bit ? other - own : own + other;
}

// What the two warps that share a group of 256 give each other.
using Exchange = float4[kBatchOfRows][kThreads];

// s . H_N of the N values of each row that N / kChannels threads hold side by side. Several rows at
// once, or each step would wait for the one before.
template <int kN>
__device__ __forceinline__ void hadamard(float (&s)[kBatchOfRows][kChannels],
                                         [[maybe_unused]] Exchange& exchange) {
  constexpr int kLanes = kN / kChannels;
#pragma unroll
  for (int i = 0; i < kBatchOfRows; ++i) {
    const float a = s[i][0] + s[i][1], b = s[i][0] - s[i][1];
    const float c = s[i][2] + s[i][3], d = s[i][2] - s[i][3];
    s[i][0] = a + c, s[i][1] = b + d, s[i][2] = a - c, s[i][3] = b - d;
  }
#pragma unroll
  for (int bit = 1; bit < min(kLanes, kWarp); bit *= 2) {
#pragma unroll
    for (int i = 0; i < kBatchOfRows * kChannels; ++i) {
      float& v = s[i / kChannels][i % kChannels];
      v = butterfly(v, __shfl_xor_sync(kAllLanes, v, bit), threadIdx.x & bit);
    }
  }
  if constexpr (kLanes > kWarp) {
    static_assert(kLanes == 2 * kWarp);
    __syncthreads();  // the rows before have been read
#pragma unroll
    for (int i = 0; i < kBatchOfRows; ++i) {
      exchange[i][threadIdx.x] = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
    }
    __syncthreads();
    const bool upper = threadIdx.x & kWarp;
#pragma unroll
    for (int i = 0; i < kBatchOfRows; ++i) {
      const float4 other = exchange[i][threadIdx.x ^ kWarp];
      s[i][0] = butterfly(s[i][0], other.x, upper), s[i][1] = butterfly(s[i][1], other.y, upper);
      s[i][2] = butterfly(s[i][2], other.z, upper), s[i][3] = butterfly(s[i][3], other.w, upper);
    }
  }
}

// Blocks of x, then of B and C: the groups begin at a whole warp.
__host__ __device__ inline int blocks_of(int channels) {
  return static_cast<int>(ceil_div(channels / kChannels, kThreads));
}

// W; N if B and C are rotated, else 0; whether kChannels divides R.
template <int kWidth, int kN, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_kernel(Ssdi8CausalConv1dParams p, int run_length) {
  __shared__ Exchange exchange;  // compiled away unless kN is 256
  const int blocks_of_x = blocks_of(p.d_inner);
  const bool is_x = blockIdx.x < blocks_of_x;
  const int position =
      ((is_x ? blockIdx.x : blockIdx.x - blocks_of_x) * kThreads + threadIdx.x) * kChannels;
  if (position >= (is_x ? p.d_inner : p.conv_dim - p.d_inner)) return;
  const int channel = is_x ? position : p.d_inner + position;
  const int first = blockIdx.y * run_length;
  const int last = min(first + run_length, p.length);
  const int64_t batch = blockIdx.z;
  const __half* input =
      static_cast<const __half*>(p.zxbcdt) + batch * p.length * p.row_stride + p.d_inner + channel;
  const int64_t state_offset = batch * (kWidth - 1) * p.conv_dim + channel;
  const __half* state = static_cast<const __half*>(p.conv_state) + state_offset;

  // Row `t` of the sequence, where rows before the first come from the state.
  const auto row_at = [&](int t) {
    if (t < 0) return load_row(state + static_cast<int64_t>(t + kWidth - 1) * p.conv_dim);
    const __half* row = input + static_cast<int64_t>(t) * p.row_stride;
    return kAligned ? load_row(row) : load_unaligned_row(row);
  };

  Row window[kWidth - 1 + kBatchOfRows];
#pragma unroll
  for (int w = 0; w < kWidth - 1; ++w) window[w] = row_at(first - (kWidth - 1) + w);
  if (first == 0) {
    Row kept[kWidth - 1];
#pragma unroll
    for (int w = 0; w < kWidth - 1; ++w) kept[w] = row_at(p.length - (kWidth - 1) + w);
    __half* state_out = static_cast<__half*>(p.conv_state_out) + state_offset;
#pragma unroll
    for (int w = 0; w < kWidth - 1; ++w) {
      store_row(state_out + static_cast<int64_t>(w) * p.conv_dim, kept[w]);
    }
  }

  // The taps of 4 channels are kWidth whole 16-byte words.
  float taps[kChannels * kWidth], bias[kChannels];
#pragma unroll
  for (int i = 0; i <= kWidth; ++i) {
    const float* from = i < kWidth ? p.weight + channel * kWidth + 4 * i : p.bias + channel;
    const float4 v = __ldg(reinterpret_cast<const float4*>(from));
    float* to = i < kWidth ? taps + 4 * i : bias;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }

  const int gn = (p.conv_dim - p.d_inner) / 2;
  const bool is_c = !is_x && position >= gn;
  const int column = is_c ? position - gn : position;  // in x, B or C
  float inverse_scale = 0.0f;
  if (!is_x) inverse_scale = __frcp_rn((is_c ? p.c_scale : p.b_scale)[column / (gn / p.ngroups)]);
  const bool half_away = p.rounding == SSDI8_ROUNDING_HALF_AWAY;
  const int64_t token0 = batch * p.length;
  [[maybe_unused]] bool negative[kChannels];  // the signs of the rotation
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const int n = kN > 0 ? (column + c) % kN : 0;
    negative[c] = __popc(n & n >> 1) % 2;
  }

  for (int t = first; t < last; t += kBatchOfRows) {
#pragma unroll
    for (int i = 0; i < kBatchOfRows; ++i) {
      if (t + i < last) window[kWidth - 1 + i] = row_at(t + i);
    }
    float s[kBatchOfRows][kChannels] = {};
#pragma unroll
    for (int i = 0; i < kBatchOfRows; ++i) {
      if (t + i >= last) break;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) s[i][c] = bias[c];
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const float2 low = __half22float2(window[i + w].low);
        const float2 high = __half22float2(window[i + w].high);
        s[i][0] = __fadd_rn(s[i][0], __fmul_rn(low.x, taps[0 * kWidth + w]));
        s[i][1] = __fadd_rn(s[i][1], __fmul_rn(low.y, taps[1 * kWidth + w]));
        s[i][2] = __fadd_rn(s[i][2], __fmul_rn(high.x, taps[2 * kWidth + w]));
        s[i][3] = __fadd_rn(s[i][3], __fmul_rn(high.y, taps[3 * kWidth + w]));
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) s[i][c] = silu(s[i][c]);
    }
    if constexpr (kN > 0) {
      if (!is_x) {
        constexpr float kRoot = kN == 64 ? 0.125f : kN == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
        for (int i = 0; i < kBatchOfRows * kChannels; ++i) {
          float& v = s[i / kChannels][i % kChannels];
          v = negative[i % kChannels] ? -v : v;
        }
        hadamard<kN>(s, exchange);
#pragma unroll
        for (int i = 0; i < kBatchOfRows * kChannels; ++i) s[i / kChannels][i % kChannels] *= kRoot;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatchOfRows; ++i) {
      if (t + i >= last) break;
      const int64_t token = token0 + t + i;
      if (is_x) {
        store_row(static_cast<__half*>(p.x) + token * p.d_inner + column,
                  {__floats2half2_rn(s[i][0], s[i][1]), __floats2half2_rn(s[i][2], s[i][3])});
      } else {
        int q[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) q[c] = quantize(s[i][c], inverse_scale, half_away);
        int8_t* out = (is_c ? p.c_q : p.b_q) + token * gn + column;
        *reinterpret_cast<uint32_t*>(out) = pack4(q[0], q[1], q[2], q[3]);
      }
    }
#pragma unroll
    for (int w = 0; w < kWidth - 1; ++w) window[w] = window[w + kBatchOfRows];
  }
}

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

template <int kN, bool kAligned>
auto* kernel_of(int width) {
  return width == 4   ? causal_conv1d_kernel<4, kN, kAligned>
         : width == 3 ? causal_conv1d_kernel<3, kN, kAligned>
                      : causal_conv1d_kernel<2, kN, kAligned>;
}

template <bool kAligned>
auto* kernel_of(int width, bool rotated, int d_state) {
  return !rotated         ? kernel_of<0, kAligned>(width)
         : d_state == 64  ? kernel_of<64, kAligned>(width)
         : d_state == 128 ? kernel_of<128, kAligned>(width)
                          : kernel_of<256, kAligned>(width);
}

}  // namespace
}  // namespace ssdi8

int ssdi8_causal_conv1d(const Ssdi8CausalConv1dParams* p, void* stream) {
  using namespace ssdi8;
  const int bc = p->conv_dim - p->d_inner;  // 2GN
  if (p->d_conv < 2 || p->d_conv > 4) {
    return refuse("causal_conv1d: width %d is not 2, 3 or 4", p->d_conv);
  }
  if (p->ngroups <= 0 || bc <= 0 || bc % (2 * kChannels * p->ngroups) != 0 || p->d_inner <= 0 ||
      p->d_inner % kChannels != 0) {
    return refuse(
        "causal_conv1d: d_inner %d and the state size in conv_dim %d with %d groups must "
        "be multiples of %d",
        p->d_inner, p->conv_dim, p->ngroups, kChannels);
  }
  const int d_state = bc / (2 * p->ngroups);
  const bool rotated = p->rotation == SSDI8_ROTATION_HADAMARD;
  if (!rotated && p->rotation != SSDI8_ROTATION_NONE) {
    return refuse("causal_conv1d: rotation %d", p->rotation);
  }
  if (rotated && d_state != 64 && d_state != 128 && d_state != 256) {
    return refuse("causal_conv1d: rotation of d_state %d, not 64, 128 or 256", d_state);
  }
  if (p->row_stride < p->d_inner + p->conv_dim) {
    return refuse("causal_conv1d: row stride %d does not hold %d columns", p->row_stride,
                  p->d_inner + p->conv_dim);
  }
  if (p->batch < 0 || p->batch > 65535 || p->length < 1) {
    return refuse("causal_conv1d: batch %d or length %d out of range", p->batch, p->length);
  }
  if (p->batch == 0) return SSDI8_OK;
  int sm_count = 0;
  if (const int code = check(multiprocessors(&sm_count), "causal_conv1d")) return code;
  const int blocks_x = blocks_of(p->d_inner) + blocks_of(bc);
  // Long runs read less twice; short ones fill the chip. 8 blocks are 32 warps.
  int run = 64;
  while (run > kBatchOfRows && blocks_x * ceil_div(p->length, run) * p->batch < 8 * sm_count) {
    run /= 2;
  }
  while (ceil_div(p->length, run) > 65535) run *= 2;
  const dim3 grid(blocks_x, static_cast<unsigned>(ceil_div(p->length, run)), p->batch);
  auto* kernel = p->row_stride % kChannels == 0 ? kernel_of<true>(p->d_conv, rotated, d_state)
                                                : kernel_of<false>(p->d_conv, rotated, d_state);
  return check(launch(kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), *p, run),
               "causal_conv1d");
}

size_t ssdi8_sizeof_causal_conv1d(void) { return sizeof(Ssdi8CausalConv1dParams); }
