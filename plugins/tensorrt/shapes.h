// What a table says of one call: whether its tensors fit, which sizes the kernel gets, and which
// shapes the outputs have.

#ifndef SSDI8_TENSORRT_SHAPES_H_
#define SSDI8_TENSORRT_SHAPES_H_

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "description.h"
#include "log.h"

namespace ssdi8::plugin {

template <typename P>
bool check_count(const Description<P>& op, const P& params, int32_t n_inputs, int32_t n_outputs) {
  const int32_t optional = op.optional_inputs ? op.optional_inputs(params) : 0;
  if (n_inputs > op.n_inputs() || n_inputs < op.n_inputs() - optional) {
    if (!op.optional_inputs) {
      return log_error("%s: %d inputs, %d are expected", op.name, n_inputs, op.n_inputs());
    }
    return log_error("%s: %d inputs; with these attributes %d to %d are expected", op.name,
                     n_inputs, op.n_inputs() - optional, op.n_inputs());
  }
  if (n_outputs != op.n_outputs()) {
    return log_error("%s: %d outputs, %d are expected", op.name, n_outputs, op.n_outputs());
  }
  return true;
}

template <typename P>
bool check_type(const Description<P>& op, const P& params, int32_t input, DataType given) {
  const Tensor<P>& tensor = op.inputs[input];
  if (tensor.type.allows(params, given)) return true;
  const bool two = tensor.type.flag() != nullptr;
  return log_error("%s: input %s is %s, not %s%s%s", op.name, tensor.name, type_name(given),
                   type_name(tensor.type.first(params)), two ? " or " : "",
                   two ? type_name(tensor.type.other()) : "");
}

// The input that decides between the two types of `tensor`, or -1 if it has but one.
template <typename P>
int32_t deciding_input(const Description<P>& op, const Tensor<P>& tensor) {
  for (int32_t i = 0; tensor.type.flag() && i < op.n_inputs(); ++i) {
    if (op.inputs[i].type.flag() == tensor.type.flag()) return i;
  }
  return -1;
}

// Where the sizes come from: one call, or the largest that a profile allows, whose inputs may be
// bounded apart from each other.
enum class Sizes { kOfCall, kUpperBounds };

inline const nvinfer1::Dims& dims_of(const nvinfer1::PluginTensorDesc& tensor) {
  return tensor.dims;
}
inline const nvinfer1::Dims& dims_of(const nvinfer1::DynamicPluginTensorDesc& tensor) {
  return tensor.max;
}
inline DataType type_of(const nvinfer1::PluginTensorDesc& tensor) { return tensor.type; }
inline DataType type_of(const nvinfer1::DynamicPluginTensorDesc& tensor) {
  return tensor.desc.type;
}

template <typename P>
class Fit {
 public:
  Fit(const Description<P>& op, Sizes sizes, P* params) : op_(op), sizes_(sizes), p_(*params) {}

  // Takes the sizes from the shapes and types of the inputs, and checks that all of them agree.
  template <typename Described>
  bool run(const Described* inputs, int32_t n_inputs) {
    for (int32_t i = 0; i < n_inputs; ++i) {
      if (!check_type(op_, p_, i, type_of(inputs[i]))) return false;
      op_.inputs[i].type.set_flag(&p_, type_of(inputs[i]));
      if (!take(op_.inputs[i], dims_of(inputs[i]))) return false;
    }
    if (batch_ * length_ > std::numeric_limits<int32_t>::max()) {
      return log_error("%s: %lld tokens are too many", op_.name,
                       static_cast<long long>(batch_ * length_));
    }
    for (int32_t i = 0; i < n_inputs; ++i) {
      if (!compare(op_.inputs[i], dims_of(inputs[i]))) return false;
    }
    op_.set_sizes(p_, static_cast<int32_t>(batch_), static_cast<int32_t>(length_));
    return true;
  }

 private:
  bool take(const Tensor<P>& tensor, const nvinfer1::Dims& dims) {
    if (dims.nbDims != static_cast<int32_t>(tensor.shape.size())) {
      return log_error("%s: input %s has %d axes, not %d", op_.name, tensor.name, dims.nbDims,
                       static_cast<int>(tensor.shape.size()));
    }
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
      const int64_t given = dims.d[axis];
      if (given < 1 || given > std::numeric_limits<int32_t>::max()) {
        return log_error("%s: axis %d of input %s is %lld", op_.name, axis, tensor.name,
                         static_cast<long long>(given));
      }
      const Size<P>& size = tensor.shape[axis];
      if (size.kind == Size<P>::kBatch) batch_ = joined(batch_, given);
      if (size.kind == Size<P>::kLength) length_ = joined(length_, given);
      if (size.kind == Size<P>::kMember && p_.*size.member == 0) {
        p_.*size.member = static_cast<int32_t>(given);
      }
    }
    return true;
  }

  int64_t joined(int64_t known, int64_t given) const {
    if (sizes_ == Sizes::kUpperBounds) return std::max(known, given);
    return known == 0 ? given : known;
  }

  int64_t expected(const Size<P>& size) const {
    switch (size.kind) {
      case Size<P>::kBatch:
        return batch_;
      case Size<P>::kLength:
        return length_;
      case Size<P>::kChunks:
        return (length_ + p_.*size.member - 1) / (p_.*size.member);
      case Size<P>::kMember:
        return p_.*size.member;
      case Size<P>::kValue:
        return size.value(p_);
    }
    return 0;
  }

  bool compare(const Tensor<P>& tensor, const nvinfer1::Dims& dims) const {
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
      const Size<P>& size = tensor.shape[axis];
      if (size.varies() && sizes_ == Sizes::kUpperBounds) continue;
      if (dims.d[axis] == expected(size)) continue;
      return log_error("%s: axis %d of input %s is %lld, not %lld", op_.name, axis, tensor.name,
                       static_cast<long long>(dims.d[axis]),
                       static_cast<long long>(expected(size)));
    }
    return true;
  }

  const Description<P>& op_;
  Sizes sizes_;
  P& p_;
  int64_t batch_ = 0;
  int64_t length_ = 0;
};

// Output shapes while batch and length are unknown.
template <typename P>
class OutputShapes {
 public:
  OutputShapes(const Description<P>& op, const P& params, const nvinfer1::DimsExprs* inputs,
               int32_t n_inputs, nvinfer1::IExprBuilder& builder)
      : op_(op), p_(params), inputs_(inputs), n_inputs_(n_inputs), builder_(builder) {}

  bool fill(const Tensor<P>& output, nvinfer1::DimsExprs* shape) const {
    shape->nbDims = static_cast<int32_t>(output.shape.size());
    for (int32_t axis = 0; axis < shape->nbDims; ++axis) {
      shape->d[axis] = expression(output.shape[axis]);
      if (shape->d[axis] == nullptr) {
        return log_error("%s: axis %d of output %s does not follow from the inputs", op_.name, axis,
                         output.name);
      }
    }
    return true;
  }

 private:
  using Expression = const nvinfer1::IDimensionExpr*;

  Expression expression(const Size<P>& size) const {
    switch (size.kind) {
      case Size<P>::kBatch:
      case Size<P>::kLength:
        return of_input(size);
      case Size<P>::kChunks: {
        const Expression length = of_input(Size<P>(Size<P>::kLength));
        const Expression chunk = builder_.constant(p_.*size.member);
        if (length == nullptr || chunk == nullptr) return nullptr;
        return builder_.operation(nvinfer1::DimensionOperation::kCEIL_DIV, *length, *chunk);
      }
      case Size<P>::kMember:
        return p_.*size.member == 0 ? of_input(size) : builder_.constant(p_.*size.member);
      case Size<P>::kValue:
        return builder_.constant(size.value(p_));
    }
    return nullptr;
  }

  // The first axis of an input that has this size.
  Expression of_input(const Size<P>& size) const {
    for (int32_t i = 0; i < n_inputs_; ++i) {
      const std::vector<Size<P>>& shape = op_.inputs[i].shape;
      if (inputs_[i].nbDims != static_cast<int32_t>(shape.size())) continue;
      for (size_t axis = 0; axis < shape.size(); ++axis) {
        if (shape[axis].kind == size.kind && shape[axis].member == size.member) {
          return inputs_[i].d[axis];
        }
      }
    }
    return nullptr;
  }

  const Description<P>& op_;
  const P& p_;
  const nvinfer1::DimsExprs* inputs_;
  int32_t n_inputs_;
  nvinfer1::IExprBuilder& builder_;
};

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_SHAPES_H_
