// Runs CUDA kernels on a CPU, to prove what they compute without a GPU.
//
// A thread of the GPU is a fiber. A grid runs one block after the other, x fastest, then y, then z;
// within a block a fiber runs until it has to wait for others, and the warp that has its turn as
// far as it can. A kernel that cannot go on, or that touches memory which is not its own, ends its
// launch with a message.

#ifndef SSDI8_TESTS_EMULATOR_H_
#define SSDI8_TESTS_EMULATOR_H_

#include <stddef.h>
#include <stdint.h>

#include <functional>

#include "cuda_runtime.h"

namespace emulator {

constexpr int kWarp = 32;

// Runs `thread` as each thread of the grid. `kernel` is what cudaFuncSetAttribute knows it by.
cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                     const std::function<void()>& thread);

// Ends the launch with this printf-style message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for all threads of the block that have not ended.
void meet_block();

// What the last of the lanes in `mask` to arrive does for all of them: operands[i] is lane i's.
using Finish = void (*)(void* const* operands, unsigned mask);

// Waits for the lanes in `mask`; `instruction` says what for, and has to be the same for all.
void meet_warp(const char* instruction, unsigned mask, void* operands, Finish finish);

// The dynamic shared memory of the block, and the address of a place in it.
void* shared_memory();
struct SharedMemory {
  template <typename T>
  operator T*() const {
    return static_cast<T*>(shared_memory());
  }
};
uint32_t shared_address(const void* pointer);

// Asynchronous copies of 16 bytes: null stands for zeros. They land in wait_copies, which leaves
// `pending` of the thread's last groups under way.
void start_copy(uint32_t shared, const void* global);
void commit_copies();
void wait_copies(int pending);

// To be called by each read of a loop that waits for another block: blocks before this one have
// ended, so that many reads in a row wait in vain.
void waiting_for_block();

// d (16 x 8) = a (16 x k, row) * b (k x 8, column) + c, from and to the registers of a warp: k is
// 32 with INT8 operands, 16 with FP16 operands, whose products are added in FP32 by ascending k.
void matrix_product_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const int (&c)[4]);
void matrix_product_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// Of an 8 x 8 matrix of halves.
uint32_t matrix_transpose(uint32_t pair);

}  // namespace emulator

#endif  // SSDI8_TESTS_EMULATOR_H_
