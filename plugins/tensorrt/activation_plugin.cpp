// Ssdi8Activation: the square of ReLU or a SiLU gate, rotation, quantize.

#include "choices.h"
#include "plugin.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8ActivationParams;
using S = Size<P>;

const Choices kActivations = {{"relu2", SSDI8_ACTIVATION_RELU2},
                              {"silu_gate", SSDI8_ACTIVATION_SILU_GATE}};

Description<P> describe() {
  Description<P> op;
  op.name = "Ssdi8Activation";
  op.launch = ssdi8_activation;
  op.set_sizes = as_rows;
  op.fields = {
      choice_field("activation", &P::activation, kActivations),
      size_field("width", &P::width),
      size_field("x_column", &P::x_column, 0),
      choice_field("rotation", &P::rotation, kInputRotations),
      choice_field("rounding", &P::rounding, kRoundings),
      choice_field("scaling", &P::scaling, kTokenScalings),
  };
  op.inputs = {
      {"x", kHalf, bind<&P::x>, {S::kBatch, S::kLength, &P::x_stride}},
      {"gate", kHalf, bind<&P::gate>, {S::kBatch, S::kLength, &P::gate_stride}},
      {"scale", kFloat, bind<&P::scale>, single_shape<P>()},
  };
  op.optional_inputs = unread_scales<P, 1>;
  op.outputs = {
      {"quantized", kInt8, bind<&P::quantized>, {S::kBatch, S::kLength, &P::width}},
      {"token_scale", kFloat, bind<&P::token_scale>, token_shape<P>()},
  };
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
