// What the plugins differ in: one table per op.
//
// A table says of every tensor its type, its shape and the pointer of the params struct that takes
// it. From that follow the plugin's output types and shapes, its supported formats, the check of
// what it is called with, and the sizes that the kernel is given.

#ifndef SSDI8_TENSORRT_DESCRIPTION_H_
#define SSDI8_TENSORRT_DESCRIPTION_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <vector>

#include "fields.h"

namespace ssdi8::plugin {

// ---------------------------------------------------------------------------------------------
// Types
// ---------------------------------------------------------------------------------------------

using nvinfer1::DataType;

constexpr DataType kInt8 = DataType::kINT8;
constexpr DataType kHalf = DataType::kHALF;
constexpr DataType kFloat = DataType::kFLOAT;
constexpr DataType kInt64 = DataType::kINT64;

// The type of a tensor: fixed, following from attributes, or one of two. Of two, the graph chooses
// at an input, a flag of the params struct says which, and an output with the same flag follows.
template <typename P>
class TypeOf {
 public:
  TypeOf(DataType type) : type_(type) {}
  TypeOf(DataType (*type)(const P&)) : from_attributes_(type) {}
  TypeOf(DataType unset, DataType set, int32_t P::* flag)
      : type_(unset), other_(set), flag_(flag) {}

  // The only type, or that of the unset flag.
  DataType first(const P& params) const {
    return from_attributes_ ? from_attributes_(params) : type_;
  }
  DataType other() const { return other_; }
  int32_t P::* flag() const { return flag_; }

  bool allows(const P& params, DataType given) const {
    return given == first(params) || (flag_ && given == other_);
  }
  void set_flag(P* params, DataType given) const {
    if (flag_) params->*flag_ = given == other_;
  }

 private:
  DataType type_{};
  DataType other_{};
  int32_t P::* flag_ = nullptr;  // null: not one of two
  DataType (*from_attributes_)(const P&) = nullptr;
};

inline const char* type_name(DataType type) {
  if (type == kInt8) return "INT8";
  if (type == kHalf) return "FP16";
  if (type == kInt64) return "INT64";
  return type == kFloat ? "FP32" : "of another type";
}

// ---------------------------------------------------------------------------------------------
// Shapes
// ---------------------------------------------------------------------------------------------

// The length of one axis.
template <typename P>
struct Size {
  enum Kind {
    kBatch,
    kLength,
    kChunks,  // ceil(length / member)
    kMember,  // an attribute, or the size that an input has there
    kValue,   // computed from attributes and members
  };
  Kind kind;
  int32_t P::* member = nullptr;
  int64_t (*value)(const P&) = nullptr;

  Size(Kind k, int32_t P::* m = nullptr) : kind(k), member(m) {}
  Size(int32_t P::* m) : kind(kMember), member(m) {}
  Size(int64_t (*v)(const P&)) : kind(kValue), value(v) {}

  // Batch and length may vary from call to call, and chunks with them.
  bool varies() const { return kind == kBatch || kind == kLength || kind == kChunks; }
};

// ---------------------------------------------------------------------------------------------
// Tensors and ops
// ---------------------------------------------------------------------------------------------

template <typename Member>
struct MemberOf;
template <typename P, typename T>
struct MemberOf<T P::*> {
  using Struct = P;
  using Value = T;
};

// Stores an address in a pointer of the params struct.
template <auto kMember>
void bind(typename MemberOf<decltype(kMember)>::Struct& params, const void* address) {
  params.*kMember =
      static_cast<typename MemberOf<decltype(kMember)>::Value>(const_cast<void*>(address));
}

template <typename P>
struct Tensor {
  const char* name;
  TypeOf<P> type;
  void (*bind)(P&, const void*);
  std::vector<Size<P>> shape;
};

template <typename P>
struct Description {
  const char* name = nullptr;
  int (*launch)(const P*, void*) = nullptr;
  void (*set_sizes)(P&, int32_t batch, int32_t length) = nullptr;
  std::vector<Field<P>> fields;
  std::vector<Tensor<P>> inputs;
  std::vector<Tensor<P>> outputs;
  bool (*consistent)(const P&) = nullptr;          // between attributes; logs what is not
  int32_t (*optional_inputs)(const P&) = nullptr;  // how many of the last; null: none
  size_t (*workspace)(const P*) = nullptr;
  void* P::* workspace_pointer = nullptr;

  int32_t n_inputs() const { return static_cast<int32_t>(inputs.size()); }
  int32_t n_outputs() const { return static_cast<int32_t>(outputs.size()); }
};

template <typename P>
int64_t one(const P&) {
  return 1;
}

// (1)
template <typename P>
std::vector<Size<P>> single_shape() {
  return {one<P>};
}

// (B, L, 1)
template <typename P>
std::vector<Size<P>> token_shape() {
  return {Size<P>::kBatch, Size<P>::kLength, one<P>};
}

// For the kernels that see rows, and those that see sequences.
template <typename P>
void as_rows(P& params, int32_t batch, int32_t length) {
  params.tokens = batch * length;
}
template <typename P>
void as_sequences(P& params, int32_t batch, int32_t length) {
  params.batch = batch;
  params.length = length;
}

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_DESCRIPTION_H_
