#include "fields.h"

#include <cstdio>
#include <cstring>

namespace ssdi8::plugin {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// Whether the field holds `length` elements of `type`; `allowed` says so in words.
bool has_form(const char* op, const PluginField& field, PluginFieldType type,
              const char* allowed) noexcept {
  if (field.type != type || field.length != 1 || field.data == nullptr) {
    return log_error("%s: field %s has type %d and %d values, not %s", op, field.name,
                     static_cast<int>(field.type), field.length, allowed);
  }
  return true;
}

// "half_even, half_away"
void list_choices(const Choices& choices, char* text, size_t size) noexcept {
  size_t used = 0;
  for (const Choice& choice : choices) {
    const int n =
        std::snprintf(text + used, size - used, "%s%s", used == 0 ? "" : ", ", choice.name);
    used += static_cast<size_t>(n);
    if (used >= size) return;
  }
}

}  // namespace

bool read_integer(const char* op, const PluginField& field, double low, double high,
                  int32_t* value) noexcept {
  if (!has_form(op, field, PluginFieldType::kINT32, "one INT32")) return false;
  std::memcpy(value, field.data, sizeof(*value));  // parsers do not promise alignment
  if (*value >= low && *value <= high) return true;
  return log_error("%s: field %s is %d, not an integer from %.0f to %.0f", op, field.name, *value,
                   low, high);
}

bool read_real(const char* op, const PluginField& field, double low, double high,
               float* value) noexcept {
  if (!has_form(op, field, PluginFieldType::kFLOAT32, "one FLOAT32")) return false;
  std::memcpy(value, field.data, sizeof(*value));
  if (*value >= low && *value <= high) return true;  // false for NaN
  return log_error("%s: field %s is %g, not a number from %g to %g", op, field.name, *value, low,
                   high);
}

bool read_choice(const char* op, const PluginField& field, const Choices& choices,
                 int32_t* value) noexcept {
  char allowed[128] = "";
  list_choices(choices, allowed, sizeof(allowed));
  if (field.type != PluginFieldType::kCHAR || field.length < 1 || field.data == nullptr) {
    return log_error("%s: field %s has type %d and %d values, not a string: %s", op, field.name,
                     static_cast<int>(field.type), field.length, allowed);
  }
  // A parser may count the terminating NUL or not.
  const char* text = static_cast<const char*>(field.data);
  size_t length = static_cast<size_t>(field.length);
  if (text[length - 1] == '\0') --length;
  for (const Choice& choice : choices) {
    if (std::strlen(choice.name) != length || std::memcmp(choice.name, text, length) != 0) continue;
    *value = choice.number;
    return true;
  }
  return log_error("%s: field %s is '%.*s', not one of %s", op, field.name,
                   static_cast<int>(length < 64 ? length : 64), text, allowed);
}

const PluginField* find_field(const char* op, const char* name,
                              const nvinfer1::PluginFieldCollection& given) noexcept {
  const PluginField* found = nullptr;
  for (int32_t i = 0; i < given.nbFields; ++i) {
    const PluginField& field = given.fields[i];
    if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
    if (found != nullptr) {
      log_error("%s: field %s is given twice", op, name);
      return nullptr;
    }
    found = &field;
  }
  if (found == nullptr) log_error("%s: field %s is missing", op, name);
  return found;
}

}  // namespace ssdi8::plugin
