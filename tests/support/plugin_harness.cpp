// Calls the plugins of libssdi8_plugins.so the way TensorRT does, for tests/kernels/test_plugins.py.
//
// TensorRT's Python module shows of a C++ plugin only that it exists, and an engine needs a builder
// and a GPU. So this stands where the builder and the execution context stand: plain C functions,
// called through ctypes, that hand a plugin descriptors, an expression builder and device
// addresses. The library comes from dlopen, as TensorRT loads it; the structs below are mirrored in
// Python.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

struct HarnessField {
  const char* name;
  const void* data;
  int32_t type;
  int32_t length;
};

// A tensor of a call; `dims` are also the opt and max of a profile whose minimum is all ones.
struct HarnessTensor {
  int32_t type;
  int32_t format;
  int32_t n_dims;
  int64_t dims[Dims::MAX_DIMS];
};

// ---------------------------------------------------------------------------------------------
// What TensorRT hands to a plugin library
// ---------------------------------------------------------------------------------------------

class Logger final : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) text += std::string(message) + "\n";
  }
  std::string text;
};

class LoggerFinder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
  Logger logger;
};

class Expression final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t v) : value(v) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  const int64_t value;
};

// Evaluates at once: the harness knows every length.
class ExpressionBuilder final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  ExpressionBuilder() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override { return &made_.emplace_back(value); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                  const IDimensionExpr& second) override {
    const int64_t a = first.getConstantValue(), b = second.getConstantValue();
    switch (op) {
      case DimensionOperation::kSUM:
        return constant(a + b);
      case DimensionOperation::kPROD:
        return constant(a * b);
      case DimensionOperation::kSUB:
        return constant(a - b);
      case DimensionOperation::kCEIL_DIV:
        return constant((a + b - 1) / b);
      case DimensionOperation::kFLOOR_DIV:
        return constant(a / b);
      default:
        return nullptr;
    }
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::deque<Expression> made_;
};

LoggerFinder finder;
IPluginCreatorInterface* const* creators = nullptr;
int32_t n_creators = 0;

// ---------------------------------------------------------------------------------------------
// Conversions
// ---------------------------------------------------------------------------------------------

Dims dims_of(const HarnessTensor& tensor) {
  Dims dims{};
  dims.nbDims = tensor.n_dims;
  std::copy_n(tensor.dims, Dims::MAX_DIMS, dims.d);
  return dims;
}

std::vector<PluginTensorDesc> descriptors(const HarnessTensor* tensors, int32_t n) {
  std::vector<PluginTensorDesc> made(n);
  for (int32_t i = 0; i < n; ++i) {
    made[i] = {};
    made[i].dims = dims_of(tensors[i]);
    made[i].type = static_cast<DataType>(tensors[i].type);
    made[i].format = static_cast<TensorFormat>(tensors[i].format);
  }
  return made;
}

std::vector<DynamicPluginTensorDesc> dynamic_descriptors(const HarnessTensor* tensors, int32_t n) {
  std::vector<DynamicPluginTensorDesc> made(n);
  const std::vector<PluginTensorDesc> fixed = descriptors(tensors, n);
  for (int32_t i = 0; i < n; ++i) {
    made[i] = {};
    made[i].desc = fixed[i];
    made[i].min = made[i].opt = made[i].max = fixed[i].dims;
    std::fill_n(made[i].desc.dims.d, Dims::MAX_DIMS, -1);
    std::fill_n(made[i].min.d, Dims::MAX_DIMS, 1);
  }
  return made;
}

int32_t copy_fields(const PluginFieldCollection* from, HarnessField* to, int32_t room) {
  if (from == nullptr || from->nbFields > room) return -1;
  for (int32_t i = 0; i < from->nbFields; ++i) {
    const PluginField& f = from->fields[i];
    to[i] = {f.name, f.data, static_cast<int32_t>(f.type), f.length};
  }
  return from->nbFields;
}

IPluginCreatorV3One* find_creator(const char* op) {
  for (int32_t i = 0; i < n_creators; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (std::strcmp(creator->getPluginName(), op) == 0) return creator;
  }
  return nullptr;
}

IPluginV3OneBuild* build_of(IPluginV3* plugin) {
  return static_cast<IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime* runtime_of(IPluginV3* plugin) {
  return static_cast<IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

}  // namespace

extern "C" {

// The number of creators, or -1 with the loader's words in harness_messages().
int32_t harness_open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    finder.logger.text = dlerror();
    return -1;
  }
  auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(
      dlsym(library, "getCreators"));
  if (set_finder == nullptr || get == nullptr) return -1;
  set_finder(&finder);
  creators = get(n_creators);
  return n_creators;
}

// The op of creator `index`, as the library lists them.
const char* harness_creator(int32_t index) {
  return static_cast<IPluginCreatorV3One*>(creators[index])->getPluginName();
}

const char* harness_messages() { return finder.logger.text.c_str(); }
void harness_clear_messages() { finder.logger.text.clear(); }

// Enumerators by name, and how many of a kind there are: their numbers belong to the headers.
int32_t harness_number(const char* name) {
  static const std::map<std::string, int32_t> numbers = {
      {"major version", NV_TENSORRT_MAJOR},
      {"minor version", NV_TENSORRT_MINOR},
      {"FP32", int32_t(DataType::kFLOAT)},
      {"FP16", int32_t(DataType::kHALF)},
      {"INT8", int32_t(DataType::kINT8)},
      {"INT64", int32_t(DataType::kINT64)},
      {"data types", EnumMax<DataType>()},
      {"linear", int32_t(TensorFormat::kLINEAR)},
      {"formats", EnumMax<TensorFormat>()},
      {"int field", int32_t(PluginFieldType::kINT32)},
      {"float field", int32_t(PluginFieldType::kFLOAT32)},
      {"text field", int32_t(PluginFieldType::kCHAR)},
      {"double field", int32_t(PluginFieldType::kFLOAT64)},
      {"long field", int32_t(PluginFieldType::kINT64)},
      {"unknown field", int32_t(PluginFieldType::kUNKNOWN)},
  };
  const auto found = numbers.find(name);
  return found == numbers.end() ? -1 : found->second;
}

// -- creators -----------------------------------------------------------------------------------

int32_t harness_field_names(const char* op, HarnessField* fields, int32_t room) {
  return copy_fields(find_creator(op)->getFieldNames(), fields, room);
}

IPluginV3* harness_create(const char* op, const HarnessField* fields, int32_t n, int32_t runtime) {
  std::vector<PluginField> list;
  for (int32_t i = 0; i < n; ++i) {
    list.emplace_back(fields[i].name, fields[i].data, static_cast<PluginFieldType>(fields[i].type),
                      fields[i].length);
  }
  const PluginFieldCollection collection{n, list.data()};
  const TensorRTPhase phase = runtime ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD;
  return find_creator(op)->createPlugin("node", &collection, phase);
}

IPluginV3* harness_create_without_fields(const char* op) {
  return find_creator(op)->createPlugin("node", nullptr, TensorRTPhase::kBUILD);
}

IPluginV3* harness_clone(IPluginV3* plugin) { return plugin->clone(); }
IPluginV3* harness_attach(IPluginV3* plugin) {
  return runtime_of(plugin)->attachToContext(nullptr);
}
void harness_destroy(IPluginV3* plugin) { delete plugin; }

const char* harness_name(IPluginV3* plugin) {
  return static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE))
      ->getPluginName();
}

// -- build --------------------------------------------------------------------------------------

int32_t harness_n_outputs(IPluginV3* plugin) { return build_of(plugin)->getNbOutputs(); }

int32_t harness_output_types(IPluginV3* plugin, const int32_t* inputs, int32_t n_inputs,
                             int32_t* outputs, int32_t n_outputs) {
  std::vector<DataType> in(n_inputs), out(n_outputs);
  for (int32_t i = 0; i < n_inputs; ++i) in[i] = static_cast<DataType>(inputs[i]);
  const int32_t code =
      build_of(plugin)->getOutputDataTypes(out.data(), n_outputs, in.data(), n_inputs);
  for (int32_t i = 0; i < n_outputs; ++i) outputs[i] = static_cast<int32_t>(out[i]);
  return code;
}

int32_t harness_output_shapes(IPluginV3* plugin, const HarnessTensor* inputs, int32_t n_inputs,
                              HarnessTensor* outputs, int32_t n_outputs) {
  ExpressionBuilder builder;
  std::vector<DimsExprs> in(n_inputs), out(n_outputs);
  for (int32_t i = 0; i < n_inputs; ++i) {
    in[i].nbDims = inputs[i].n_dims;
    for (int32_t axis = 0; axis < inputs[i].n_dims; ++axis) {
      in[i].d[axis] = builder.constant(inputs[i].dims[axis]);
    }
  }
  const int32_t code = build_of(plugin)->getOutputShapes(in.data(), n_inputs, nullptr, 0,
                                                         out.data(), n_outputs, builder);
  if (code != 0) return code;
  for (int32_t i = 0; i < n_outputs; ++i) {
    outputs[i].n_dims = out[i].nbDims;
    for (int32_t axis = 0; axis < out[i].nbDims; ++axis) {
      outputs[i].dims[axis] = out[i].d[axis]->getConstantValue();
    }
  }
  return code;
}

int32_t harness_supports(IPluginV3* plugin, int32_t position, const HarnessTensor* tensors,
                         int32_t n_inputs, int32_t n_outputs) {
  const auto all = dynamic_descriptors(tensors, n_inputs + n_outputs);
  return build_of(plugin)->supportsFormatCombination(position, all.data(), n_inputs, n_outputs);
}

int32_t harness_configure(IPluginV3* plugin, const HarnessTensor* tensors, int32_t n_inputs,
                          int32_t n_outputs) {
  const auto all = dynamic_descriptors(tensors, n_inputs + n_outputs);
  return build_of(plugin)->configurePlugin(all.data(), n_inputs, all.data() + n_inputs, n_outputs);
}

uint64_t harness_workspace(IPluginV3* plugin, const HarnessTensor* tensors, int32_t n_inputs,
                           int32_t n_outputs) {
  const auto all = dynamic_descriptors(tensors, n_inputs + n_outputs);
  return build_of(plugin)->getWorkspaceSize(all.data(), n_inputs, all.data() + n_inputs, n_outputs);
}

// -- runtime ------------------------------------------------------------------------------------

int32_t harness_serialized_fields(IPluginV3* plugin, HarnessField* fields, int32_t room) {
  return copy_fields(runtime_of(plugin)->getFieldsToSerialize(), fields, room);
}

int32_t harness_on_shape_change(IPluginV3* plugin, const HarnessTensor* tensors, int32_t n_inputs,
                                int32_t n_outputs) {
  const auto all = descriptors(tensors, n_inputs + n_outputs);
  return runtime_of(plugin)->onShapeChange(all.data(), n_inputs, all.data() + n_inputs, n_outputs);
}

int32_t harness_enqueue(IPluginV3* plugin, const HarnessTensor* tensors, int32_t n_inputs,
                        int32_t n_outputs, const void* const* inputs, void* const* outputs,
                        void* workspace, void* stream) {
  const auto all = descriptors(tensors, n_inputs + n_outputs);
  return runtime_of(plugin)->enqueue(all.data(), all.data() + n_inputs, inputs, outputs, workspace,
                                     static_cast<cudaStream_t>(stream));
}

}  // extern "C"
