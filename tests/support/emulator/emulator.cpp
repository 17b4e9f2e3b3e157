#include "emulator.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <map>
#include <string>
#include <vector>

#include "cuda_fp16.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kLauncher = kMaxThreads;  // the fiber that runs the grid
constexpr unsigned kMaxGridYZ = 65535;
// What a block may have without asking, and at all: of sm_86, the least of the chips from there on.
constexpr size_t kGivenShared = 48 * 1024, kMaxShared = 99 * 1024;
constexpr size_t kStackBytes = 64 * 1024;  // of a thread
const size_t kPage = sysconf(_SC_PAGESIZE);
constexpr int kGarbage = 0x7f;    // large as FP32 and as INT8, NaN as FP16
constexpr int kMaxReads = 10000;  // in a row, of flags that no thread can set any more

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// `bytes` with a page before and one behind whose use is a fault. Never freed.
char* fenced_memory(size_t bytes) {
  bytes = whole_pages(bytes);
  void* p = mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* usable = static_cast<char*>(p) + kPage;
  if (p == MAP_FAILED || mprotect(usable, bytes, PROT_READ | PROT_WRITE) != 0) {
    perror("emulator");
    abort();
  }
  return usable;
}

struct Copy {
  char* to;
  const void* from;
};

struct Fiber {
  char* stack = nullptr;
  bool started = false;
  bool ended = false;
  jmp_buf turn;  // where it goes on
  // Where it waits.
  const char* instruction = nullptr;
  unsigned mask = 0;
  void* operands = nullptr;
  // Copies under way, and how many there were at the end of each group.
  std::vector<Copy> copies;
  std::vector<size_t> groups;
};

// What a test chooses.
int processors = 8;
unsigned seed = 0;  // of the order in which threads take turns; 0: by their numbers

// What the runtime knows.
std::map<const void*, size_t> granted;
char message[512] = "";

// The block that runs.
const std::function<void()>* body;
Fiber fibers[kMaxThreads + 1];
unsigned ready[kMaxThreads / kWarp];  // which lanes of each warp can go on
unsigned order[kMaxThreads / kWarp];  // of warps, first those that are preferred
unsigned threads, warps, live, at_barrier;
unsigned current;
unsigned random_number;
int reads;
char* const arena = fenced_memory(kMaxShared);
char* const arena_end = arena + whole_pages(kMaxShared);
char* shared;  // ends at the fence
size_t shared_bytes;
sigjmp_buf grid_failed;

// ---------------------------------------------------------------------------------------------
// turns
// ---------------------------------------------------------------------------------------------

void make_ready(unsigned thread) { ready[thread / kWarp] |= 1u << thread % kWarp; }
void make_unready(unsigned thread) { ready[thread / kWarp] &= ~(1u << thread % kWarp); }

[[noreturn]] void fail_at_standstill() {
  std::map<std::string, int> places;
  for (unsigned i = 0; i < threads; ++i) {
    ++places[fibers[i].ended ? "ended" : std::string("in ") + fibers[i].instruction];
  }
  std::string text;
  for (const auto& [place, count] : places) text += ", " + std::to_string(count) + " " + place;
  fail("no thread can go on: of %u threads%s", threads, text.c_str() + 1);
}

unsigned draw(unsigned bound) {
  random_number = random_number * 1664525u + 1013904223u;
  return (random_number >> 8) % bound;
}

// A new order for a block. Warps that run as far as they can before others begin are what a missing
// barrier does not stand.
void shuffle_warps() {
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned other = seed == 0 ? i : draw(i + 1);
    order[i] = order[other];
    order[other] = i;
  }
}

// A thread that can go on, of the first warp that has one.
unsigned next_turn() {
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned first = seed == 0 ? 0 : draw(kWarp);
    const unsigned lanes = ready[order[i]];
    if (lanes == 0) continue;
    const unsigned later = lanes >> first << first;
    return order[i] * kWarp + __builtin_ctz(later != 0 ? later : lanes);
  }
  fail_at_standstill();
}

void run_fiber();

// Returns when someone switches back.
__attribute__((noinline)) void switch_to(unsigned next) {
  if (_setjmp(fibers[current].turn) != 0) return;
  reads = 0;
  current = next;
  threadIdx.x = next;
  Fiber& fiber = fibers[next];
  if (fiber.started) _longjmp(fiber.turn, 1);
  fiber.started = true;
  if (fiber.stack == nullptr) fiber.stack = fenced_memory(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

// Waits in `instruction` until another thread makes this one ready.
void wait_in(const char* instruction) {
  fibers[current].instruction = instruction;
  make_unready(current);
  switch_to(next_turn());
}

void release_barrier() {
  if (at_barrier == 0 || at_barrier < live) return;
  at_barrier = 0;
  for (unsigned i = 0; i < threads; ++i) {
    if (!fibers[i].ended) make_ready(i);
  }
}

// A thread of block after block.
void run_fiber() {
  for (;;) {
    (*body)();
    fibers[current].ended = true;
    fibers[current].copies.clear();
    fibers[current].groups.clear();
    make_unready(current);
    --live;
    release_barrier();  // it does not wait for threads that have ended
    switch_to(live == 0 ? kLauncher : next_turn());
  }
}

// ---------------------------------------------------------------------------------------------
// blocks and grids
// ---------------------------------------------------------------------------------------------

// Static shared memory: what this library keeps per thread of the CPU and does not initialise.
struct Memory {
  char* start = nullptr;
  size_t bytes = 0;
};

int find_uninitialised(dl_phdr_info* info, size_t, void* found) {
  bool own = false;
  Memory memory;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const size_t offset = reinterpret_cast<size_t>(&fibers) - info->dlpi_addr - segment.p_vaddr;
    if (segment.p_type == PT_LOAD && offset < segment.p_memsz) own = true;
    if (segment.p_type == PT_TLS) {
      memory = {static_cast<char*>(info->dlpi_tls_data) + segment.p_filesz,
                segment.p_memsz - segment.p_filesz};
    }
  }
  if (own) *static_cast<Memory*>(found) = memory;
  return own;
}

Memory static_shared() {
  // The system provides the memory when it is first used.
  [[maybe_unused]] static thread_local volatile char used;
  used = 1;
  Memory memory;
  dl_iterate_phdr(find_uninitialised, &memory);
  return memory;
}

void run_block(const Memory& fixed) {
  memset(arena, kGarbage, arena_end - arena);
  memset(fixed.start, kGarbage, fixed.bytes);
  live = threads;
  at_barrier = 0;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].ended = false;
    make_ready(i);
  }
  shuffle_warps();
  current = kLauncher;
  fibers[kLauncher].started = true;
  switch_to(next_turn());
}

void on_fault(int signal, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  if (signal == SIGSEGV && at >= arena_end && at < arena_end + kPage) {
    snprintf(message, sizeof(message), "%td bytes behind the %zu bytes of shared memory",
             at - arena_end, shared_bytes);
  } else {
    snprintf(message, sizeof(message), "%s",
             signal == SIGILL ? "misaligned address or index out of bounds" : "invalid address");
  }
  siglongjmp(grid_failed, 1);
}

// Turns faults into messages while it lives.
class FaultHandlers {
 public:
  FaultHandlers() {
    static char* const stack = fenced_memory(kStackBytes);
    stack_t own = {};
    own.ss_sp = stack;
    own.ss_size = kStackBytes;
    sigaltstack(&own, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < kSignals; ++i) sigaction(kNumbers[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < kSignals; ++i) sigaction(kNumbers[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals = 3;
  static constexpr int kNumbers[kSignals] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction old_[kSignals];
  stack_t old_stack_;
};

void run_blocks() {
  const Memory fixed = static_shared();
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(fixed);
    }
  }
}

}  // namespace

cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, size_t bytes,
                     const std::function<void()>& thread) {
  const auto given = granted.find(kernel);
  if (block.x < 1 || block.x > kMaxThreads || block.y != 1 || block.z != 1 || grid.x < 1 ||
      grid.y < 1 || grid.z < 1 || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ ||
      bytes > (given == granted.end() ? kGivenShared : given->second)) {
    return cudaErrorInvalidValue;
  }
  body = &thread;
  gridDim = grid;
  blockDim = block;
  threads = block.x;
  warps = (threads + kWarp - 1) / kWarp;
  shared_bytes = bytes;
  shared = arena_end - (bytes + 15) / 16 * 16;
  random_number = seed;
  memset(ready, 0, sizeof(ready));
  const FaultHandlers handlers;
  if (sigsetjmp(grid_failed, 1) == 0) {
    run_blocks();
    return cudaSuccess;
  }
  snprintf(message + strlen(message), sizeof(message) - strlen(message),
           ", thread %u of block (%u, %u, %u)", current, blockIdx.x, blockIdx.y, blockIdx.z);
  for (Fiber& fiber : fibers) {  // the turns they were in are lost
    fiber.started = false;
    fiber.operands = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
  }
  return cudaErrorLaunchFailure;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  siglongjmp(grid_failed, 1);
}

// ---------------------------------------------------------------------------------------------
// waiting for others
// ---------------------------------------------------------------------------------------------

void meet_block() {
  if (++at_barrier < live) return wait_in("__syncthreads");
  release_barrier();
}

void meet_warp(const char* instruction, unsigned mask, void* operands, Finish finish) {
  const unsigned warp = current / kWarp * kWarp, lane = current % kWarp;
  Fiber* const lanes = fibers + warp;
  lanes[lane].instruction = instruction;
  lanes[lane].mask = mask;
  lanes[lane].operands = operands;
  if ((mask >> lane & 1) == 0) fail("%s with mask %08x in lane %u", instruction, mask, lane);
  const unsigned others = mask & ~(1u << lane);
  void* all[kWarp] = {};
  all[lane] = operands;
  for (unsigned rest = others; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    if (warp + i >= threads || lanes[i].ended) fail("%s waits for a lane that ended", instruction);
    if (lanes[i].operands == nullptr) return wait_in(instruction);  // the last will finish
    all[i] = lanes[i].operands;
  }
  for (unsigned rest = others; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    if (lanes[i].mask != mask || strcmp(lanes[i].instruction, instruction) != 0) {
      fail("lanes meet in %s with mask %08x and %s with mask %08x", instruction, mask,
           lanes[i].instruction, lanes[i].mask);
    }
    lanes[i].operands = nullptr;
    make_ready(warp + i);
  }
  lanes[lane].operands = nullptr;
  finish(all, mask);
}

void waiting_for_block() {
  if (++reads > kMaxReads) fail("a thread waits for what no block before this one has done");
}

// ---------------------------------------------------------------------------------------------
// shared memory
// ---------------------------------------------------------------------------------------------

void* shared_memory() { return shared; }

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - arena);
}

void start_copy(uint32_t address, const void* global) {
  char* const to = arena + address;
  if (to < shared || to + 16 > arena_end) fail("a copy to outside of the shared memory");
  if (address % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("a copy from or to a misaligned address");
  }
  fibers[current].copies.push_back({to, global});
}

void commit_copies() { fibers[current].groups.push_back(fibers[current].copies.size()); }

void wait_copies(int pending) {
  auto& copies = fibers[current].copies;
  auto& groups = fibers[current].groups;
  if (groups.size() <= size_t(pending)) return;
  const size_t done = groups.size() - pending, landing = groups[done - 1];
  for (size_t i = 0; i < landing; ++i) {
    if (copies[i].from == nullptr) {
      memset(copies[i].to, 0, 16);
    } else {
      memcpy(copies[i].to, copies[i].from, 16);
    }
  }
  copies.erase(copies.begin(), copies.begin() + landing);
  groups.erase(groups.begin(), groups.begin() + done);
  for (size_t& end : groups) end -= landing;
}

// ---------------------------------------------------------------------------------------------
// matrices
// ---------------------------------------------------------------------------------------------

namespace {

template <typename Sum>
struct Product {
  Sum* d;
  const uint32_t* a;
  const uint32_t* b;
  const Sum* c;
};

// kPerWord operands of k lie in a word; `decode` makes FP32 of them, in which products and sums of
// INT8 are exact.
template <int kPerWord, typename Sum, typename Decode>
void multiply(void* const* lanes, Decode decode) {
  constexpr int kK = 8 * kPerWord;
  using Row = float __attribute__((vector_size(32)));  // of 8 columns
  float a[16][kK];
  Row b[kK], d[16];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<const Product<Sum>*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kPerWord; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int k = 4 * kPerWord * half + kPerWord * t + i;
        a[g][k] = decode(own.a[2 * half], i);
        a[g + 8][k] = decode(own.a[2 * half + 1], i);
        b[k][g] = decode(own.b[half], i);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const bool exact = std::is_integral<Sum>::value;
      d[g + i / 2 * 8][2 * t + i % 2] = exact ? 0.0f : static_cast<float>(own.c[i]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < kK; ++k) d[m] += a[m][k] * b[k];
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<const Product<Sum>*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const Sum sum = static_cast<Sum>(d[g + i / 2 * 8][2 * t + i % 2]);
      own.d[i] = std::is_integral<Sum>::value ? own.c[i] + sum : sum;
    }
  }
}

void multiply_int8(void* const* lanes, unsigned) {
  multiply<4, int>(lanes, [](uint32_t word, int i) {
    return static_cast<float>(static_cast<int8_t>(word >> 8 * i));
  });
}

void multiply_fp16(void* const* lanes, unsigned) {
  multiply<2, float>(lanes, [](uint32_t word, int i) {
    return __half2float({static_cast<uint16_t>(word >> 16 * i)});
  });
}

void transpose(void* const* lanes, unsigned) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < kWarp; ++lane) memcpy(&matrix[lane / 4][lane % 4 * 2], lanes[lane], 4);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    const uint32_t pair = matrix[column][row] | uint32_t{matrix[column + 1][row]} << 16;
    memcpy(lanes[lane], &pair, 4);
  }
}

constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace

void matrix_product_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const int (&c)[4]) {
  Product<int> own = {d, a, b, c};
  meet_warp("mma.m16n8k32", kAllLanes, &own, multiply_int8);
}

void matrix_product_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product<float> own = {d, a, b, d};
  meet_warp("mma.m16n8k16", kAllLanes, &own, multiply_fp16);
}

uint32_t matrix_transpose(uint32_t pair) {
  meet_warp("movmatrix", kAllLanes, &pair, transpose);
  return pair;
}

}  // namespace emulator

// ---------------------------------------------------------------------------------------------
// what cuda_runtime.h declares
// ---------------------------------------------------------------------------------------------

namespace {

struct Exchange {
  uint32_t value;
  int source;
  uint32_t result;
};
Exchange& exchange(void* operands) { return *static_cast<Exchange*>(operands); }

template <typename Function>
void each_lane(unsigned mask, Function function) {
  for (; mask != 0; mask &= mask - 1) function(__builtin_ctz(mask));
}

void exchange_values(void* const* lanes, unsigned mask) {
  each_lane(mask, [&](int i) {
    Exchange& own = exchange(lanes[i]);
    if ((mask >> own.source & 1) == 0) emulator::fail("a lane asks one outside of the mask");
    own.result = exchange(lanes[own.source]).value;
  });
}

// The largest value to all; of 0 and 1, whether there is a 1.
void find_largest(void* const* lanes, unsigned mask) {
  uint32_t largest = 0;
  each_lane(mask, [&](int i) { largest = std::max(largest, exchange(lanes[i]).value); });
  each_lane(mask, [&](int i) { exchange(lanes[i]).result = largest; });
}

}  // namespace

uint32_t shuffle_bits(const char* instruction, unsigned mask, uint32_t value, int source) {
  Exchange own = {value, source, 0};
  emulator::meet_warp(instruction, mask, &own, exchange_values);
  return own.result;
}

unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  Exchange own = {value, 0, 0};
  emulator::meet_warp("redux.max", mask, &own, find_largest);
  return own.result;
}

bool __any_sync(unsigned mask, bool predicate) {
  Exchange own = {predicate, 0, 0};
  emulator::meet_warp("vote.any", mask, &own, find_largest);
  return own.result;
}

void __syncwarp() {
  char nothing;
  emulator::meet_warp("__syncwarp", 0xffffffffu, &nothing, [](void* const*, unsigned) {});
}

void __syncthreads() { emulator::meet_block(); }

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess             ? "cudaSuccess"
         : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                          : "cudaErrorLaunchFailure";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : emulator::message;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::processors;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || size_t(value) > emulator::kMaxShared) return cudaErrorInvalidValue;
  emulator::granted[kernel] = value;
  return cudaSuccess;
}

// For tests: the multiprocessors that launchers are told of, and the seed of the order in which
// threads take turns, 0 for their own.
extern "C" __attribute__((visibility("default"))) void emulator_configure(int processors,
                                                                          unsigned seed) {
  emulator::processors = processors;
  emulator::seed = seed;
}
