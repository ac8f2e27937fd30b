// estdgm::packed_linear as an operator of PyTorch, for Python and for C++ programs alike: loading this library is all
// that either needs.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <functional>

#include "packed.h"

namespace {

using at::Tensor;
using std::optional;

constexpr const char *SCHEMA =
    "packed_linear(Tensor x, Tensor values, Tensor ptr, Tensor idx, Tensor? outputs, Tensor? ends, Tensor? scale, "
    "Tensor? bias, int[] sides, int in_features, int out_features) -> Tensor";

void check_list(const Tensor &list, const char *name, at::ScalarType type) {
  TORCH_CHECK(list.scalar_type() == type && list.dim() == 1 && list.is_contiguous() && list.is_cpu(),
              "estdgm::packed_linear: expected ", name, " as a contiguous list of ", type, " on the CPU, got ",
              list.toString(), " of shape ", list.sizes());
}

const float *floats_of(const optional<Tensor> &list, const char *name, int64_t length) {
  if (!list.has_value() || !list->defined()) return nullptr;
  check_list(*list, name, at::kFloat);
  TORCH_CHECK(list->numel() == length, "estdgm::packed_linear: expected ", length, " of ", name, ", got ", list->numel());
  return list->const_data_ptr<float>();
}

struct Operands {
  const Tensor &x, &values, &ptr, &idx;
  const optional<Tensor> &outputs, &ends;
  const float *scale, *bias;
  int64_t r, c, in, out;
};

bool compute(const Operands &a, const Tensor &x, Tensor &y) {
  estdgm::Values type;
  switch (a.values.scalar_type()) {
    case at::kFloat: type = estdgm::Values::float32; break;
    case at::kBFloat16: type = estdgm::Values::bfloat16; break;
    case at::kChar: type = estdgm::Values::int8; break;
    default:
      TORCH_CHECK(false, "estdgm::packed_linear: expected values in float32, bfloat16 or int8, got ",
                  a.values.scalar_type());
  }
  const auto run = [&](const auto &weight) {
    return estdgm::multiply(weight, x.const_data_ptr<float>(), x.stride(0), x.size(0), y.mutable_data_ptr<float>(),
                            a.out, at::get_num_threads());
  };
  const void *values = a.values.const_data_ptr();
  const int32_t *ptr = a.ptr.const_data_ptr<int32_t>();
  if (a.r > 1)
    return run(estdgm::PackedUnits{values, type, a.scale, a.bias, ptr, a.idx.const_data_ptr<int32_t>(), a.out / a.r,
                                   a.r, a.c, a.in});
  return run(estdgm::PackedSingles{values, type, a.scale, a.bias, ptr, a.ptr.numel() - 1,
                                   a.outputs->const_data_ptr<int32_t>(), a.ends->const_data_ptr<int32_t>(),
                                   a.idx.const_data_ptr<uint8_t>(), a.out, a.in});
}

void check(const Operands &a) {
  TORCH_CHECK(a.x.is_cpu() && a.x.scalar_type() == at::kFloat, "estdgm::packed_linear: expected x in float32 on the CPU, got ",
              a.x.toString());
  TORCH_CHECK(a.x.dim() > 0 && a.x.size(-1) == a.in, "estdgm::packed_linear: expected x of shape [..., ", a.in, "], got ",
              a.x.sizes());
  check_list(a.values, "values", a.values.scalar_type());
  check_list(a.ptr, "ptr", at::kInt);
  check_list(a.idx, "idx", a.r > 1 ? at::kInt : at::kByte);
  if (a.r > 1) {
    TORCH_CHECK((a.r & (a.r - 1)) == 0 && a.r <= 64 && a.c > 0 && a.out % a.r == 0 && a.in % a.c == 0 &&
                    a.ptr.numel() == a.out / a.r + 1 && a.values.numel() == a.idx.numel() * a.r * a.c,
                "estdgm::packed_linear: units of ", a.r, " x ", a.c, " do not fit a weight of ", a.out, " x ", a.in,
                " with ", a.idx.numel(), " units and ", a.values.numel(), " values");
  } else {
    TORCH_CHECK(a.outputs.has_value() && a.ends.has_value(), "estdgm::packed_linear: single weights need outputs and ends");
    check_list(*a.outputs, "outputs", at::kInt);
    check_list(*a.ends, "ends", at::kInt);
    TORCH_CHECK(a.ptr.numel() == (a.in + estdgm::LINES - 1) / estdgm::LINES + 1 &&
                    a.outputs->numel() == 4 * a.ends->numel() && a.values.numel() == a.idx.numel(),
                "estdgm::packed_linear: lists of single weights do not fit a weight of ", a.out, " x ", a.in);
  }
}

Tensor packed_linear(const Tensor &x, const Tensor &values, const Tensor &ptr, const Tensor &idx,
                     const optional<Tensor> &outputs, const optional<Tensor> &ends, const optional<Tensor> &scale,
                     const optional<Tensor> &bias, at::IntArrayRef sides, int64_t in, int64_t out) {
  TORCH_CHECK(sides.size() == 2, "estdgm::packed_linear: expected two sides of a unit, got ", sides.size());
  const Operands a = {x,    values, ptr, idx, outputs, ends, floats_of(scale, "scale", out), floats_of(bias, "bias", out),
                      sides[0], sides[1], in, out};
  check(a);
  auto shape = x.sizes().vec();
  shape.back() = out;
  Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  Tensor rows = x.reshape({-1, in});
  if (in > 1 && rows.stride(1) != 1) rows = rows.contiguous();
  TORCH_CHECK(compute(a, rows, y), "estdgm::packed_linear: no memory for its buffers");
  return y;
}

// Forward as ever; whoever then asks for the gradient is told that there is none.
struct WithoutGradient : torch::autograd::Function<WithoutGradient> {
  static Tensor forward(torch::autograd::AutogradContext *, const Tensor &, const std::function<Tensor()> &compute) {
    at::AutoDispatchBelowADInplaceOrView below;
    return compute();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *, torch::autograd::variable_list) {
    TORCH_CHECK(false, "packed layers are for inference only and have no gradient: train the model that was packed, or "
                       "run this one under torch.no_grad()");
  }
};

Tensor with_autograd(const Tensor &x, const Tensor &values, const Tensor &ptr, const Tensor &idx,
                     const optional<Tensor> &outputs, const optional<Tensor> &ends, const optional<Tensor> &scale,
                     const optional<Tensor> &bias, at::IntArrayRef sides, int64_t in, int64_t out) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("estdgm::packed_linear", "").typed<decltype(packed_linear)>();
  const auto below = [&] { return op.call(x, values, ptr, idx, outputs, ends, scale, bias, sides, in, out); };
  if (at::GradMode::is_enabled() && x.requires_grad()) return WithoutGradient::apply(x, std::function<Tensor()>(below));
  at::AutoDispatchBelowADInplaceOrView guard;
  return below();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(estdgm, m) { m.def(SCHEMA, {at::Tag::pt2_compliant_tag}); }

TORCH_LIBRARY_IMPL(estdgm, CPU, m) { m.impl("packed_linear", TORCH_FN(packed_linear)); }

TORCH_LIBRARY_IMPL(estdgm, Autograd, m) { m.impl("packed_linear", TORCH_FN(with_autograd)); }
