// Ssdi8RmsNormGated and Ssdi8NormThenGate: gate, grouped RMSNorm, Hadamard transform, quantize.

#include "choices.h"
#include "plugin.h"

namespace ssdi8::plugin {
namespace {

constexpr char kGateFirst[] = "Ssdi8RmsNormGated";
constexpr char kNormFirst[] = "Ssdi8NormThenGate";

template <typename P, const char* kName>
bool consistent(const P& p) {
  if (p.d_inner % p.ngroups == 0) return true;
  return log_error("%s: d_inner %d is not a multiple of ngroups %d", kName, p.d_inner, p.ngroups);
}

template <typename P, const char* kName, int (*kLaunch)(const P*, void*)>
Description<P> describe() {
  using S = Size<P>;
  Description<P> op;
  op.name = kName;
  op.launch = kLaunch;
  op.set_sizes = as_rows<P>;
  op.fields = {
      real_field("eps", &P::eps, 0.0, 1.0),
      size_field("d_inner", &P::d_inner),
      size_field("ngroups", &P::ngroups),
      choice_field("rounding", &P::rounding, kRoundings),
      choice_field("scaling", &P::scaling, kTokenScalings),
  };
  op.consistent = consistent<P, kName>;
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

const Registration gate_first(
    creator<describe<Ssdi8RmsNormGatedParams, kGateFirst, ssdi8_rms_norm_gated>>);
const Registration norm_first(
    creator<describe<Ssdi8NormThenGateParams, kNormFirst, ssdi8_norm_then_gate>>);

}  // namespace
}  // namespace ssdi8::plugin
