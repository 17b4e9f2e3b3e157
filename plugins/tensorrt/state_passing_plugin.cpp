// Ssdi8StatePassing: the recurrence between chunks.

#include "plugin.h"
#include "ssd.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8StatePassingParams;

constexpr char kName[] = "Ssdi8StatePassing";

bool consistent(const P& p) { return check_gate(kName, p); }

Description<P> describe() {
  Description<P> op;
  op.name = kName;
  op.launch = ssdi8_state_passing;
  op.set_sizes = as_sequences;
  op.fields = {
      size_field("chunk_size", &P::chunk_size),
      choice_field("gate", &P::gate, kGates),
      choice_field("rounding", &P::rounding, kRoundings),
      choice_field("scaling", &P::scaling, kScalings),
  };
  op.consistent = consistent;
  op.inputs = {
      {"states", chunk_type<P>, bind<&P::states>, chunk_shape<P>()},
      {"a", kFloat, bind<&P::a>, decay_shape<P>()},
      {"ssm_state", state_type<P>(), bind<&P::ssm_state>, state_shape<P>()},
      {"state_scale", kFloat, bind<&P::state_scale>, channel_shape<P>()},
  };
  op.optional_inputs = unread_scales<P, 1>;
  op.outputs = {
      {"passed", passed_type<P>, bind<&P::passed>, chunk_shape<P>()},
      {"passed_scale", kFloat, bind<&P::passed_scale>, chunk_scale_shape<P>()},
      {"ssm_state_out", state_type<P>(), bind<&P::ssm_state_out>, state_shape<P>()},
  };
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
