// Ssdi8ChunkCumsum: time steps and the decay summed up inside each chunk.

#include "plugin.h"
#include "ssd.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8ChunkCumsumParams;
using S = Size<P>;

constexpr char kName[] = "Ssdi8ChunkCumsum";

bool consistent(const P& p) { return check_time_step(kName, p); }

Description<P> describe() {
  Description<P> op;
  op.name = kName;
  op.launch = ssdi8_chunk_cumsum;
  op.set_sizes = as_sequences;
  op.fields =
      std::vector<Field<P>>{
          size_field("chunk_size", &P::chunk_size),
          size_field("nheads", &P::nheads),
      } +
      time_step_fields<P>();
  op.consistent = consistent;
  op.inputs = {
      {"zxbcdt", kHalf, bind<&P::zxbcdt>, {S::kBatch, S::kLength, &P::row_stride}},
      {"dt_bias", kFloat, bind<&P::dt_bias>, {&P::nheads}},
      {"A", kFloat, bind<&P::a_rate>, {&P::nheads}},
  };
  op.outputs = {
      {"dt", kFloat, bind<&P::dt>, decay_shape<P>()},
      {"a", kFloat, bind<&P::a>, decay_shape<P>()},
  };
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
