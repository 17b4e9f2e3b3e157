// R_0 = ssm_state, R_{c+1} = exp(a_last of chunk c) . R_c + S_c; passed = Q(R_c / passed_scale).
//
// states (B, C, H, P, N) FP32 with an FP32 carry (gate FP32), or INT8 with an INT32 carry in steps
// of state_scale (gate Q0.7); passed (B, C, H, P, N) INT8; passed_scale (B, C, H, P) FP32, with
// scaling "dynamic" the largest of the N values over 127, else state_scale; ssm_state (B, H, P, N)
// FP16 or FP32. With scaling "none" states and passed are FP16, the carry FP32, and passed_scale is
// 1. One thread owns eight neighbouring values of N or four and walks the chunks with
// four chunks of loads in flight; a row of N values never leaves a warp. Bound by memory: every
// byte is touched once.

#include "ssd.cuh"

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

namespace ssdi8 {
namespace {

constexpr int kBlock = 128;
constexpr int kAhead = 4;  // chunks of loads in flight

struct Passing {
  const void* states;
  const float* a;
  const void* ssm_state;
  const float* state_scale;  // static only
  void* passed;              // INT8 or FP16
  float* passed_scale;
  void* ssm_state_out;
  int length;
  int nheads;
  int headdim;
  int d_state;
  int chunk;
  int chunks;
  bool state_fp32;
  bool away;
};

template <int kValues>
__device__ __forceinline__ void load_values(const void* base, size_t index, bool fp32,
                                            float (&v)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    if (fp32) {
      const float4 f =
          *reinterpret_cast<const float4*>(static_cast<const float*>(base) + index + i);
      v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
    } else {
      const uint2 bits =
          *reinterpret_cast<const uint2*>(static_cast<const __half*>(base) + index + i);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        v[i + k] = __half2float(reinterpret_cast<const __half*>(&bits)[k]);
    }
  }
}

template <int kValues>
__device__ __forceinline__ void store_values(void* base, size_t index, bool fp32,
                                             const float (&v)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    if (fp32) {
      *reinterpret_cast<float4*>(static_cast<float*>(base) + index + i) =
          make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else {
      uint2 bits;
#pragma unroll
      for (int k = 0; k < 4; ++k) reinterpret_cast<__half*>(&bits)[k] = __float2half_rn(v[i + k]);
      *reinterpret_cast<uint2*>(static_cast<__half*>(base) + index + i) = bits;
    }
  }
}

// Read once: past the caches' order of use.
template <int kValues>
__device__ __forceinline__ void load_streaming_values(const float* from, float (&v)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    const float4 f = __ldcs(reinterpret_cast<const float4*>(from + i));
    v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
  }
}
__device__ __forceinline__ void load_streaming_values(const int8_t* from, int8_t (&v)[8]) {
  *reinterpret_cast<uint2*>(v) = __ldcs(reinterpret_cast<const uint2*>(from));
}
__device__ __forceinline__ void load_streaming_values(const __half* from, __half (&v)[8]) {
  *reinterpret_cast<uint4*>(v) = __ldcs(reinterpret_cast<const uint4*>(from));
}

// The largest |v| of a row, which kLanes lanes share: as integers the bits are in the same order.
template <int kLanes, int kValues>
__device__ __forceinline__ float row_top(const float (&v)[kValues]) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) top = fmaxf(top, fabsf(v[i]));
  const unsigned row = kLanes == kWarp
                           ? kAllLanes
                           : ((1u << kLanes % kWarp) - 1u) << threadIdx.x % kWarp / kLanes * kLanes;
  return __uint_as_float(__reduce_max_sync(row, __float_as_uint(top)));
}

// Gate Q0.7: INT8 states, INT32 carry; else by scaling.
enum Kind { kInteger, kStatic, kDynamic, kNone };

template <Kind kKind>
using ValueOf = typename std::conditional<
    kKind == kInteger, int8_t,
    typename std::conditional<kKind == kNone, __half, float>::type>::type;  // of states

template <Kind kKind, int kN>
constexpr int kValuesOf = sizeof(ValueOf<kKind>) < 4 || kN == 256 ? 8 : 4;  // of a thread

template <Kind kKind, int kN>
__global__ __launch_bounds__(kBlock) void state_passing_kernel(Passing p) {
  constexpr int kValues = kValuesOf<kKind, kN>;
  constexpr int kLanes = kN / kValues;  // of a row
  using Value = ValueOf<kKind>;
  struct alignas(kValues * sizeof(Value) < 16 ? 8 : 16) Values {
    Value v[kValues];
  };
  const int values_per_head = p.headdim * kN;
  const int bh = blockIdx.y;
  const int b = bh / p.nheads, h = bh % p.nheads;
  const int value = (blockIdx.x * kBlock + threadIdx.x) * kValues;
  const int row = value / kN;
  const bool first_of_row = value % kN == 0;
  const size_t rows = size_t(p.nheads) * p.headdim;  // from chunk to chunk
  const size_t first_row = (size_t(b) * p.chunks * p.nheads + h) * p.headdim + row;
  const size_t first = first_row * kN + value % kN;
  const size_t state_index = size_t(bh) * values_per_head + value;
  const float* a = p.a + size_t(bh) * p.length;
  float scale = 1.0f, inverse = 1.0f;
  if (kKind == kInteger || kKind == kStatic) {
    scale = p.state_scale[h * p.headdim + row];
    inverse = __frcp_rn(scale);
  }

  float carry[kValues];
  int carry_q[kValues];
  load_values<kValues>(p.ssm_state, state_index, p.state_fp32, carry);
  if (kKind == kInteger) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) carry_q[i] = ssd::integer_carry(carry[i], inverse, p.away);
  }
  const Value* states = static_cast<const Value*>(p.states) + first;

  for (int base = 0; base < p.chunks; base += kAhead) {
    Values ahead[kAhead];
    float gates[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= p.chunks) break;
      load_streaming_values(states + (base + i) * rows * kN, ahead[i].v);
      gates[i] = expf(a[min((base + i + 1) * p.chunk, p.length) - 1]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= p.chunks) break;
      if (kKind == kDynamic) {
        const DynamicScale dynamic = dynamic_scale(row_top<kLanes>(carry));
        scale = dynamic.step;
        inverse = dynamic.inverse;
      }
      if (first_of_row) p.passed_scale[first_row + (base + i) * rows] = scale;
      if constexpr (kKind == kNone) {
        ssd::store_state8(p.passed, first + (base + i) * rows * kN, false, carry);
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          carry[k] = ssd::pass_real(carry[k], gates[i], __half2float(ahead[i].v[k]));
        }
      } else {
        int q[kValues];
        if (kKind == kInteger) {
          const int gate = ssd::integer_gate(gates[i], p.away);
#pragma unroll
          for (int k = 0; k < kValues; ++k) {
            q[k] = ssd::saturate(carry_q[k], p.away);
            carry_q[k] = ssd::pass_integer(carry_q[k], gate, static_cast<int>(ahead[i].v[k]));
          }
        } else {
#pragma unroll
          for (int k = 0; k < kValues; ++k) {
            q[k] = quantize(carry[k], inverse, p.away);
            carry[k] = ssd::pass_real(carry[k], gates[i], static_cast<float>(ahead[i].v[k]));
          }
        }
        int8_t* passed = static_cast<int8_t*>(p.passed) + first + (base + i) * rows * kN;
        uint32_t* out = reinterpret_cast<uint32_t*>(passed);
#pragma unroll
        for (int k = 0; k < kValues; k += 4) {
          out[k / 4] = pack4(q[k], q[k + 1], q[k + 2], q[k + 3]);
        }
      }
    }
  }
  if (kKind == kInteger) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      carry[k] = __fmul_rn(static_cast<float>(ssd::saturate(carry_q[k], p.away)), scale);
    }
  }
  store_values<kValues>(p.ssm_state_out, state_index, p.state_fp32, carry);
}

template <Kind kKind, int kN>
cudaError_t launch_kernel(const ssd::Shape& shape, const Passing& passing, cudaStream_t stream) {
  constexpr int kBlockValues = kBlock * kValuesOf<kKind, kN>;
  static_assert(16 * kN % kBlockValues == 0, "no thread is left over");
  const dim3 grid(shape.headdim * kN / kBlockValues, shape.batch * shape.nheads);
  return launch(state_passing_kernel<kKind, kN>, grid, kBlock, 0, stream, passing);
}

template <Kind kKind>
cudaError_t launch_passing(const ssd::Shape& shape, const Passing& passing, cudaStream_t stream) {
  auto* launch = shape.d_state == 64    ? launch_kernel<kKind, 64>
                 : shape.d_state == 128 ? launch_kernel<kKind, 128>
                                        : launch_kernel<kKind, 256>;
  return launch(shape, passing, stream);
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_state_passing(const Ssdi8StatePassingParams* p, void* stream) {
  using namespace ssdi8;
  ssd::Shape shape{};
  if (int code = ssd::make_shape("state_passing", p->batch, p->length, p->nheads, p->headdim, 1,
                                 p->d_state, p->chunk_size, p->rounding, p->scaling, &shape)) {
    return code;
  }
  if (int code = ssd::check_gate("state_passing", p->gate, shape)) return code;
  if (int code = ssd::check_scale("state_passing", shape, "state_scale", p->state_scale)) {
    return code;
  }
  if (int64_t(p->batch) * p->nheads > 65535) {
    return refuse("state_passing: batch %d times %d heads is more than 65535", p->batch, p->nheads);
  }
  const Passing passing = {p->states,        p->a,
                           p->ssm_state,     p->state_scale,
                           p->passed,        p->passed_scale,
                           p->ssm_state_out, p->length,
                           p->nheads,        p->headdim,
                           p->d_state,       p->chunk_size,
                           shape.chunks,     p->state_fp32 != 0,
                           shape.away != 0};
  auto* launch = p->gate == SSDI8_GATE_Q0_7 ? launch_passing<kInteger>
                 : shape.fp16               ? launch_passing<kNone>
                 : shape.dynamic            ? launch_passing<kDynamic>
                                            : launch_passing<kStatic>;
  return check(launch(shape, passing, static_cast<cudaStream_t>(stream)), "state_passing");
}

size_t ssdi8_sizeof_state_passing(void) { return sizeof(Ssdi8StatePassingParams); }
