// Attributes that several ops have: the names of kernels.h's numbers.

#ifndef SSDI8_TENSORRT_CHOICES_H_
#define SSDI8_TENSORRT_CHOICES_H_

#include "fields.h"
#include "kernels.h"

namespace ssdi8::plugin {

inline const Choices kRoundings = {{"half_even", SSDI8_ROUNDING_HALF_EVEN},
                                   {"half_away", SSDI8_ROUNDING_HALF_AWAY}};
inline const Choices kRotations = {{"none", SSDI8_ROTATION_NONE},
                                   {"hadamard", SSDI8_ROTATION_HADAMARD}};
// Of the input of a linear layer.
inline const Choices kInputRotations = {{"none", SSDI8_ROTATION_NONE},
                                        {"full", SSDI8_ROTATION_FULL},
                                        {"blocks", SSDI8_ROTATION_BLOCKS},
                                        {"signs", SSDI8_ROTATION_SIGNS}};
inline const Choices kGates = {{"fp32", SSDI8_GATE_FP32}, {"q0.7", SSDI8_GATE_Q0_7}};
inline const Choices kScalings = {{"static", SSDI8_SCALING_STATIC},
                                  {"dynamic", SSDI8_SCALING_DYNAMIC},
                                  {"none", SSDI8_SCALING_NONE}};
// Of the input of a linear layer.
inline const Choices kTokenScalings = {{"static", SSDI8_SCALING_STATIC},
                                       {"dynamic", SSDI8_SCALING_DYNAMIC}};

// The scales that come last are read with scaling static only.
template <typename P, int32_t kScales>
int32_t unread_scales(const P& p) {
  return p.scaling == SSDI8_SCALING_STATIC ? 0 : kScales;
}

}  // namespace ssdi8::plugin

#endif  // SSDI8_TENSORRT_CHOICES_H_
