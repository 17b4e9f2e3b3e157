// Ssdi8Attention: causal attention over an INT8 cache, to which a call's tokens are appended.

#include "plugin.h"

namespace ssdi8::plugin {
namespace {

using P = Ssdi8AttentionParams;
using S = Size<P>;

int64_t query_columns(const P& p) { return int64_t{p.n_heads} * p.head_dim; }

bool consistent(const P& p) {
  if (p.n_heads % p.n_kv_heads == 0) return true;
  return log_error("Ssdi8Attention: n_heads %d is not a multiple of n_kv_heads %d", p.n_heads,
                   p.n_kv_heads);
}

Description<P> describe() {
  const std::vector<S> cache = {S::kBatch, &P::n_kv_heads, &P::capacity, &P::head_dim};
  const std::vector<S> scales = {S::kBatch, &P::n_kv_heads, &P::capacity};
  Description<P> op;
  op.name = "Ssdi8Attention";
  op.launch = ssdi8_attention;
  op.set_sizes = as_sequences;
  op.fields = {
      size_field("n_heads", &P::n_heads),
      size_field("n_kv_heads", &P::n_kv_heads),
      size_field("head_dim", &P::head_dim),
      size_field("first_column", &P::first_column, 0),
      real_field("rope_theta", &P::rope_theta, 0.0, 1e30),
  };
  op.consistent = consistent;
  op.inputs = {
      {"projected", kHalf, bind<&P::projected>, {S::kBatch, S::kLength, &P::row_stride}},
      {"k_cache", kInt8, bind<&P::k_cache>, cache},
      {"k_scale", kHalf, bind<&P::k_scale>, scales},
      {"v_cache", kInt8, bind<&P::v_cache>, cache},
      {"v_scale", kHalf, bind<&P::v_scale>, scales},
      {"position", kInt64, bind<&P::position>, {}},
  };
  op.outputs = {
      {"o", kHalf, bind<&P::o>, {S::kBatch, S::kLength, query_columns}},
      {"k_cache_out", kInt8, bind<&P::k_cache_out>, cache},
      {"k_scale_out", kHalf, bind<&P::k_scale_out>, scales},
      {"v_cache_out", kInt8, bind<&P::v_cache_out>, cache},
      {"v_scale_out", kHalf, bind<&P::v_scale_out>, scales},
  };
  op.workspace = ssdi8_attention_workspace;
  op.workspace_pointer = &P::workspace;
  return op;
}

const Registration registration(creator<describe>);

}  // namespace
}  // namespace ssdi8::plugin
