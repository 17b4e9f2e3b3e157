// Kernels that do what the emulator has to notice, for tests/kernels/test_kernel_emulator.py. Compiled as the
// other kernels are, with gpu.cuh before the first line.

namespace {

// Half of the first warp waits for lanes that wait elsewhere.
__global__ void stand_still() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void wait_for_ended_lane() {
  if (threadIdx.x != 5) __syncwarp();
}

__global__ void mix_instructions() {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}

__global__ void wait_for_later_block(int* flag) {
  while (blockIdx.x == 0 && ssdi8::load_relaxed(flag) == 0) {
  }
  ssdi8::store_release(flag, 1);
}

__global__ void read_behind_shared(int* out) {
  SSDI8_DYNAMIC_SHARED(int, memory);
  out[threadIdx.x] = memory[threadIdx.x + 1];
}

__global__ void read_misaligned(int* out) {
  out[threadIdx.x] = reinterpret_cast<const int2*>(out + threadIdx.x)->x;
}

__global__ void leave_array(int* out) {
  __shared__ int memory[32];
  out[threadIdx.x] = memory[threadIdx.x + 1];
}

// What block 1 finds where block 0 has written.
__global__ void read_what_none_has_written(int* out) {
  SSDI8_DYNAMIC_SHARED(int, dynamic);
  __shared__ int fixed[32];
  if (blockIdx.x == 1) {
    out[threadIdx.x] = dynamic[threadIdx.x];
    out[32 + threadIdx.x] = fixed[threadIdx.x];
  }
  dynamic[threadIdx.x] = fixed[threadIdx.x] = 0;
}

// Threads read what the next one writes. A barrier lies between if `barrier`.
__global__ void exchange(int* out, bool barrier) {
  SSDI8_DYNAMIC_SHARED(int, memory);
  memory[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = memory[(threadIdx.x + 1) % blockDim.x];
}

// Copies 16 bytes a thread in two groups, and waits until kPending of them are under way.
template <int kPending>
__global__ void copy(int* out) {
  SSDI8_DYNAMIC_SHARED(int, memory);
  for (int i = 0; i < 2; ++i) {
    const int at = i * 4 * blockDim.x + 4 * threadIdx.x;
    ssdi8::cp_async_16(ssdi8::shared_address(memory + at), out + at);
    ssdi8::cp_async_commit();
  }
  ssdi8::cp_async_wait<kPending>();
  __syncthreads();
  for (int i = threadIdx.x; i < int(8 * blockDim.x); i += blockDim.x) out[i] = memory[i];
}

}  // namespace

// Runs a kernel of this name; `memory` is what it reads and writes. The launch's error.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(const char* name,
                                                                         int* memory) {
  const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
  const auto launch = [](auto kernel, int blocks, int threads, size_t bytes, auto... arguments) {
    return ssdi8::launch(kernel, blocks, threads, bytes, nullptr, arguments...);
  };
  cudaError_t error = cudaErrorInvalidValue;
  if (is("stand_still")) error = launch(stand_still, 1, 64, 0);
  if (is("wait_for_ended_lane")) error = launch(wait_for_ended_lane, 1, 32, 0);
  if (is("mix_instructions")) error = launch(mix_instructions, 1, 32, 0);
  if (is("wait_for_later_block")) error = launch(wait_for_later_block, 2, 1, 0, memory);
  if (is("read_behind_shared")) error = launch(read_behind_shared, 1, 32, 32 * 4, memory);
  if (is("read_misaligned")) error = launch(read_misaligned, 1, 32, 0, memory);
  if (is("leave_array")) error = launch(leave_array, 1, 32, 0, memory);
  if (is("ask_too_much")) error = launch(exchange, 1, 64, 48 * 1024 + 16, memory, true);
  if (is("read_what_none_has_written")) {
    error = launch(read_what_none_has_written, 2, 32, 32 * 4, memory);
  }
  if (is("exchange")) error = launch(exchange, 1, 64, 64 * 4, memory, true);
  if (is("exchange_without_barrier")) error = launch(exchange, 1, 64, 64 * 4, memory, false);
  if (is("copy")) error = launch(copy<0>, 1, 32, 32 * 32, memory);
  if (is("copy_without_last_wait")) error = launch(copy<1>, 1, 32, 32 * 32, memory);
  return cudaGetErrorString(error);
}
