// Ssdi8ChunkState: the state that each chunk adds.

#include "plugin.h"
#include "ssd.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8ChunkStateParams;

constexpr char kName[] = "Ssdi8ChunkState";

bool consistent(const P& p) { return check_groups(kName, p) && check_gate(kName, p); }

Description<P> describe() {
  Description<P> op;
  op.name = kName;
  op.launch = ssdi8_chunk_state;
  op.set_sizes = as_sequences;
  op.fields = geometry_fields<P>() + std::vector<Field<P>>{
                                         choice_field("gate", &P::gate, kGates),
                                         choice_field("rounding", &P::rounding, kRoundings),
                                         choice_field("scaling", &P::scaling, kScalings),
                                     };
  op.consistent = consistent;
  op.inputs = {
      {"x", kHalf, bind<&P::x>, inner_shape<P>()},
      {"b_q", kInt8, bind<&P::b_q>, group_shape<P>()},
      {"dt", kFloat, bind<&P::dt>, decay_shape<P>()},
      {"a", kFloat, bind<&P::a>, decay_shape<P>()},
      {"b_scale", kFloat, bind<&P::b_scale>, {&P::ngroups}},
      {"x_scale", kFloat, bind<&P::x_scale>, channel_shape<P>()},
      {"state_scale", kFloat, bind<&P::state_scale>, channel_shape<P>()},
  };
  op.optional_inputs = unread_scales<P, 2>;
  op.outputs = {{"states", chunk_type<P>, bind<&P::states>, chunk_shape<P>()}};
  op.workspace = ssdi8_chunk_state_workspace;
  op.workspace_pointer = &P::workspace;
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
