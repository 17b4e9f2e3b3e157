// R_0 = ssm_state, R_{c+1} = exp(a_last of chunk c) . R_c + S_c; passed = Q(R_c / state_scale).
//
// states (B, C, H, P, N) FP32 with an FP32 carry (gate FP32), or INT8 with an INT32 carry in steps
// of state_scale (gate Q0.7); passed (B, C, H, P, N) INT8; ssm_state (B, H, P, N) FP16 or FP32. One
// thread owns eight neighbouring values of N (INT8 states) or four (FP32) and walks the chunks with
// four chunks of loads in flight. Bound by memory: every byte is touched once.

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
  const float* state_scale;
  int8_t* passed;
  void* ssm_state_out;
  int length;
  int nheads;
  int values_per_head;  // P * N
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

template <bool kInteger>  // gate Q0.7: INT8 states, INT32 carry
__global__ __launch_bounds__(kBlock) void state_passing_kernel(Passing p) {
  constexpr int kValues = kInteger ? 8 : 4;
  using Word = typename std::conditional<kInteger, uint2, float4>::type;
  const int bh = blockIdx.y;
  const int b = bh / p.nheads, h = bh % p.nheads;
  const int value = (blockIdx.x * kBlock + threadIdx.x) * kValues;
  if (value >= p.values_per_head) return;
  const size_t stride = size_t(p.nheads) * p.values_per_head;  // from chunk to chunk
  const size_t first = (size_t(b) * p.chunks * p.nheads + h) * p.values_per_head + value;
  const size_t state_index = size_t(bh) * p.values_per_head + value;
  const float scale = p.state_scale[h * (p.values_per_head / p.d_state) + value / p.d_state];
  const float inverse = __frcp_rn(scale);
  const float* a = p.a + size_t(bh) * p.length;

  float carry[kValues];
  int carry_q[kValues];
  load_values<kValues>(p.ssm_state, state_index, p.state_fp32, carry);
  if (kInteger) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) carry_q[i] = ssd::integer_carry(carry[i], inverse, p.away);
  }
  const Word* states = reinterpret_cast<const Word*>(static_cast<const char*>(p.states) +
                                                     first * (kInteger ? 1 : 4));
  const size_t word_stride = stride / kValues;

  for (int base = 0; base < p.chunks; base += kAhead) {
    Word ahead[kAhead];
    float gates[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= p.chunks) break;
      ahead[i] = __ldcs(states + (base + i) * word_stride);
      gates[i] = expf(a[min((base + i + 1) * p.chunk, p.length) - 1]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= p.chunks) break;
      int q[kValues];
      if (kInteger) {
        const int gate = ssd::integer_gate(gates[i], p.away);
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          q[k] = ssd::saturate(carry_q[k], p.away);
          const int state = reinterpret_cast<const int8_t*>(&ahead[i])[k];
          carry_q[k] = ssd::pass_integer(carry_q[k], gate, state);
        }
      } else {
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          q[k] = quantize(carry[k], inverse, p.away);
          carry[k] =
              ssd::pass_real(carry[k], gates[i], reinterpret_cast<const float*>(&ahead[i])[k]);
        }
      }
      uint32_t* out = reinterpret_cast<uint32_t*>(p.passed + first + (base + i) * stride);
#pragma unroll
      for (int k = 0; k < kValues; k += 4) out[k / 4] = pack4(q[k], q[k + 1], q[k + 2], q[k + 3]);
    }
  }
  if (kInteger) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      carry[k] = __fmul_rn(static_cast<float>(ssd::saturate(carry_q[k], p.away)), scale);
    }
  }
  store_values<kValues>(p.ssm_state_out, state_index, p.state_fp32, carry);
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_state_passing(const Ssdi8StatePassingParams* p, void* stream) {
  using namespace ssdi8;
  ssd::Shape shape;
  if (int code = ssd::make_shape("state_passing", p->batch, p->length, p->nheads, p->headdim, 1,
                                 p->d_state, p->chunk_size, p->chunk_size, p->rounding,
                                 SSDI8_DECAY_STATIC, &shape)) {
    return code;
  }
  if (int code = ssd::check_gate("state_passing", p->gate, shape)) return code;
  if (int64_t(p->batch) * p->nheads > 65535) {
    return refuse("state_passing: batch %d times %d heads is more than 65535", p->batch, p->nheads);
  }
  const Passing passing = {
      p->states,        p->a,         p->ssm_state,       p->state_scale,          p->passed,
      p->ssm_state_out, p->length,    p->nheads,          p->headdim * p->d_state, p->d_state,
      p->chunk_size,    shape.chunks, p->state_fp32 != 0, shape.away != 0};
  const bool integer = p->gate == SSDI8_GATE_Q0_7;
  const dim3 grid(ceil_div(passing.values_per_head, kBlock * (integer ? 8 : 4)),
                  p->batch * p->nheads);
  auto* kernel = integer ? state_passing_kernel<true> : state_passing_kernel<false>;
  kernel<<<grid, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(passing);
  return check(cudaGetLastError(), "state_passing");
}

size_t ssdi8_sizeof_state_passing(void) { return sizeof(Ssdi8StatePassingParams); }
