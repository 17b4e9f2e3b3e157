// The C ABI of libssdi8_kernels: one parameter struct and one launcher per op.
//
// Plain C: no Torch, no TensorRT. The torch references in ssdi8_edge/ops/*.py are the
// specification.
//
// Every launcher
//   * checks its arguments first: what it cannot compute it refuses, with SSDI8_UNSUPPORTED and a
//     sentence in ssdi8_last_error();
//   * only enqueues on `stream` (a cudaStream_t): no allocation, no synchronisation, so it can be
//     captured in a CUDA graph;
//   * takes device pointers of the current device, aligned to 16 bytes;
//   * returns 0, or one of the codes below.
//
// Scratch memory comes from the caller: ssdi8_<op>_workspace(params) bytes, where that function
// exists. ssdi8_sizeof_<op>() lets a foreign-language mirror of a struct check itself.
//
// Letters: B batch, L tokens, T = B * L, D model width, E inner width, G groups, N state size,
// H heads, W convolution width, E2 = E + 2GN, R = 2E + 2GN + H. A tensor is dense and row-major
// unless a stride is named. FP16 pointers are const void*, so that plain C can include this file.

#ifndef SSDI8_KERNELS_H_
#define SSDI8_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)  // the library hides everything else
#endif
#ifdef __cplusplus
extern "C" {
#endif

#define SSDI8_ABI_VERSION 8

enum { SSDI8_OK = 0, SSDI8_UNSUPPORTED = 1, SSDI8_CUDA_ERROR = 2 };

// int8.py: half_even saturates to [-128, 127], half_away to [-127, 127].
enum { SSDI8_ROUNDING_HALF_EVEN = 0, SSDI8_ROUNDING_HALF_AWAY = 1 };

// Where the scales of INT8 tensors come from: inputs, or the tensors themselves. NONE: there are
// none. Inputs "static only" are read with STATIC alone and may else be null.
enum { SSDI8_SCALING_STATIC = 0, SSDI8_SCALING_DYNAMIC = 1, SSDI8_SCALING_NONE = 2 };

int32_t ssdi8_abi_version(void);

// Why the last call on this thread failed; never null, valid until the next failure on the thread.
const char* ssdi8_last_error(void);

// ---------------------------------------------------------------------------------------------
// Norms, linear layers, convolution
// ---------------------------------------------------------------------------------------------

// The input of a linear layer is INT8 with one scale per token: static that of all, dynamic the
// largest value of the token over 127.

// residual_out = residual + hidden; quantized = Q(residual_out / rms(residual_out) / token_scale).
typedef struct Ssdi8RmsNormParams {
  const void* hidden;     // (T, D) FP16
  const float* residual;  // (T, D)
  const float* scale;     // (1), static only
  float* residual_out;    // (T, D), may be `residual`
  int8_t* quantized;      // (T, D)
  float* token_scale;     // (T)
  int32_t tokens;         // T
  int32_t d_model;        // D, a multiple of 8, at most 8192
  float eps;
  int32_t rounding;
  int32_t scaling;  // not NONE
} Ssdi8RmsNormParams;
int ssdi8_rms_norm(const Ssdi8RmsNormParams* params, void* stream);
size_t ssdi8_sizeof_rms_norm(void);

// y = FP16(FP32(x . weight^T) * scale * token_scale + bias).
typedef struct Ssdi8LinearParams {
  const int8_t* x;           // (T, In)
  const float* token_scale;  // (T), of x
  const int8_t* weight;      // (Out, In)
  const float* scale;        // (Out), of the weight
  const float* bias;         // (Out)
  void* y;                   // (T, Out) FP16
  int32_t tokens;            // T
  int32_t in_features;       // In, a multiple of 32, at most 65536
  int32_t out_features;      // Out
  int32_t variant;           // 0: the launcher chooses; 1 vector, 2 small, 3 medium, 4 large tile
} Ssdi8LinearParams;
int ssdi8_linear(const Ssdi8LinearParams* params, void* stream);
size_t ssdi8_sizeof_linear(void);

// The same with the INT8 weight round_half_even((q4 - 8) * group_scale), made on the fly.
typedef struct Ssdi8LinearW4Params {
  const int8_t* x;           // (T, In)
  const float* token_scale;  // (T), of x
  const int8_t* packed;  // (Out, In / 2): byte 4i + j plus 128 = 16 * q4[8i + 4 + j] + q4[8i + j]
  const void* group_scale;  // (Out, In / group_size) FP16, or INT8 from -15 to 16, not 0
  const float* scale;       // (Out)
  const float* bias;        // (Out)
  void* y;                  // (T, Out) FP16
  int32_t tokens;           // T
  int32_t in_features;      // In, a multiple of 32 and of group_size, at most 65536
  int32_t out_features;     // Out
  int32_t group_size;       // 32, 64 or 128
  int32_t integer_scales;   // group_scale is INT8
  int32_t variant;          // as in Ssdi8LinearParams
} Ssdi8LinearW4Params;
int ssdi8_linear_w4(const Ssdi8LinearW4Params* params, void* stream);
size_t ssdi8_sizeof_linear_w4(void);

// Before a tensor is quantized: ssdi8_edge/numerics/hadamard.py. B and C: NONE or HADAMARD
// (`rotate` in each group); the input of a linear layer: all others (`apply`).
enum {
  SSDI8_ROTATION_NONE = 0,
  SSDI8_ROTATION_HADAMARD = 1,
  SSDI8_ROTATION_FULL = 2,
  SSDI8_ROTATION_BLOCKS = 3,
  SSDI8_ROTATION_SIGNS = 4
};

// silu(bias + sum_w weight[:, w] * xBC[t - W + 1 + w]) over the x, B, C columns of zxbcdt.
typedef struct Ssdi8CausalConv1dParams {
  const void* zxbcdt;      // (B, L, R) FP16; columns d_inner .. d_inner + conv_dim are read
  const void* conv_state;  // (B, W - 1, E2) FP16, oldest row first
  const float* weight;     // (E2, W)
  const float* bias;       // (E2)
  const float* b_scale;    // (G)
  const float* c_scale;    // (G)
  void* x;                 // (B, L, E) FP16
  int8_t* b_q;             // (B, L, G * N)
  int8_t* c_q;             // (B, L, G * N)
  void* conv_state_out;    // (B, W - 1, E2) FP16, may be `conv_state`
  int32_t batch;           // B
  int32_t length;          // L
  int32_t row_stride;      // R, elements from one token of zxbcdt to the next
  int32_t d_inner;         // E, a multiple of 4
  int32_t conv_dim;        // E2 = E + 2GN
  int32_t d_conv;          // W, 2 to 4
  int32_t ngroups;         // G; N must be a multiple of 4, if rotated 64, 128 or 256
  int32_t rotation;
  int32_t rounding;
} Ssdi8CausalConv1dParams;
int ssdi8_causal_conv1d(const Ssdi8CausalConv1dParams* params, void* stream);
size_t ssdi8_sizeof_causal_conv1d(void);

// quantized = Q(R . r / token_scale), r = v / rms(v in its group) * weight, v = y * silu(z); R is
// one Hadamard matrix of order E, or equal ones along the diagonal (hadamard.py, transform).
typedef struct Ssdi8RmsNormGatedParams {
  const void* y;        // (T, E) FP16
  const void* zxbcdt;   // (T, R) FP16; z is its first E columns
  const float* weight;  // (E)
  const float* scale;   // (1), static only
  int8_t* quantized;    // (T, E)
  float* token_scale;   // (T)
  int32_t tokens;       // T
  int32_t d_inner;      // E, a multiple of 8, at most 16384
  int32_t row_stride;   // R, elements from one token of zxbcdt to the next
  int32_t ngroups;      // G; E / G must be a multiple of 8
  float eps;
  int32_t rounding;
  int32_t scaling;  // not NONE
} Ssdi8RmsNormGatedParams;
int ssdi8_rms_norm_gated(const Ssdi8RmsNormGatedParams* params, void* stream);
size_t ssdi8_sizeof_rms_norm_gated(void);

// The same with r = y / rms(y in its group) * weight * silu(z).
typedef struct Ssdi8NormThenGateParams {
  const void* y;        // (T, E) FP16
  const void* zxbcdt;   // (T, R) FP16; z is its first E columns
  const float* weight;  // (E)
  const float* scale;   // (1), static only
  int8_t* quantized;    // (T, E)
  float* token_scale;   // (T)
  int32_t tokens;       // T
  int32_t d_inner;      // E, a multiple of 8, at most 16384
  int32_t row_stride;   // R, elements from one token of zxbcdt to the next
  int32_t ngroups;      // G; E / G must be a multiple of 8
  float eps;
  int32_t rounding;
  int32_t scaling;  // not NONE
} Ssdi8NormThenGateParams;
int ssdi8_norm_then_gate(const Ssdi8NormThenGateParams* params, void* stream);
size_t ssdi8_sizeof_norm_then_gate(void);

// quantized = Q(R . x / token_scale).
typedef struct Ssdi8QuantizeParams {
  const void* x;       // (T, width) FP16
  const float* scale;  // (1), static only
  int8_t* quantized;   // (T, width)
  float* token_scale;  // (T)
  int32_t tokens;      // T
  int32_t width;       // a multiple of 8, at most 16384
  int32_t rotation;    // R: not HADAMARD
  int32_t rounding;
  int32_t scaling;  // not NONE
} Ssdi8QuantizeParams;
int ssdi8_quantize(const Ssdi8QuantizeParams* params, void* stream);
size_t ssdi8_sizeof_quantize(void);

// max(x, 0)^2, or x * silu(gate).
enum { SSDI8_ACTIVATION_RELU2 = 0, SSDI8_ACTIVATION_SILU_GATE = 1 };

// quantized = Q(R . activation / token_scale).
typedef struct Ssdi8ActivationParams {
  const void* x;       // (T, x_stride) FP16; `width` columns from x_column on are read
  const void* gate;    // (T, gate_stride) FP16; its first `width` columns, SILU_GATE only
  const float* scale;  // (1), static only
  int8_t* quantized;   // (T, width)
  float* token_scale;  // (T)
  int32_t tokens;      // T
  int32_t width;       // a multiple of 8, at most 16384
  int32_t x_column;
  int32_t x_stride;  // elements from one token of x to the next
  int32_t gate_stride;
  int32_t activation;
  int32_t rotation;  // R: not HADAMARD
  int32_t rounding;
  int32_t scaling;  // not NONE
} Ssdi8ActivationParams;
int ssdi8_activation(const Ssdi8ActivationParams* params, void* stream);
size_t ssdi8_sizeof_activation(void);

// ---------------------------------------------------------------------------------------------
// Attention
// ---------------------------------------------------------------------------------------------

// o = softmax(q . k^T / sqrt(d), causal) . v over a cache that the call's tokens are appended to,
// of Q query heads and KV heads of keys and values, d channels each: query head h reads KV head h *
// KV / Q. Rows of k and v are INT8 in units of an FP16 scale, their largest value over 127.
typedef struct Ssdi8AttentionParams {
  const void* projected;    // (B, L, R) FP16; from first_column on q (Q * d), k and v (KV * d)
  const int8_t* k_cache;    // (B, KV, T, d)
  const void* k_scale;      // (B, KV, T) FP16
  const int8_t* v_cache;    // (B, KV, T, d)
  const void* v_scale;      // (B, KV, T) FP16
  const int64_t* position;  // (1): tokens before this call. What passes T is not stored
  void* o;                  // (B, L, Q * d) FP16
  int8_t* k_cache_out;      // as the inputs, and may be them: else these are copied
  void* k_scale_out;
  int8_t* v_cache_out;
  void* v_scale_out;
  void* workspace;
  int32_t batch;       // B
  int32_t length;      // L
  int32_t capacity;    // T
  int32_t row_stride;  // R
  int32_t n_heads;     // Q, a multiple of KV
  int32_t n_kv_heads;  // KV
  int32_t head_dim;    // d: 64, 80, 96 or 128
  int32_t first_column;
  float rope_theta;  // of rotary positions, T up to 131072; 0: none
} Ssdi8AttentionParams;
int ssdi8_attention(const Ssdi8AttentionParams* params, void* stream);
size_t ssdi8_attention_workspace(const Ssdi8AttentionParams* params);
size_t ssdi8_sizeof_attention(void);

// ---------------------------------------------------------------------------------------------
// SSD
// ---------------------------------------------------------------------------------------------

// Heads h share group h * G / H. The chunk is 64, 128 or 256; C = ceil(L / chunk) chunks. headdim P
// is 32, 64, 80 or 128, d_state N 64, 128 or 256. Heads and groups as such are not bounded.

// How the state travels from chunk to chunk: ops/state_passing.py.
enum { SSDI8_GATE_FP32 = 0, SSDI8_GATE_Q0_7 = 1 };

// Scaling of w * x and of the states between chunks: dynamic by the largest values of each channel
// in its chunk, over 127; NONE: both are FP16. Without STATIC the gate is FP32.

// dt = clamp(softplus(dt_raw + dt_bias)); a = cumulative sum of A * dt inside each chunk.
typedef struct Ssdi8ChunkCumsumParams {
  const void* zxbcdt;    // (B, L, R) FP16; columns dt_column .. dt_column + H are read
  const float* dt_bias;  // (H)
  const float* a_rate;   // (H), the model's A < 0
  float* dt;             // (B, H, L)
  float* a;              // (B, H, L)
  int32_t batch;         // B
  int32_t length;        // L
  int32_t row_stride;    // R, elements from one token of zxbcdt to the next
  int32_t dt_column;
  int32_t nheads;  // H
  int32_t chunk_size;
  float dt_min;
  float dt_max;
} Ssdi8ChunkCumsumParams;
int ssdi8_chunk_cumsum(const Ssdi8ChunkCumsumParams* params, void* stream);
size_t ssdi8_sizeof_chunk_cumsum(void);

// S[p, n] = sum_k Q(w_k * x[k, p]) * B_q[k, n], w_k = exp(a_last - a_k) * dt_k.
typedef struct Ssdi8ChunkStateParams {
  const void* x;             // (B, L, H * P) FP16
  const int8_t* b_q;         // (B, L, G * N)
  const float* dt;           // (B, H, L)
  const float* a;            // (B, H, L)
  const float* b_scale;      // (G)
  const float* x_scale;      // (H, P), static only
  const float* state_scale;  // (H, P), static only
  void* states;              // (B, C, H, P, N) FP32, gate Q0.7 INT8, scaling NONE FP16
  void* workspace;
  int32_t batch;    // B
  int32_t length;   // L
  int32_t nheads;   // H
  int32_t headdim;  // P
  int32_t ngroups;  // G
  int32_t d_state;  // N
  int32_t chunk_size;
  int32_t gate;
  int32_t rounding;
  int32_t scaling;
} Ssdi8ChunkStateParams;
int ssdi8_chunk_state(const Ssdi8ChunkStateParams* params, void* stream);
size_t ssdi8_chunk_state_workspace(const Ssdi8ChunkStateParams* params);
size_t ssdi8_sizeof_chunk_state(void);

// R_0 = ssm_state; R_{c+1} = exp(a_last of c) * R_c + S_c; passed = Q(R_c / passed_scale).
typedef struct Ssdi8StatePassingParams {
  const void* states;        // (B, C, H, P, N) FP32, gate Q0.7 INT8, scaling NONE FP16
  const float* a;            // (B, H, L)
  const void* ssm_state;     // (B, H, P, N)
  const float* state_scale;  // (H, P), static only
  void* passed;              // (B, C, H, P, N) INT8, scaling NONE FP16
  float* passed_scale;       // (B, C, H, P); static: state_scale; none: 1
  void* ssm_state_out;       // (B, H, P, N), may be `ssm_state`
  int32_t batch;             // B
  int32_t length;            // L
  int32_t nheads;            // H
  int32_t headdim;           // P
  int32_t d_state;           // N
  int32_t chunk_size;
  int32_t gate;
  int32_t rounding;
  int32_t scaling;
  int32_t state_fp32;  // type of ssm_state: 0 FP16, 1 FP32
} Ssdi8StatePassingParams;
int ssdi8_state_passing(const Ssdi8StatePassingParams* params, void* stream);
size_t ssdi8_sizeof_state_passing(void);

// y = exp(a_m) * C . R + sum_{k <= m} CB * exp(a_m - a_k) * dt_k * x_k + D * x.
typedef struct Ssdi8ChunkScanParams {
  const void* x;              // (B, L, H * P) FP16
  const int8_t* b_q;          // (B, L, G * N)
  const int8_t* c_q;          // (B, L, G * N)
  const float* dt;            // (B, H, L)
  const float* a;             // (B, H, L)
  const void* passed;         // (B, C, H, P, N) INT8, scaling NONE FP16
  const float* passed_scale;  // (B, C, H, P), not read with scaling NONE
  const float* d_skip;        // (H), the model's D
  const float* b_scale;       // (G)
  const float* c_scale;       // (G)
  const float* cb_scale;      // (G)
  void* y;                    // (B, L, H * P) FP16
  void* workspace;
  int32_t batch;    // B
  int32_t length;   // L
  int32_t nheads;   // H
  int32_t headdim;  // P
  int32_t ngroups;  // G
  int32_t d_state;  // N
  int32_t chunk_size;
  int32_t rounding;
  int32_t scaling;
} Ssdi8ChunkScanParams;
int ssdi8_chunk_scan(const Ssdi8ChunkScanParams* params, void* stream);
size_t ssdi8_chunk_scan_workspace(const Ssdi8ChunkScanParams* params);
size_t ssdi8_sizeof_chunk_scan(void);

// The four above in one op; for L = 1 the recurrence on the unquantized state.
typedef struct Ssdi8SsdScanParams {
  const void* x;             // (B, L, H * P) FP16
  const int8_t* b_q;         // (B, L, G * N)
  const int8_t* c_q;         // (B, L, G * N)
  const void* zxbcdt;        // (B, L, R) FP16; columns dt_column .. dt_column + H are read
  const void* ssm_state;     // (B, H, P, N)
  const float* dt_bias;      // (H)
  const float* a_rate;       // (H), the model's A < 0
  const float* d_skip;       // (H), the model's D
  const float* b_scale;      // (G)
  const float* c_scale;      // (G)
  const float* cb_scale;     // (G)
  const float* x_scale;      // (H, P), static only
  const float* state_scale;  // (H, P), static only
  void* y;                   // (B, L, H * P) FP16
  void* ssm_state_out;       // (B, H, P, N), may be `ssm_state`
  void* workspace;
  int32_t batch;    // B
  int32_t length;   // L
  int32_t nheads;   // H
  int32_t headdim;  // P
  int32_t ngroups;  // G
  int32_t d_state;  // N
  int32_t chunk_size;
  int32_t row_stride;  // R
  int32_t dt_column;
  int32_t gate;
  int32_t rounding;
  int32_t scaling;
  int32_t state_fp32;  // type of ssm_state: 0 FP16, 1 FP32
  float dt_min;
  float dt_max;
} Ssdi8SsdScanParams;
int ssdi8_ssd_scan(const Ssdi8SsdScanParams* params, void* stream);
size_t ssdi8_ssd_scan_workspace(const Ssdi8SsdScanParams* params);
size_t ssdi8_sizeof_ssd_scan(void);

// ---------------------------------------------------------------------------------------------
// Before and behind the blocks
// ---------------------------------------------------------------------------------------------

// hidden = rows of the table; residual = 0.
typedef struct Ssdi8EmbeddingParams {
  const void* table;         // (V, D) FP16
  const int32_t* input_ids;  // (T), 0 to V - 1
  void* hidden;              // (T, D) FP16
  float* residual;           // (T, D)
  int32_t tokens;            // T
  int32_t d_model;           // D, a multiple of 8
} Ssdi8EmbeddingParams;
int ssdi8_embedding(const Ssdi8EmbeddingParams* params, void* stream);
size_t ssdi8_sizeof_embedding(void);

// The same with an INT8 table: hidden = FP16(FP32(q) * scale).
typedef struct Ssdi8EmbeddingInt8Params {
  const int32_t* packed;     // (V, D / 4): byte k is column k * D / 4 + i, the lower three plus 128
  const float* scale;        // (V)
  const int32_t* input_ids;  // (T), 0 to V - 1
  void* hidden;              // (T, D) FP16
  float* residual;           // (T, D)
  int32_t tokens;            // T
  int32_t d_model;           // D, a multiple of 8
} Ssdi8EmbeddingInt8Params;
int ssdi8_embedding_int8(const Ssdi8EmbeddingInt8Params* params, void* stream);
size_t ssdi8_sizeof_embedding_int8(void);

// The last K positions of both.
typedef struct Ssdi8LastPositionsParams {
  const void* hidden;     // (B, L, D) FP16
  const float* residual;  // (B, L, D)
  void* hidden_kept;      // (B, K, D) FP16
  float* residual_kept;   // (B, K, D)
  int32_t batch;          // B
  int32_t length;         // L
  int32_t keep;           // K, 1 to L
  int32_t d_model;        // D, a multiple of 8
} Ssdi8LastPositionsParams;
int ssdi8_last_positions(const Ssdi8LastPositionsParams* params, void* stream);
size_t ssdi8_sizeof_last_positions(void);

typedef struct Ssdi8LogitsParams {
  const void* y;       // (T, V) FP16
  float* logits;       // (T, V)
  int32_t tokens;      // T
  int32_t vocab_size;  // V
} Ssdi8LogitsParams;
int ssdi8_logits(const Ssdi8LogitsParams* params, void* stream);
size_t ssdi8_sizeof_logits(void);

// ---------------------------------------------------------------------------------------------
// The FP16 baseline: FP16 between ops, FP32 inside
// ---------------------------------------------------------------------------------------------

// residual_out = residual + hidden; normed = FP16(residual_out / rms(residual_out) * weight).
typedef struct Ssdi8Fp16RmsNormParams {
  const void* hidden;     // (T, D) FP16
  const float* residual;  // (T, D)
  const float* weight;    // (D)
  float* residual_out;    // (T, D), may be `residual`
  void* normed;           // (T, D) FP16
  int32_t tokens;         // T
  int32_t d_model;        // D
  float eps;
} Ssdi8Fp16RmsNormParams;
int ssdi8_fp16_rms_norm(const Ssdi8Fp16RmsNormParams* params, void* stream);
size_t ssdi8_sizeof_fp16_rms_norm(void);

// y = FP16(x . weight^T).
typedef struct Ssdi8Fp16LinearParams {
  const void* x;         // (T, In) FP16
  const void* weight;    // (Out, In) FP16
  void* y;               // (T, Out) FP16
  int32_t tokens;        // T
  int32_t in_features;   // In, a multiple of 32
  int32_t out_features;  // Out
} Ssdi8Fp16LinearParams;
int ssdi8_fp16_linear(const Ssdi8Fp16LinearParams* params, void* stream);
size_t ssdi8_sizeof_fp16_linear(void);

// As Ssdi8CausalConv1dParams, with B and C in FP16.
typedef struct Ssdi8Fp16CausalConv1dParams {
  const void* zxbcdt;      // (B, L, R) FP16; columns d_inner .. d_inner + conv_dim are read
  const void* conv_state;  // (B, W - 1, E2) FP16, oldest row first
  const float* weight;     // (E2, W)
  const float* bias;       // (E2)
  void* x;                 // (B, L, E) FP16
  void* b;                 // (B, L, G * N) FP16
  void* c;                 // (B, L, G * N) FP16
  void* conv_state_out;    // (B, W - 1, E2) FP16, may be `conv_state`
  int32_t batch;           // B
  int32_t length;          // L
  int32_t row_stride;      // R, elements from one token of zxbcdt to the next
  int32_t d_inner;         // E
  int32_t conv_dim;        // E2 = E + 2GN
  int32_t d_conv;          // W, 2 to 4
} Ssdi8Fp16CausalConv1dParams;
int ssdi8_fp16_causal_conv1d(const Ssdi8Fp16CausalConv1dParams* params, void* stream);
size_t ssdi8_sizeof_fp16_causal_conv1d(void);

// y = C . R + D * x, R = exp(A * dt) * R + dt * x * B; dt as in Ssdi8ChunkCumsumParams.
typedef struct Ssdi8Fp16SsdScanParams {
  const void* x;          // (B, L, H * P) FP16
  const void* b;          // (B, L, G * N) FP16
  const void* c;          // (B, L, G * N) FP16
  const void* zxbcdt;     // (B, L, R) FP16; columns dt_column .. dt_column + H are read
  const void* ssm_state;  // (B, H, P, N)
  const float* dt_bias;   // (H)
  const float* a_rate;    // (H), the model's A < 0
  const float* d_skip;    // (H), the model's D
  void* y;                // (B, L, H * P) FP16
  void* ssm_state_out;    // (B, H, P, N), may be `ssm_state`
  int32_t batch;          // B
  int32_t length;         // L
  int32_t nheads;         // H
  int32_t headdim;        // P, a multiple of 16
  int32_t ngroups;        // G
  int32_t d_state;        // N, 64, 128 or 256
  int32_t row_stride;     // R
  int32_t dt_column;
  int32_t state_fp32;  // type of ssm_state: 0 FP16, 1 FP32
  float dt_min;
  float dt_max;
} Ssdi8Fp16SsdScanParams;
int ssdi8_fp16_ssd_scan(const Ssdi8Fp16SsdScanParams* params, void* stream);
size_t ssdi8_sizeof_fp16_ssd_scan(void);

// normed = FP16(v / rms(v in its group) * weight), v = y * silu(z).
typedef struct Ssdi8Fp16RmsNormGatedParams {
  const void* y;        // (T, E) FP16
  const void* zxbcdt;   // (T, R) FP16; z is its first E columns
  const float* weight;  // (E)
  void* normed;         // (T, E) FP16
  int32_t tokens;       // T
  int32_t d_inner;      // E
  int32_t row_stride;   // R, elements from one token of zxbcdt to the next
  int32_t ngroups;      // G, which divides E
  float eps;
} Ssdi8Fp16RmsNormGatedParams;
int ssdi8_fp16_rms_norm_gated(const Ssdi8Fp16RmsNormGatedParams* params, void* stream);
size_t ssdi8_sizeof_fp16_rms_norm_gated(void);

#ifdef __cplusplus
}  // extern "C"
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif  // SSDI8_KERNELS_H_
