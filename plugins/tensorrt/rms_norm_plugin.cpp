// Ssdi8RmsNorm: residual add, RMSNorm, quantize.

#include "choices.h"
#include "plugin.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8RmsNormParams;
using S = Size<P>;

Description<P> describe() {
  Description<P> op;
  op.name = "Ssdi8RmsNorm";
  op.launch = ssdi8_rms_norm;
  op.set_sizes = as_rows;
  op.fields = {
      real_field("eps", &P::eps, 0.0, 1.0),
      choice_field("rounding", &P::rounding, kRoundings),
      choice_field("scaling", &P::scaling, kTokenScalings),
  };
  op.inputs = {
      {"hidden", kHalf, bind<&P::hidden>, {S::kBatch, S::kLength, &P::d_model}},
      {"residual", kFloat, bind<&P::residual>, {S::kBatch, S::kLength, &P::d_model}},
      {"scale", kFloat, bind<&P::scale>, single_shape<P>()},
  };
  op.optional_inputs = unread_scales<P, 1>;
  op.outputs = {
      {"residual_out", kFloat, bind<&P::residual_out>, {S::kBatch, S::kLength, &P::d_model}},
      {"quantized", kInt8, bind<&P::quantized>, {S::kBatch, S::kLength, &P::d_model}},
      {"token_scale", kFloat, bind<&P::token_scale>, token_shape<P>()},
  };
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
