// Ssdi8Quantize: rotation and quantization.

#include "choices.h"
#include "plugin.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8QuantizeParams;
using S = Size<P>;

Description<P> describe() {
  Description<P> op;
  op.name = "Ssdi8Quantize";
  op.launch = ssdi8_quantize;
  op.set_sizes = as_rows;
  op.fields = {
      size_field("width", &P::width),
      choice_field("rotation", &P::rotation, kInputRotations),
      choice_field("rounding", &P::rounding, kRoundings),
      choice_field("scaling", &P::scaling, kTokenScalings),
  };
  op.inputs = {
      {"x", kHalf, bind<&P::x>, {S::kBatch, S::kLength, &P::width}},
      {"scale", kFloat, bind<&P::scale>, single_shape<P>()},
  };
  op.optional_inputs = unread_scales<P, 1>;
  op.outputs = {
      {"quantized", kInt8, bind<&P::quantized>, {S::kBatch, S::kLength, &P::width}},
      {"token_scale", kFloat, bind<&P::token_scale>, token_shape<P>()},
  };
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
