// S[p, n] = sum_k Q(w_k . x[k, p]) . B_q[k, n], w_k = exp(a_last - a_k) . dt_k.
//
// x (B, L, H . P) FP16, b_q (B, L, G . N) INT8, dt and a (B, H, L) FP32, states (B, C, H, P, N)
// FP32 in real units (gate FP32) or INT8 in steps of state_scale (gate Q0.7). With scaling "none" Q
// rounds to FP16, the product is one of FP16, and so are the states. Two launches: B is transposed
// into operand order once per group, then one block per chunk and 64 channels of a head.

#include "ssd.cuh"

// ---------------------------------------------------------------------------------------------
// device code
// ---------------------------------------------------------------------------------------------

namespace ssdi8 {
namespace {

using ssd::Item;
using ssd::Shape;
using ssd::Tables;

template <int kN, bool kFp16>
__global__ __launch_bounds__(ssd::kThreads) void transpose_b_kernel(Shape shape,
                                                                    ssd::PrepareGroup params) {
  const int jobs = ssd::b_jobs(shape.chunk, kN);
  const int index = blockIdx.x * ssd::kWarps + threadIdx.x / 32;
  if (index >= shape.group_chunks() * jobs) return;
  ssd::prepare_group<kN, kFp16>(shape, params, index / jobs, index % jobs);
}

// Where the eight values of a lane begin that run `step` of its channel `p` has.
template <typename P>
__device__ __forceinline__ size_t state_index(const Shape& shape, const Item& it, int p, int step) {
  const size_t head = (size_t(it.b) * shape.chunks + it.c) * shape.nheads + it.h;
  return (head * shape.headdim + it.pt * ssd::kTileP + p) * P::kN + P::column(step);
}

template <typename P>  // ssd::Plan
__global__ __launch_bounds__(P::kThreads, P::kBlocksPerSm) void chunk_state_kernel(
    Shape shape, const __half* x, const float* dt, const float* a, ssd::Scales scales,
    const uint4* b_units, bool integer_states, void* states) {
  SSDI8_DYNAMIC_SHARED(uint4, shared);
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  uint4* xs = shared + sizeof(Tables) / sizeof(uint4);

  const Item it = ssd::make_item(shape, blockIdx.x, blockIdx.y);
  uint4 raw[P::kRowTiles][4];
  ssd::load_x<P>(shape, it, x, raw);
  ssd::fill_tables<P, true, false>(shape, it, dt, a, scales, integer_states, tables);
  __syncthreads();
  if (shape.dynamic) {
    ssd::find_scales<P>(raw, reinterpret_cast<float*>(xs), tables);
    __syncthreads();
  }
  ssd::quantize_x<P>(shape, raw, tables, xs);
  const uint4* own_b = b_units + it.group_chunk * shape.b_units() * 32;
  ssd::StateOperands<P> operands;
  operands.load_first(own_b);
  __syncthreads();
  ssd::StateInt<P> acc;
  ssd::state_product<P>(xs, own_b, operands, acc);

#pragma unroll
  for (int row = 0; row < P::kRows; ++row) {
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int p = P::channel(row) + r;
        if (p >= shape.channels(it.pt)) continue;
        const size_t index = state_index<P>(shape, it, p, step);
        const float multiplier = tables.state_multiplier[p];
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int sum = acc[row][step][i / 2][2 * r + i % 2];
          v[i] = __fmul_rn(__int_as_float(sum) - ssd::kMagic, multiplier);
        }
        if (integer_states) {
          int q[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) q[i] = round_to_int8(v[i], shape.away);
          *reinterpret_cast<uint2*>(static_cast<int8_t*>(states) + index) =
              make_uint2(pack4(q[0], q[1], q[2], q[3]), pack4(q[4], q[5], q[6], q[7]));
        } else {
          ssd::store_state8(states, index, true, v);
        }
      }
    }
  }
}

// With scaling "none".
template <typename P>
__global__ __launch_bounds__(P::kThreads, ssd::kFp16Resident<P>) void fp16_chunk_state_kernel(
    Shape shape, const __half* x, const float* dt, const float* a, ssd::Scales scales,
    const uint4* b_units, __half* states) {
  using Tables = ssd::Fp16Tables<P::kChunk>;
  SSDI8_DYNAMIC_SHARED(uint4, shared);
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  uint4* x16 = shared + sizeof(Tables) / sizeof(uint4);

  const Item it = ssd::make_item(shape, blockIdx.x, blockIdx.y);
  const uint4* own_b = b_units + it.group_chunk * 2 * shape.b_units() * 32;
  ssd::Fp16StateOperands<P> operands;
  {
    uint4 raw[P::kRowTiles][4];
    ssd::load_x<P>(shape, it, x, raw);
    operands.load_first(own_b);
    ssd::fill_fp16_tables<P, true, false>(shape, it, dt, a, scales, tables);
    ssd::copy_x<P>(raw, x16);
  }
  __syncthreads();
  ssd::StateReal<P> acc;
  ssd::fp16_state_product<P>(x16, tables.w_state, own_b, operands, acc);

#pragma unroll
  for (int row = 0; row < P::kRows; ++row) {
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (P::channel(row) + r >= shape.channels(it.pt)) continue;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          v[i] = __fmul_rn(acc[row][step][i / 2][2 * r + i % 2], tables.b_scale);
        }
        ssd::store_state8(states, state_index<P>(shape, it, P::channel(row) + r, step), false, v);
      }
    }
  }
}

template <int kN, bool kFp16>
cudaError_t launch_transpose_b(const Shape& shape, const Ssdi8ChunkStateParams& p,
                               cudaStream_t stream) {
  ssd::PrepareGroup prepare = {};
  prepare.b_q = p.b_q;
  prepare.b_units = static_cast<uint4*>(p.workspace);
  const size_t warps = shape.group_chunks() * ssd::b_jobs(shape.chunk, kN);
  return launch(transpose_b_kernel<kN, kFp16>, ceil_div(warps, ssd::kWarps), ssd::kThreads, 0,
                stream, shape, prepare);
}

template <typename P>
cudaError_t launch_chunk_state(const Shape& shape, const Ssdi8ChunkStateParams& p,
                               cudaStream_t stream) {
  if (cudaError_t error = launch_transpose_b<P::kN, false>(shape, p, stream)) return error;
  ssd::Scales scales = {};
  scales.x_scale = p.x_scale;
  scales.state_scale = p.state_scale;
  scales.b_scale = p.b_scale;
  const size_t bytes = sizeof(Tables) + P::kXsWords * sizeof(uint4);
  auto* kernel = chunk_state_kernel<P>;
  if (cudaError_t error = grant_shared(kernel, bytes)) return error;
  return launch(kernel, dim3(shape.lanes(), shape.chunks), P::kThreads, bytes, stream, shape,
                static_cast<const __half*>(p.x), p.dt, p.a, scales,
                static_cast<const uint4*>(p.workspace), p.gate == SSDI8_GATE_Q0_7, p.states);
}

template <typename P>
cudaError_t launch_fp16_chunk_state(const Shape& shape, const Ssdi8ChunkStateParams& p,
                                    cudaStream_t stream) {
  if (cudaError_t error = launch_transpose_b<P::kN, true>(shape, p, stream)) return error;
  ssd::Scales scales = {};
  scales.b_scale = p.b_scale;
  const size_t bytes = sizeof(ssd::Fp16Tables<P::kChunk>) + P::kX16Words * sizeof(uint4);
  auto* kernel = fp16_chunk_state_kernel<P>;
  if (cudaError_t error = grant_shared(kernel, bytes)) return error;
  return launch(kernel, dim3(shape.lanes(), shape.chunks), P::kThreads, bytes, stream, shape,
                static_cast<const __half*>(p.x), p.dt, p.a, scales,
                static_cast<const uint4*>(p.workspace), static_cast<__half*>(p.states));
}

template <int kN>
cudaError_t launch_chunk(const Shape& shape, const Ssdi8ChunkStateParams& p, cudaStream_t stream) {
  if (shape.fp16) {
    auto* launch = shape.chunk == 256   ? launch_fp16_chunk_state<ssd::Plan<kN, 2, 8>>
                   : shape.chunk == 128 ? launch_fp16_chunk_state<ssd::Plan<kN, 2, 4>>
                                        : launch_fp16_chunk_state<ssd::Plan<kN, 1, 4>>;
    return launch(shape, p, stream);
  }
  if (shape.chunk == 256) return launch_chunk_state<ssd::Plan<kN, 2, 8>>(shape, p, stream);
  if (shape.chunk == 128) return launch_chunk_state<ssd::Plan<kN, 1, 8>>(shape, p, stream);
  return launch_chunk_state<ssd::Plan<kN, 1, 4>>(shape, p, stream);
}

int make_shape(const Ssdi8ChunkStateParams& p, Shape* shape) {
  return ssd::make_shape("chunk_state", p.batch, p.length, p.nheads, p.headdim, p.ngroups,
                         p.d_state, p.chunk_size, p.rounding, p.scaling, shape);
}

}  // namespace
}  // namespace ssdi8

// ---------------------------------------------------------------------------------------------
// launcher
// ---------------------------------------------------------------------------------------------

int ssdi8_chunk_state(const Ssdi8ChunkStateParams* p, void* stream) {
  using namespace ssdi8;
  ssd::Shape shape{};
  if (int code = make_shape(*p, &shape)) return code;
  if (int code = ssd::check_gate("chunk_state", p->gate, shape)) return code;
  if (int code = ssd::check_scale("chunk_state", shape, "x_scale", p->x_scale)) return code;
  if (int code = ssd::check_scale("chunk_state", shape, "state_scale", p->state_scale)) return code;
  auto* launch = shape.d_state == 64    ? launch_chunk<64>
                 : shape.d_state == 128 ? launch_chunk<128>
                                        : launch_chunk<256>;
  return check(launch(shape, *p, static_cast<cudaStream_t>(stream)), "chunk_state");
}

size_t ssdi8_chunk_state_workspace(const Ssdi8ChunkStateParams* p) {
  ssdi8::ssd::Shape shape{};
  if (ssdi8::make_shape(*p, &shape)) return 0;
  return shape.group_chunks() * (shape.fp16 + 1) * shape.b_units() * ssdi8::ssd::kUnitBytes;
}

size_t ssdi8_sizeof_chunk_state(void) { return sizeof(Ssdi8ChunkStateParams); }
