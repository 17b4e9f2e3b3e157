// Where the ops' tables register themselves: an object of static storage in an op's own file puts the
// op among those that the library shows TensorRT.
//
// A registration is a link in a list and allocates nothing; creators are made when TensorRT asks.

#ifndef SSDI8_TENSORRT_REGISTRY_H_
#define SSDI8_TENSORRT_REGISTRY_H_

#include <NvInferRuntime.h>

namespace ssdi8::plugin {

class Registration {
 public:
  using GetCreator = nvinfer1::IPluginCreatorV3One* (*)();

  explicit Registration(GetCreator creator) : creator_(creator), next_(first_) { first_ = this; }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

  // In no order: that of the files' initialization is nobody's choice.
  static const Registration* first() { return first_; }
  const Registration* next() const { return next_; }
  nvinfer1::IPluginCreatorV3One* creator() const { return creator_(); }

 private:
  inline static const Registration* first_ = nullptr;  // set before any registration is made

  GetCreator creator_;
  const Registration* next_;
};

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_REGISTRY_H_
