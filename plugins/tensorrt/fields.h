// Attributes of an op as plugin fields: described once, read, checked and written from that.
//
// Every attribute is a member of the op's params struct in kernels.h, so a plugin's configuration
// is that struct with the attributes filled in and everything else zero.

#ifndef SSDI8_TENSORRT_FIELDS_H_
#define SSDI8_TENSORRT_FIELDS_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "log.h"

namespace ssdi8::plugin {

// A number of kernels.h by the name that the op's reference gives it.
struct Choice {
  const char* name;
  int32_t number;
};

using Choices = std::vector<Choice>;

template <typename P>
struct Field {
  const char* name;
  int32_t P::* integer;  // this or `real`, the other null
  float P::* real;
  double low;  // of a number
  double high;
  Choices choices;  // not empty: an integer that is given by name
};

// Larger sizes do not occur, and a product of two of these stays far inside 64 bits.
constexpr double kLargestSize = 1 << 24;

template <typename P>
Field<P> size_field(const char* name, int32_t P::* member, int32_t low = 1) {
  return {name, member, nullptr, static_cast<double>(low), kLargestSize, {}};
}

template <typename P>
Field<P> real_field(const char* name, float P::* member, double low, double high) {
  return {name, nullptr, member, low, high, {}};
}

template <typename P>
Field<P> choice_field(const char* name, int32_t P::* member, const Choices& choices) {
  return {name, member, nullptr, 0, 0, choices};
}

// One value of a field; on failure they name op, field, value and what is allowed.
bool read_integer(const char* op, const nvinfer1::PluginField& field, double low, double high,
                  int32_t* value) noexcept;
bool read_real(const char* op, const nvinfer1::PluginField& field, double low, double high,
               float* value) noexcept;
bool read_choice(const char* op, const nvinfer1::PluginField& field, const Choices& choices,
                 int32_t* value) noexcept;

// The only field of that name in `given`, or null after a message.
const nvinfer1::PluginField* find_field(const char* op, const char* name,
                                        const nvinfer1::PluginFieldCollection& given) noexcept;

template <typename P>
nvinfer1::PluginFieldType type_of(const Field<P>& field) noexcept {
  if (field.real) return nvinfer1::PluginFieldType::kFLOAT32;
  return field.choices.empty() ? nvinfer1::PluginFieldType::kINT32
                               : nvinfer1::PluginFieldType::kCHAR;
}

// The field as TensorRT stores it: of a choice its name, of a number a pointer into `params`.
template <typename P>
nvinfer1::PluginField write_field(const Field<P>& field, const P& params) noexcept {
  if (field.real) return {field.name, &(params.*field.real), type_of(field), 1};
  const int32_t& number = params.*field.integer;
  for (const Choice& choice : field.choices) {
    if (choice.number != number) continue;
    const size_t length = std::char_traits<char>::length(choice.name);
    return {field.name, choice.name, type_of(field), static_cast<int32_t>(length)};
  }
  return {field.name, &number, type_of(field), 1};
}

// Fills the attributes of `params`; every field must be there once.
template <typename P>
bool read_fields(const char* op, const std::vector<Field<P>>& fields,
                 const nvinfer1::PluginFieldCollection* given, P* params) noexcept {
  if (given == nullptr || given->nbFields < 0 ||
      (given->nbFields > 0 && given->fields == nullptr)) {
    return log_error("%s: there is no list of fields", op);
  }
  for (const Field<P>& field : fields) {
    const nvinfer1::PluginField* found = find_field(op, field.name, *given);
    if (found == nullptr) return false;
    const bool valid =
        field.real ? read_real(op, *found, field.low, field.high, &(params->*field.real))
        : field.choices.empty()
            ? read_integer(op, *found, field.low, field.high, &(params->*field.integer))
            : read_choice(op, *found, field.choices, &(params->*field.integer));
    if (!valid) return false;
  }
  return true;
}

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_FIELDS_H_
