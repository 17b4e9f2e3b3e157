// One creator per op, each defined beside its table.

#ifndef SSDI8_TENSORRT_CREATORS_H_
#define SSDI8_TENSORRT_CREATORS_H_

#include <NvInferRuntime.h>

namespace ssdi8::plugin {

nvinfer1::IPluginCreatorInterface* rms_norm_creator();
nvinfer1::IPluginCreatorInterface* linear_creator();
nvinfer1::IPluginCreatorInterface* linear_w4_creator();
nvinfer1::IPluginCreatorInterface* causal_conv1d_creator();
nvinfer1::IPluginCreatorInterface* rms_norm_gated_creator();
nvinfer1::IPluginCreatorInterface* chunk_cumsum_creator();
nvinfer1::IPluginCreatorInterface* chunk_state_creator();
nvinfer1::IPluginCreatorInterface* state_passing_creator();
nvinfer1::IPluginCreatorInterface* chunk_scan_creator();
nvinfer1::IPluginCreatorInterface* ssd_scan_creator();

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_CREATORS_H_
