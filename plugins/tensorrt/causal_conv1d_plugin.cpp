// Ssdi8CausalConv1d: depthwise convolution and SiLU over the x, B and C columns of in_proj's
// output, with carried state; B and C quantized.

#include "choices.h"
#include "plugin.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8CausalConv1dParams;
using S = Size<P>;

int64_t kept_rows(const P& p) { return p.d_conv - 1; }
int64_t bc_columns(const P& p) { return (p.conv_dim - p.d_inner) / 2; }

bool consistent(const P& p) {
  const int32_t bc = p.conv_dim - p.d_inner;
  if (bc > 0 && bc % (2 * p.ngroups) == 0) return true;
  return log_error("Ssdi8CausalConv1d: conv_dim %d is not d_inner %d + 2 * ngroups %d * d_state",
                   p.conv_dim, p.d_inner, p.ngroups);
}

Description<P> describe() {
  Description<P> op;
  op.name = "Ssdi8CausalConv1d";
  op.launch = ssdi8_causal_conv1d;
  op.set_sizes = as_sequences;
  op.fields = {
      size_field("d_inner", &P::d_inner),
      size_field("conv_dim", &P::conv_dim),
      size_field("d_conv", &P::d_conv, 2),
      size_field("ngroups", &P::ngroups),
      choice_field("rotation", &P::rotation, kRotations),
      choice_field("rounding", &P::rounding, kRoundings),
  };
  op.consistent = consistent;
  op.inputs = {
      {"zxbcdt", kHalf, bind<&P::zxbcdt>, {S::kBatch, S::kLength, &P::row_stride}},
      {"conv_state", kHalf, bind<&P::conv_state>, {S::kBatch, kept_rows, &P::conv_dim}},
      {"weight", kFloat, bind<&P::weight>, {&P::conv_dim, &P::d_conv}},
      {"bias", kFloat, bind<&P::bias>, {&P::conv_dim}},
      {"b_scale", kFloat, bind<&P::b_scale>, {&P::ngroups}},
      {"c_scale", kFloat, bind<&P::c_scale>, {&P::ngroups}},
  };
  op.outputs = {
      {"x", kHalf, bind<&P::x>, {S::kBatch, S::kLength, &P::d_inner}},
      {"b_q", kInt8, bind<&P::b_q>, {S::kBatch, S::kLength, bc_columns}},
      {"c_q", kInt8, bind<&P::c_q>, {S::kBatch, S::kLength, bc_columns}},
      {"conv_state_out", kHalf, bind<&P::conv_state_out>, {S::kBatch, kept_rows, &P::conv_dim}},
  };
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
