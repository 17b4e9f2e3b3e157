// Ssdi8SsdScan: all of SSD in one op; for one token the plain recurrence.

#include "plugin.h"
#include "ssd.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8SsdScanParams;
using S = Size<P>;

constexpr char kName[] = "Ssdi8SsdScan";

bool consistent(const P& p) {
  return check_groups(kName, p) && check_gate(kName, p) && check_time_step(kName, p);
}

Description<P> describe() {
  Description<P> op;
  op.name = kName;
  op.launch = ssdi8_ssd_scan;
  op.set_sizes = as_sequences;
  op.fields = geometry_fields<P>() + time_step_fields<P>() +
              std::vector<Field<P>>{
                  choice_field("gate", &P::gate, kGates),
                  choice_field("rounding", &P::rounding, kRoundings),
                  choice_field("scaling", &P::scaling, kScalings),
              };
  op.consistent = consistent;
  op.inputs = {
      {"x", kHalf, bind<&P::x>, inner_shape<P>()},
      {"b_q", kInt8, bind<&P::b_q>, group_shape<P>()},
      {"c_q", kInt8, bind<&P::c_q>, group_shape<P>()},
      {"zxbcdt", kHalf, bind<&P::zxbcdt>, {S::kBatch, S::kLength, &P::row_stride}},
      {"ssm_state", state_type<P>(), bind<&P::ssm_state>, state_shape<P>()},
      {"dt_bias", kFloat, bind<&P::dt_bias>, {&P::nheads}},
      {"A", kFloat, bind<&P::a_rate>, {&P::nheads}},
      {"D", kFloat, bind<&P::d_skip>, {&P::nheads}},
      {"b_scale", kFloat, bind<&P::b_scale>, {&P::ngroups}},
      {"c_scale", kFloat, bind<&P::c_scale>, {&P::ngroups}},
      {"cb_scale", kFloat, bind<&P::cb_scale>, {&P::ngroups}},
      {"x_scale", kFloat, bind<&P::x_scale>, channel_shape<P>()},
      {"state_scale", kFloat, bind<&P::state_scale>, channel_shape<P>()},
  };
  op.optional_inputs = unread_scales<P, 2>;
  op.outputs = {
      {"y", kHalf, bind<&P::y>, inner_shape<P>()},
      {"ssm_state_out", state_type<P>(), bind<&P::ssm_state_out>, state_shape<P>()},
  };
  op.workspace = ssdi8_ssd_scan_workspace;
  op.workspace_pointer = &P::workspace;
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
