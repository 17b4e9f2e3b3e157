// The one plugin class, and its creator, that every op's table is run by.
//
// A plugin holds the attributes and the number of its inputs, since enqueue is not told that; sizes
// and pointers are filled in for each call.
// Its state tensors are ordinary inputs and outputs; they may share an address, but no alias is
// declared, since TensorRT may answer one with a copy. Memory is allocated where a plugin is made
// and nowhere else, so nothing throws out of the noexcept methods.

#ifndef SSDI8_TENSORRT_PLUGIN_H_
#define SSDI8_TENSORRT_PLUGIN_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "description.h"
#include "fields.h"
#include "kernels.h"
#include "log.h"
#include "registry.h"
#include "shapes.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "TensorRT 10.3 (JetPack 6.2) or newer is needed"
#endif

namespace ssdi8::plugin {

// Every TensorRT parser looks plugins up by these, unless a node says otherwise.
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "";

constexpr int32_t kOk = 0;
constexpr int32_t kError = -1;

template <typename P>
nvinfer1::IPluginV3* make_plugin(const Description<P>& op, const P& attributes,
                                 int32_t n_inputs) noexcept;

template <typename P>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Description<P>& op, const P& attributes, int32_t n_inputs)
      : op_(op), attributes_(attributes), n_inputs_(n_inputs) {
    for (const Field<P>& field : op_.fields) fields_.push_back(write_field(field, attributes_));
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return make_plugin(op_, attributes_, n_inputs_);
  }

  // -- core -------------------------------------------------------------------------------------

  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // -- build ------------------------------------------------------------------------------------

  int32_t getNbOutputs() const noexcept override { return op_.n_outputs(); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t n_outputs, const DataType* inputs,
                             int32_t n_inputs) const noexcept override {
    if (!check_count(op_, attributes_, n_inputs, n_outputs)) return kError;
    for (int32_t i = 0; i < n_inputs; ++i) {
      if (!check_type(op_, attributes_, i, inputs[i])) return kError;
    }
    for (int32_t i = 0; i < n_outputs; ++i) {
      const int32_t decider = deciding_input(op_, op_.outputs[i]);
      outputs[i] = decider < 0 ? op_.outputs[i].type.first(attributes_) : inputs[decider];
    }
    return kOk;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t n_inputs,
                          const nvinfer1::DimsExprs* /*shape_inputs*/, int32_t n_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t n_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    if (n_shape_inputs != 0) {
      log_error("%s: it has no shape inputs", op_.name);
      return kError;
    }
    if (!check_count(op_, attributes_, n_inputs, n_outputs)) return kError;
    const OutputShapes<P> shapes(op_, attributes_, inputs, n_inputs, builder);
    for (int32_t i = 0; i < n_outputs; ++i) {
      if (!shapes.fill(op_.outputs[i], &outputs[i])) return kError;
    }
    return kOk;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t n_inputs, int32_t n_outputs) noexcept override {
    if (!check_count(op_, attributes_, n_inputs, n_outputs)) return false;
    if (position < 0 || position >= n_inputs + n_outputs) return false;
    const nvinfer1::PluginTensorDesc& given = tensors[position].desc;
    if (given.format != nvinfer1::TensorFormat::kLINEAR) return false;
    const Tensor<P>& tensor =
        position < n_inputs ? op_.inputs[position] : op_.outputs[position - n_inputs];
    const int32_t decider = deciding_input(op_, tensor);
    if (decider >= 0 && decider < position) return given.type == tensors[decider].desc.type;
    return tensor.type.allows(attributes_, given.type);
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t n_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* /*outputs*/,
                          int32_t n_outputs) noexcept override {
    P largest;
    if (!fit_largest(inputs, n_inputs, n_outputs, &largest)) return kError;
    n_inputs_ = n_inputs;
    return kOk;
  }

  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t n_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* /*outputs*/,
                          int32_t n_outputs) const noexcept override {
    P largest;
    if (!op_.workspace || !fit_largest(inputs, n_inputs, n_outputs, &largest)) return 0;
    return op_.workspace(&largest);
  }

  // -- runtime ----------------------------------------------------------------------------------

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t n_inputs,
                        const nvinfer1::PluginTensorDesc* /*outputs*/,
                        int32_t n_outputs) noexcept override {
    P params = attributes_;
    if (!check_count(op_, attributes_, n_inputs, n_outputs) ||
        !Fit<P>(op_, Sizes::kOfCall, &params).run(inputs, n_inputs)) {
      return kError;
    }
    n_inputs_ = n_inputs;
    return kOk;
  }

  // The sizes are taken again from this very call: a stale one would read past a tensor's end.
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                  const nvinfer1::PluginTensorDesc* /*output_descriptions*/,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    P params = attributes_;
    if (!check_count(op_, attributes_, n_inputs_, op_.n_outputs()) ||
        !Fit<P>(op_, Sizes::kOfCall, &params).run(input_descriptions, n_inputs_)) {
      return kError;
    }
    for (int32_t i = 0; i < n_inputs_; ++i) op_.inputs[i].bind(params, inputs[i]);
    for (int32_t i = 0; i < op_.n_outputs(); ++i) op_.outputs[i].bind(params, outputs[i]);
    if (op_.workspace) params.*op_.workspace_pointer = workspace;
    if (op_.launch(&params, stream) == SSDI8_OK) return kOk;
    log_error("%s: %s", op_.name, ssdi8_last_error());
    return kError;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return &collection_;
  }

 private:
  bool fit_largest(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t n_inputs,
                   int32_t n_outputs, P* params) const noexcept {
    if (!check_count(op_, attributes_, n_inputs, n_outputs)) return false;
    *params = attributes_;
    return Fit<P>(op_, Sizes::kUpperBounds, params).run(inputs, n_inputs);
  }

  const Description<P>& op_;
  P attributes_;
  int32_t n_inputs_;  // as last configured; 0: not yet
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

template <typename P>
nvinfer1::IPluginV3* make_plugin(const Description<P>& op, const P& attributes,
                                 int32_t n_inputs) noexcept {
  try {
    return new Plugin<P>(op, attributes, n_inputs);
  } catch (const std::bad_alloc&) {
    log_error("%s: out of memory", op.name);
    return nullptr;
  }
}

template <typename P>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Description<P> op) : op_(std::move(op)) {
    for (const Field<P>& field : op_.fields) {
      fields_.emplace_back(field.name, nullptr, type_of(field), 1);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  nvinfer1::IPluginV3* createPlugin(const char* /*name*/,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase /*phase*/) noexcept override {
    P attributes{};
    if (!read_fields(op_.name, op_.fields, fields, &attributes)) return nullptr;
    if (op_.consistent && !op_.consistent(attributes)) return nullptr;
    return make_plugin(op_, attributes, 0);
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  Description<P> op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// The creator of the op that the function `kDescribe` describes: an op's file registers this.
template <auto kDescribe>
nvinfer1::IPluginCreatorV3One* creator() {
  static Creator creator(kDescribe());
  return &creator;
}

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_PLUGIN_H_
