// Ssdi8ChunkScan: outputs from the inputs of a chunk and the state that enters it.

#include "plugin.h"
#include "ssd.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8ChunkScanParams;

constexpr char kName[] = "Ssdi8ChunkScan";

bool consistent(const P& p) { return check_groups(kName, p); }

Description<P> describe() {
  Description<P> op;
  op.name = kName;
  op.launch = ssdi8_chunk_scan;
  op.set_sizes = as_sequences;
  op.fields = geometry_fields<P>() + std::vector<Field<P>>{
                                         choice_field("rounding", &P::rounding, kRoundings),
                                         choice_field("scaling", &P::scaling, kScalings),
                                     };
  op.consistent = consistent;
  op.inputs = {
      {"x", kHalf, bind<&P::x>, inner_shape<P>()},
      {"b_q", kInt8, bind<&P::b_q>, group_shape<P>()},
      {"c_q", kInt8, bind<&P::c_q>, group_shape<P>()},
      {"dt", kFloat, bind<&P::dt>, decay_shape<P>()},
      {"a", kFloat, bind<&P::a>, decay_shape<P>()},
      {"passed", passed_type<P>, bind<&P::passed>, chunk_shape<P>()},
      {"passed_scale", kFloat, bind<&P::passed_scale>, chunk_scale_shape<P>()},
      {"D", kFloat, bind<&P::d_skip>, {&P::nheads}},
      {"b_scale", kFloat, bind<&P::b_scale>, {&P::ngroups}},
      {"c_scale", kFloat, bind<&P::c_scale>, {&P::ngroups}},
      {"cb_scale", kFloat, bind<&P::cb_scale>, {&P::ngroups}},
  };
  op.outputs = {{"y", kHalf, bind<&P::y>, inner_shape<P>()}};
  op.workspace = ssdi8_chunk_scan_workspace;
  op.workspace_pointer = &P::workspace;
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
