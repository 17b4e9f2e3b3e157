// Ssdi8RmsNormGated: gate, grouped RMSNorm, Hadamard transform, quantize.

#include "choices.h"
#include "plugin.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8RmsNormGatedParams;
using S = Size<P>;

bool consistent(const P& p) {
  if (p.d_inner % p.ngroups == 0) return true;
  return log_error("Ssdi8RmsNormGated: d_inner %d is not a multiple of ngroups %d", p.d_inner,
                   p.ngroups);
}

Description<P> describe() {
  Description<P> op;
  op.name = "Ssdi8RmsNormGated";
  op.launch = ssdi8_rms_norm_gated;
  op.set_sizes = as_rows;
  op.fields = {
      real_field("eps", &P::eps, 0.0, 1.0),
      size_field("d_inner", &P::d_inner),
      size_field("ngroups", &P::ngroups),
      choice_field("rounding", &P::rounding, kRoundings),
      choice_field("scaling", &P::scaling, kTokenScalings),
  };
  op.consistent = consistent;
  op.inputs = {
      {"y", kHalf, bind<&P::y>, {S::kBatch, S::kLength, &P::d_inner}},
      {"zxbcdt", kHalf, bind<&P::zxbcdt>, {S::kBatch, S::kLength, &P::row_stride}},
      {"weight", kFloat, bind<&P::weight>, {&P::d_inner}},
      {"scale", kFloat, bind<&P::scale>, single_shape<P>()},
  };
  op.optional_inputs = unread_scales<P, 1>;
  op.outputs = {
      {"quantized", kInt8, bind<&P::quantized>, {S::kBatch, S::kLength, &P::d_inner}},
      {"token_scale", kFloat, bind<&P::token_scale>, token_shape<P>()},
  };
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
