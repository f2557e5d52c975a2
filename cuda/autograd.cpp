// Gradients of the operators, on any device: what each keeps for its backward pass, and the operator that computes it.
// In C++: torch's Python bindings for gradients take longer than some of the kernels. First derivatives only.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace spikegpt {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// An argument that was not given is saved as an undefined tensor, and its gradient is one.
Tensor held(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
OptionalTensor given(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
Tensor gradient(const Tensor& value, const Tensor& of) { return of.defined() ? value : Tensor(); }

// ---- WKV

struct Wkv : Function<Wkv> {
  using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                             const OptionalTensor&, const OptionalTensor&);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const Tensor&, const Tensor&);

  static variable_list forward(AutogradContext* ctx, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                               const OptionalTensor& state, const OptionalTensor& mask) {
    static const auto run = find<Forward>("spikegpt_lora::wkv");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({w, u, k, v, held(state), held(mask)});
    const auto [y, after] = run.call(w, u, k, v, state, mask);
    return {y, after};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto run = find<Backward>("spikegpt_lora::wkv_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto [w, u, k, v, state] =
        run.call(saved[0], saved[1], saved[2], saved[3], given(saved[4]), given(saved[5]), grads[0], grads[1]);
    return {w, u, k, v, gradient(state, saved[4]), Tensor()};
  }
};

std::tuple<Tensor, Tensor> wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                               const OptionalTensor& state, const OptionalTensor& mask) {
  const variable_list out = Wkv::apply(w, u, k, v, state, mask);
  return {out[0], out[1]};
}

// ---- LIF, alone and added to the residual stream; `Settings` as in ops.h

Tensor dropped(const Tensor& x, const Tensor& seed, double p) {
  static const auto run = find<Tensor(const Tensor&, const Tensor&, double)>("spikegpt_lora::dropout");
  return run.call(x, seed, p);
}

template <class... Settings>
struct LifGradients {
  using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&, Settings...);
  using Add = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                         Settings..., const OptionalTensor&, double);
  using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&, Settings...,
                                              const Tensor&, const Tensor&);
  using Saved = std::tuple<Settings...>;

  static std::tuple<Tensor, Tensor> back(AutogradContext* ctx, const variable_list& saved, const Tensor& grad_spikes,
                                         const Tensor& grad_membrane) {
    static const auto run = find<Backward>("spikegpt_lora::lif_backward");
    const auto call = [&](Settings... settings) {
      return run.call(saved[0], given(saved[1]), given(saved[2]), settings..., grad_spikes, grad_membrane);
    };
    return std::apply(call, ctx->saved_data["settings"].to<Saved>());
  }

  struct Alone : Function<Alone> {
    static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& membrane,
                                 const OptionalTensor& mask, Settings... settings) {
      static const auto run = find<Forward>("spikegpt_lora::lif");
      const at::AutoDispatchBelowADInplaceOrView below;
      ctx->save_for_backward({x, held(membrane), held(mask)});
      ctx->saved_data["settings"] = Saved(settings...);
      const auto [spikes, after] = run.call(x, membrane, mask, settings...);
      return {spikes, after};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
      const variable_list saved = ctx->get_saved_variables();
      const auto [x, membrane] = back(ctx, saved, grads[0], grads[1]);
      variable_list out(3 + sizeof...(Settings));
      out[0] = x, out[1] = gradient(membrane, saved[1]);
      return out;
    }
  };

  struct Added : Function<Added> {
    static variable_list forward(AutogradContext* ctx, const Tensor& residual, const Tensor& x,
                                 const OptionalTensor& membrane, const OptionalTensor& mask, Settings... settings,
                                 const OptionalTensor& seed, double p) {
      static const auto run = find<Add>("spikegpt_lora::lif_add");
      const at::AutoDispatchBelowADInplaceOrView below;
      ctx->save_for_backward({x, held(membrane), held(mask), held(seed)});
      ctx->saved_data["settings"] = Saved(settings...);
      ctx->saved_data["p"] = p;
      const auto [out, after] = run.call(residual, x, membrane, mask, settings..., seed, p);
      return {out, after};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
      const variable_list saved = ctx->get_saved_variables();
      const Tensor& seed = saved[3];
      const Tensor stream = seed.defined() ? dropped(grads[0], seed, ctx->saved_data["p"].toDouble()) : grads[0];
      const auto [x, membrane] = back(ctx, saved, stream, grads[1]);
      variable_list out(6 + sizeof...(Settings));
      out[0] = stream, out[1] = x, out[2] = gradient(membrane, saved[1]);
      return out;
    }
  };

  static std::tuple<Tensor, Tensor> alone(const Tensor& x, const OptionalTensor& membrane, const OptionalTensor& mask,
                                          Settings... settings) {
    const variable_list out = Alone::apply(x, membrane, mask, settings...);
    return {out[0], out[1]};
  }

  static std::tuple<Tensor, Tensor> added(const Tensor& residual, const Tensor& x, const OptionalTensor& membrane,
                                          const OptionalTensor& mask, Settings... settings, const OptionalTensor& seed,
                                          double p) {
    const variable_list out = Added::apply(residual, x, membrane, mask, settings..., seed, p);
    return {out[0], out[1]};
  }
};

using Lif = LifGradients<double, double, std::optional<double>, bool, double, bool>;

// ---- token shift, `Shares` being two or three tensors

template <class... Shares>
struct Shift {
  static constexpr int N = sizeof...(Shares);
  using Shifted = std::tuple<Shares..., Tensor, Tensor, Tensor>;
  using Forward = Shifted(const Tensor&, const OptionalTensor&, const OptionalTensor&, double, const OptionalTensor&,
                          const OptionalTensor&, const Shares&..., std::optional<ScalarType>);
  using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                      const Tensor&, const Tensor&, const OptionalTensor&,
                                                      const OptionalTensor&, const Shares&..., const Shares&...,
                                                      const Tensor&, bool);
  static constexpr const char* forward_name = N == 2 ? "spikegpt_lora::token_shift2" : "spikegpt_lora::token_shift3";
  static constexpr const char* backward_name =
      N == 2 ? "spikegpt_lora::token_shift2_backward" : "spikegpt_lora::token_shift3_backward";

  struct Gradients : Function<Gradients> {
    static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& gain,
                                 const OptionalTensor& bias, double eps, const OptionalTensor& last,
                                 const OptionalTensor& mask, const Shares&... shares, std::optional<ScalarType> dtype) {
      static const auto run = find<Forward>(forward_name);
      const at::AutoDispatchBelowADInplaceOrView below;
      const Shifted out = run.call(x, gain, bias, eps, last, mask, shares..., dtype);
      const Tensor &mean = std::get<N + 1>(out), &rstd = std::get<N + 2>(out);
      ctx->save_for_backward({x, held(gain), held(bias), mean, rstd, held(last), held(mask), shares...});
      ctx->mark_non_differentiable({mean, rstd});
      return std::apply([](const auto&... tensors) { return variable_list{tensors...}; }, out);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
      static const auto run = find<Backward>(backward_name);
      const variable_list saved = ctx->get_saved_variables();
      const Tensor &x = saved[0], &gain = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
      // Tensors that were not given have no place among what gradients are asked for.
      const size_t before = 1 + 2 * gain.defined() + saved[5].defined() + saved[6].defined();
      bool shares = false;
      for (int j = 0; j < N; j++) shares = shares || ctx->needs_input_grad(before + j);
      const auto call = [&]<size_t... j>(std::index_sequence<j...>) {
        return run.call(x, given(gain), given(bias), mean, rstd, given(saved[5]), given(saved[6]), saved[7 + j]...,
                        grads[j]..., grads[N], shares);
      };
      const auto [mixed, last, of_shares] = call(std::make_index_sequence<N>());
      variable_list out(7 + N);
      out[0] = mixed;
      if (gain.defined()) {
        const bool weights = ctx->needs_input_grad(1) || ctx->needs_input_grad(2);
        std::tie(out[0], out[1], out[2]) = at::native_layer_norm_backward(
            mixed, x, {x.size(2)}, mean.unsqueeze(-1), rstd.unsqueeze(-1), gain, bias, {true, weights, weights});
      }
      out[4] = gradient(last, saved[5]);
      for (int j = 0; shares && j < N; j++) out[6 + j] = of_shares[j];
      return out;
    }
  };

  static Shifted run(const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, double eps,
                     const OptionalTensor& last, const OptionalTensor& mask, const Shares&... shares,
                     std::optional<ScalarType> dtype) {
    const variable_list out = Gradients::apply(x, gain, bias, eps, last, mask, shares..., dtype);
    return [&]<size_t... j>(std::index_sequence<j...>) {
      return Shifted(out[j]...);
    }(std::make_index_sequence<N + 3>());
  }
};

// ---- activations and dropout

struct SigmoidGate : Function<SigmoidGate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& r, const Tensor& y) {
    static const auto run = find<Tensor(const Tensor&, const Tensor&)>("spikegpt_lora::sigmoid_gate");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({r, y});
    return run.call(r, y);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&);
    static const auto run = find<Backward>("spikegpt_lora::sigmoid_gate_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto [r, y] = run.call(saved[0], saved[1], grads[0]);
    return {r, y};
  }
};

struct SquaredRelu : Function<SquaredRelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& k) {
    static const auto run = find<Tensor(const Tensor&)>("spikegpt_lora::squared_relu");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({k});
    return run.call(k);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto run = find<Tensor(const Tensor&, const Tensor&)>("spikegpt_lora::squared_relu_backward");
    return {run.call(ctx->get_saved_variables()[0], grads[0])};
  }
};

struct Dropout : Function<Dropout> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& seed, double p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({seed});
    ctx->saved_data["p"] = p;
    return dropped(x, seed, p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {dropped(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["p"].toDouble()), Tensor(), Tensor()};
  }
};

// ---- integer spikes

struct IntegerSpikes : Function<IntegerSpikes> {
  using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, bool, bool);
  using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, bool, const Tensor&);

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& log_scale, const Tensor& most,
                        bool has_sign, bool squares) {
    static const auto run = find<Forward>("spikegpt_lora::integer_spikes");
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, log_scale, most});
    ctx->saved_data["has_sign"] = has_sign, ctx->saved_data["squares"] = squares;
    return run.call(x, log_scale, most, has_sign, squares);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto run = find<Backward>("spikegpt_lora::integer_spikes_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto [x, log_scale] = run.call(saved[0], saved[1], saved[2], ctx->saved_data["has_sign"].toBool(),
                                         ctx->saved_data["squares"].toBool(), grads[0]);
    return {x, log_scale, Tensor(), Tensor(), Tensor()};
  }
};

// ---- a linear layer, most often a frozen one, with an adapter, in two operators between which the gate stands:
//
//   a = x A^T, x                       gradient of x: that of the layer, and grad_a A added to it in place
//   x W^T + bias, + s passed B^T       in place
//
// so that nothing but the matrix products passes over the layer's input, its output and their gradients. The gradient of
// B is the transpose of passed^T grad: with a few columns, twice as fast as grad^T passed.

Tensor rows(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

Tensor like(const Tensor& product, const Tensor& x) {  // (rows, n) as (..., n)
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = product.size(-1);
  return product.view(shape);
}

struct AdapterIn : Function<AdapterIn> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& a) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, a});
    ctx->set_materialize_grads(false);
    return {like(at::mm(rows(x), a.t()), x), x};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &a = saved[1];
    Tensor grad_x = grads[1], grad_a;
    if (!grads[0].defined()) return {grad_x, grad_a};
    const Tensor g = rows(grads[0]);
    if (ctx->needs_input_grad(1)) grad_a = at::mm(g.t(), rows(x));
    if (ctx->needs_input_grad(0)) {
      if (!grad_x.defined()) {
        grad_x = like(at::mm(g, a), x);
      } else if (nobody_else_holds(grad_x)) {  // AdapterOut made it for this place
        rows(grad_x).addmm_(g, a);
      } else {
        grad_x = like(at::addmm(rows(grad_x), g, a), x);
      }
    }
    return {grad_x, grad_a};
  }

  static bool nobody_else_holds(const Tensor& grad) {  // than `grads` and the copy of it
    return grad.use_count() <= 2 && grad.is_contiguous() && !at::GradMode::is_enabled();
  }
};

struct AdapterOut : Function<AdapterOut> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& passed, const Tensor& b, double scaling) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({weight, passed, b, held(bias), weight.requires_grad() ? x : Tensor()});
    ctx->saved_data["scaling"] = scaling;
    Tensor out = bias.has_value() ? at::addmm(*bias, rows(x), weight.t()) : at::mm(rows(x), weight.t());
    out.addmm_(rows(passed), b.t(), 1, scaling);
    return like(out, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &weight = saved[0], &passed = saved[1], &b = saved[2], &bias = saved[3];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const Tensor g = rows(grads[0]);
    const size_t at_passed = bias.defined() ? 3 : 2;
    Tensor grad_x, grad_weight, grad_bias, grad_passed, grad_b;
    if (ctx->needs_input_grad(0)) grad_x = like(at::mm(g, weight), grads[0]);
    if (saved[4].defined()) grad_weight = at::mm(g.t(), rows(saved[4]));
    if (bias.defined() && ctx->needs_input_grad(2)) grad_bias = g.sum(0);
    if (ctx->needs_input_grad(at_passed)) grad_passed = like(at::mm(g, b).mul_(scaling), passed);
    if (ctx->needs_input_grad(at_passed + 1)) grad_b = at::mm(rows(passed).t(), g).mul_(scaling).t();
    return {grad_x, grad_weight, grad_bias, grad_passed, grad_b, Tensor()};
  }
};

// ---- rows that read the integer residual, an adapter's part added to the product:
//
//   z = spikes scaled^T + s passed B^T,  then integer_rows.h
//
// It is the function weight x + s normed B^T of x = LN(n + o) and normed = rstd passed, then mixed; so that its gradient
// is theirs, and spikes, scaled, vectors, mean, rstd and passed have none.

struct IntegerRead : Function<IntegerRead> {
  using Rows = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                          const OptionalTensor&, const OptionalTensor&, const OptionalTensor&);
  using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                      const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                      const Tensor&, const Tensor&);

  static variable_list forward(AutogradContext* ctx, const Tensor& spikes, const Tensor& scaled, const Tensor& vectors,
                               const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                               const OptionalTensor& passed, const OptionalTensor& normed, const OptionalTensor& b,
                               double scaling, const OptionalTensor& share, const OptionalTensor& last,
                               const OptionalTensor& mask) {
    static const auto run = find<Rows>("spikegpt_lora::integer_rows");
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor product = at::mm(rows(spikes), scaled.t());
    if (passed.has_value()) product.addmm_(rows(*passed), b->t(), 1, scaling);
    const Tensor z = like(product, spikes);
    const Tensor kept = share.has_value() ? z : Tensor();
    ctx->save_for_backward({x, weight, held(normed), held(b), kept, mean, rstd, vectors, held(share), held(last),
                            held(mask)});
    ctx->saved_data["scaling"] = scaling;
    const auto [out, after] = run.call(z, mean, rstd, vectors, share, last, mask);
    return {out, after};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &normed = saved[2], &b = saved[3], &share = saved[8];
    Tensor grad = grads[0], grad_x, grad_weight, grad_normed, grad_b, grad_share, grad_last;
    if (share.defined()) std::tie(grad, grad_share, grad_last) = unmixed(saved, grads);
    const Tensor g = rows(grad);
    if (ctx->needs_input_grad(3)) grad_x = like(at::mm(g, weight), grad);
    if (ctx->needs_input_grad(4)) grad_weight = at::mm(g.t(), rows(x));
    if (normed.defined()) {  // the places of passed, normed and b are 7, 8 and 9 where they are given
      const double scaling = ctx->saved_data["scaling"].toDouble();
      if (ctx->needs_input_grad(8)) grad_normed = like(at::mm(g, b).mul_(scaling), normed);
      if (ctx->needs_input_grad(9)) grad_b = at::mm(rows(normed).t(), g).mul_(scaling).t();
    }
    variable_list out(14);
    out[3] = grad_x, out[4] = grad_weight, out[8] = grad_normed, out[9] = grad_b;
    out[11] = gradient(grad_share, share), out[12] = gradient(grad_last, saved[9]);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor> unmixed(const variable_list& saved, const variable_list& grads) {
    static const auto run = find<Backward>("spikegpt_lora::integer_rows_backward");
    return run.call(saved[4], saved[5], saved[6], saved[7], saved[8], given(saved[9]), given(saved[10]), grads[0],
                    grads[1]);
  }
};

std::tuple<Tensor, Tensor> integer_read(const Tensor& spikes, const Tensor& scaled, const Tensor& vectors,
                                        const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                        const OptionalTensor& passed, const OptionalTensor& normed,
                                        const OptionalTensor& b, double scaling, const OptionalTensor& share,
                                        const OptionalTensor& last, const OptionalTensor& mask) {
  const variable_list out = IntegerRead::apply(spikes, scaled, vectors, x, weight, mean, rstd, passed, normed, b,
                                               scaling, share, last, mask);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> adapter_in(const Tensor& x, const Tensor& a) {
  const variable_list out = AdapterIn::apply(x, a);
  return {out[0], x.requires_grad() ? out[1] : x};  // the layer asks for no gradient that nobody needs
}

}  // namespace
}  // namespace spikegpt

TORCH_LIBRARY_IMPL(spikegpt_lora, Autograd, library) {
  using namespace spikegpt;
  library.impl("wkv", &wkv);
  library.impl("lif", &Lif::alone);
  library.impl("lif_add", &Lif::added);
  library.impl("token_shift2", &Shift<Tensor, Tensor>::run);
  library.impl("token_shift3", &Shift<Tensor, Tensor, Tensor>::run);
  library.impl("sigmoid_gate", [](const Tensor& r, const Tensor& y) { return SigmoidGate::apply(r, y); });
  library.impl("squared_relu", [](const Tensor& k) { return SquaredRelu::apply(k); });
  library.impl("dropout", [](const Tensor& x, const Tensor& seed, double p) { return Dropout::apply(x, seed, p); });
  library.impl("integer_spikes", [](const Tensor& x, const Tensor& log_scale, const Tensor& most, bool has_sign,
                                    bool squares) { return IntegerSpikes::apply(x, log_scale, most, has_sign, squares); });
  for (const char* name : {"wkv_backward", "lif_backward", "token_shift2_backward", "token_shift3_backward",
                           "sigmoid_gate_backward", "squared_relu_backward", "integer_spikes_backward",
                           "integer_rows", "integer_rows_backward"}) {
    library.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(spikegpt_lora, CompositeImplicitAutograd, library) {
  using namespace spikegpt;
  library.impl("adapter_in", &adapter_in);
  library.impl("adapter_out", [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                 const Tensor& passed, const Tensor& b, double scaling) {
    return AdapterOut::apply(x, weight, bias, passed, b, scaling);
  });
  library.impl("integer_read", &integer_read);
}
