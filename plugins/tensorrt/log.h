// Messages of the plugins, to TensorRT's logger or, without one, to stderr.

#ifndef SSDI8_TENSORRT_LOG_H_
#define SSDI8_TENSORRT_LOG_H_

namespace ssdi8::plugin {

// Returns false, so that a check can end with it.
bool log_error(const char* format, ...) noexcept __attribute__((format(printf, 1, 2)));

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_LOG_H_
