// Ssdi8Linear and Ssdi8LinearW4: y = FP16(FP32(x . weight^T) * scale * token_scale + bias).

#include "plugin.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8LinearParams;
using S = Size<P>;

Description<P> describe() {
  Description<P> op;
  op.name = "Ssdi8Linear";
  op.launch = ssdi8_linear;
  op.set_sizes = as_rows;
  op.inputs = {
      {"x", kInt8, bind<&P::x>, {S::kBatch, S::kLength, &P::in_features}},
      {"token_scale", kFloat, bind<&P::token_scale>, token_shape<P>()},
      {"weight", kInt8, bind<&P::weight>, {&P::out_features, &P::in_features}},
      {"scale", kFloat, bind<&P::scale>, {&P::out_features}},
      {"bias", kFloat, bind<&P::bias>, {&P::out_features}},
  };
  op.outputs = {{"y", kHalf, bind<&P::y>, {S::kBatch, S::kLength, &P::out_features}}};
  return op;
}

using P4 = Ssdi8LinearW4Params;
using S4 = Size<P4>;

// Rounded up, so that a part of a byte or group does not pass for a whole one.
int64_t packed_columns(const P4& p) { return (int64_t{p.in_features} + 1) / 2; }
int64_t groups(const P4& p) { return (int64_t{p.in_features} + p.group_size - 1) / p.group_size; }

Description<P4> describe_w4() {
  Description<P4> op;
  op.name = "Ssdi8LinearW4";
  op.launch = ssdi8_linear_w4;
  op.set_sizes = as_rows;
  op.fields = {size_field("group_size", &P4::group_size)};
  const TypeOf<P4> scale_type(kHalf, kInt8, &P4::integer_scales);
  op.inputs = {
      {"x", kInt8, bind<&P4::x>, {S4::kBatch, S4::kLength, &P4::in_features}},
      {"token_scale", kFloat, bind<&P4::token_scale>, token_shape<P4>()},
      {"packed", kInt8, bind<&P4::packed>, {&P4::out_features, packed_columns}},
      {"group_scale", scale_type, bind<&P4::group_scale>, {&P4::out_features, groups}},
      {"scale", kFloat, bind<&P4::scale>, {&P4::out_features}},
      {"bias", kFloat, bind<&P4::bias>, {&P4::out_features}},
  };
  op.outputs = {{"y", kHalf, bind<&P4::y>, {S4::kBatch, S4::kLength, &P4::out_features}}};
  return op;
}

const Registration registration(creator<describe>);
const Registration w4_registration(creator<describe_w4>);

}  // namespace
}  // namespace ssdi8::plugin
