// What TensorRT finds in libssdi8_plugins.so: the creators, and where the plugins' messages go.

#include <NvInferRuntime.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "log.h"
#include "registry.h"

namespace ssdi8::plugin {
namespace {

using Severity = nvinfer1::ILogger::Severity;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  try {
    return finder ? finder->findLogger() : nullptr;
  } catch (...) {  // findLogger is not noexcept, the plugins' methods are
    return nullptr;
  }
}

void log(Severity severity, const char* format, va_list arguments) noexcept {
  char message[512];
  std::vsnprintf(message, sizeof(message), format, arguments);
  // A field's text comes from a file; loggers in Python take UTF-8 alone, and a message is a line.
  for (char* c = message; *c != '\0'; ++c) {
    if (*c < ' ' || *c > '~') *c = '?';
  }
  if (nvinfer1::ILogger* logger = find_logger()) {
    logger->log(severity, message);
  } else {
    std::fprintf(stderr, "%s\n", message);
  }
}

// Of every op that registered, in the order of their names.
std::vector<nvinfer1::IPluginCreatorInterface*> creators_by_name() {
  std::vector<nvinfer1::IPluginCreatorV3One*> found;
  for (const Registration* r = Registration::first(); r != nullptr; r = r->next()) {
    found.push_back(r->creator());
  }
  std::sort(found.begin(), found.end(), [](const auto* a, const auto* b) {
    return std::strcmp(a->getPluginName(), b->getPluginName()) < 0;
  });
  return {found.begin(), found.end()};
}

}  // namespace

bool log_error(const char* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  log(Severity::kERROR, format, arguments);
  va_end(arguments);
  return false;
}

}  // namespace ssdi8::plugin

// The rest of the library is hidden, but for the C ABI of kernels.h.
#define SSDI8_EXPORT extern "C" __attribute__((visibility("default")))

// Major version of the headers. With a TensorRT of another one a call may end the process, so the
// runtime asks before it lets TensorRT load the library.
SSDI8_EXPORT int32_t ssdi8_tensorrt_major() { return NV_TENSORRT_MAJOR; }

// Called by IPluginRegistry::loadLibrary.
SSDI8_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  ssdi8::plugin::logger_finder.store(finder);
}

SSDI8_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static const std::vector<nvinfer1::IPluginCreatorInterface*> creators =
      ssdi8::plugin::creators_by_name();
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}
