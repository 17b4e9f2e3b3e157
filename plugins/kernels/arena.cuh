// Scratch memory that a caller gave, cut into arrays.

#ifndef SSDI8_ARENA_CUH_
#define SSDI8_ARENA_CUH_

#include <stddef.h>

namespace ssdi8 {

// Bytes of scratch memory, handed out in 256-byte steps.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace ssdi8

#endif  // SSDI8_ARENA_CUH_
