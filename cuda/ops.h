// The operators of this extension for any device: arguments checked, results allocated, kernels started. `Device` says
// how: ops.cpp has the CPU's, ops_cuda.cu CUDA's.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <sstream>
#include <tuple>

#include "activations.h"
#include "dropout.h"
#include "integer_rows.h"
#include "integer_spikes.h"
#include "lif.h"
#include "packed_linear.h"
#include "token_shift.h"
#include "wkv.h"

namespace spikegpt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- what an argument must be before its memory is read; a violation becomes a Python ValueError that names it

inline std::string as_tuple(at::IntArrayRef shape) {
  std::ostringstream text;
  for (size_t i = 0; i < shape.size(); i++) text << (i ? ", " : "(") << shape[i];
  text << (shape.empty() ? "()" : shape.size() == 1 ? ",)" : ")");
  return text.str();
}

inline void check_sequence(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) > 0, name, " must be (B, T, C) with T >= 1, got ", as_tuple(x.sizes()));
  TORCH_CHECK_VALUE(at::isFloatingType(x.scalar_type()), name, " must be floating point, got ", x.scalar_type());
}

inline void check(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype,
                  const Tensor& input) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must be ", as_tuple(shape), " for input ",
                    as_tuple(input.sizes()), ", got ", as_tuple(tensor.sizes()));
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " must be ", dtype, " for ", input.scalar_type(),
                    " input, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == input.device(), name, " must be on ", input.device(), ", got ", tensor.device());
}

inline void check(const char* name, const OptionalTensor& tensor, at::IntArrayRef shape, at::ScalarType dtype,
                  const Tensor& input) {
  if (tensor.has_value()) check(name, *tensor, shape, dtype, input);
}

// ---- small helpers

// States, and what half precision is computed in: float32; float64 for float64.
inline at::ScalarType state_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : tensor;
}

template <class T>
const T* pointer(const OptionalTensor& tensor) {  // null where there is no tensor
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

inline Tensor new_state(const Tensor& x, at::IntArrayRef shape) {
  return at::empty(shape, x.options().dtype(state_dtype(x)));
}

#define DISPATCH(TENSOR, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TENSOR.scalar_type(), NAME, [&] { \
    using real = at::opmath_type<scalar_t>; \
    __VA_ARGS__ \
  })

// `run(product())` with the type of `dtype`, which is x's own, or under autocast a half-precision one for float32.
template <class scalar, class Run>
void dispatch_product(const char* name, at::ScalarType dtype, const Run& run) {
  if (dtype == c10::CppTypeToScalarType<scalar>::value) return run(scalar());
  if constexpr (std::is_same_v<scalar, float>) {
    if (dtype == at::kBFloat16) return run(at::BFloat16());
    if (dtype == at::kHalf) return run(at::Half());
  }
  TORCH_CHECK_VALUE(false, name, " must be the input's dtype, or half precision for float32, got ", dtype);
}

// `run(stream())` with the type of `dtype`: the neurons' own, or what half precision is computed in.
template <class scalar, class real, class Run>
void dispatch_stream(const char* name, at::ScalarType dtype, const Run& run) {
  if (dtype == c10::CppTypeToScalarType<scalar>::value) return run(scalar());
  if constexpr (!std::is_same_v<scalar, real>) {
    if (dtype == c10::CppTypeToScalarType<real>::value) return run(real());
  }
  TORCH_CHECK_VALUE(false, name, " must be the neurons' dtype or that of their membrane, got ", dtype);
}

// ---- WKV

struct WkvArguments {  // contiguous, checked
  Tensor w, u, k, v;
  OptionalTensor state, mask;

  WkvArguments(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const OptionalTensor& state,
               const OptionalTensor& mask) {
    check_sequence("wkv: k", k);
    const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
    check("wkv: time_decay", w, {C}, state_dtype(k), k);
    check("wkv: time_first", u, {C}, state_dtype(k), k);
    check("wkv: v", v, {B, T, C}, k.scalar_type(), k);
    check("wkv: state", state, {B, 3, C}, state_dtype(k), k);
    check("wkv: mask", mask, {B, T}, at::kBool, k);
    this->w = w.contiguous(), this->u = u.contiguous(), this->k = k.contiguous(), this->v = v.contiguous();
    this->state = contiguous(state), this->mask = contiguous(mask);
  }

  template <class scalar, class real>
  WkvInput<scalar, real> input() const {
    return {{k.size(1), k.size(2), pointer<bool>(mask)}, w.const_data_ptr<real>(), u.const_data_ptr<real>(),
            k.const_data_ptr<scalar>(), v.const_data_ptr<scalar>(), pointer<real>(state)};
  }
};

template <class Device>
std::tuple<Tensor, Tensor> wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                               const OptionalTensor& state, const OptionalTensor& mask) {
  const WkvArguments arguments(w, u, k, v, state, mask);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  Tensor y = at::empty({B, T, C}, k.options()), state_after = new_state(k, {B, 3, C});
  DISPATCH(k, "wkv", {
    Device::template run<real>(B, T, C, k, WkvForward<scalar_t, real>{
        arguments.input<scalar_t, real>(), y.mutable_data_ptr<scalar_t>(), state_after.mutable_data_ptr<real>()});
  });
  return {y, state_after};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv_backward(
    const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const OptionalTensor& state,
    const OptionalTensor& mask, const Tensor& grad_y, const Tensor& grad_state_after) {
  const WkvArguments arguments(w, u, k, v, state, mask);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2);
  check("wkv: gradient of y", grad_y, {B, T, C}, k.scalar_type(), k);
  check("wkv: gradient of state", grad_state_after, {B, 3, C}, state_dtype(k), k);
  const Tensor gy = grad_y.contiguous(), gs = grad_state_after.contiguous();
  Tensor grad_w = new_state(k, {B, C}), grad_u = new_state(k, {B, C}), grad_state = new_state(k, {B, 3, C});
  Tensor grad_k = at::empty({B, T, C}, k.options()), grad_v = at::empty({B, T, C}, k.options());
  DISPATCH(k, "wkv_backward", {
    using Kernel = WkvBackward<scalar_t, real>;
    Device::template run<real>(B, T, C, k, Kernel{
        arguments.input<scalar_t, real>(), gy.const_data_ptr<scalar_t>(), gs.const_data_ptr<real>(),
        grad_w.mutable_data_ptr<real>(), grad_u.mutable_data_ptr<real>(), grad_k.mutable_data_ptr<scalar_t>(),
        grad_v.mutable_data_ptr<scalar_t>(), grad_state.mutable_data_ptr<real>()}, Kernel::scratch(T));
  });
  return {grad_w.sum(0), grad_u.sum(0), grad_k, grad_v, grad_state};
}

// ---- LIF

// A neuron's settings, in the order of the schemas.
struct LifSettings {
  double tau, v_threshold;
  std::optional<double> v_reset;
  bool decay_input;
  double surrogate_alpha;
  bool detach_reset;

  template <class real>
  LifNeuron<real> neuron() const {
    return {real(tau), real(v_threshold), real(v_reset.value_or(0.0)), real(surrogate_alpha),
            decay_input, !v_reset.has_value(), detach_reset};
  }
};

struct LifArguments {
  Tensor x;
  OptionalTensor membrane, mask;
  LifSettings settings;

  LifArguments(const Tensor& x, const OptionalTensor& membrane, const OptionalTensor& mask,
               const LifSettings& settings)
      : settings(settings) {
    check_sequence("LIF input", x);
    check("LIF membrane", membrane, {x.size(0), x.size(2)}, state_dtype(x), x);
    check("LIF mask", mask, {x.size(0), x.size(1)}, at::kBool, x);
    this->x = x.contiguous(), this->membrane = contiguous(membrane), this->mask = contiguous(mask);
  }

  template <class scalar, class real>
  LifInput<scalar, real> input() const {
    return {{x.size(1), x.size(2), pointer<bool>(mask)}, settings.neuron<real>(), x.const_data_ptr<scalar>(),
            pointer<real>(membrane)};
  }
};

template <class real>
DropoutMask<real> dropout_mask(const OptionalTensor& seed, double p, const Tensor& x) {
  check("dropout: seed", seed, {1}, at::kLong, x);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "dropout: p must be at least 0 and less than 1, got ", p);
  return {pointer<int64_t>(seed), static_cast<uint32_t>(p * 4294967296.0), static_cast<real>(1 / (1 - p))};
}

// Operators take the settings one by one: `Settings` are the types of LifSettings' members.
template <class Device, class... Settings>
struct LifOperators {
  template <class scalar, class real, class Output>
  static Tensor run(const LifArguments& arguments, const Output& output) {
    const Tensor& x = arguments.x;
    Tensor membrane_after = new_state(x, {x.size(0), x.size(2)});
    Device::template run<real>(x.size(0), x.size(1), x.size(2), x, LifForward<scalar, real, Output>{
        arguments.input<scalar, real>(), output, membrane_after.mutable_data_ptr<real>()});
    return membrane_after;
  }

  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& membrane, const OptionalTensor& mask,
                                            Settings... settings) {
    const LifArguments arguments(x, membrane, mask, {settings...});
    Tensor spikes = at::empty(x.sizes(), x.options()), membrane_after;
    DISPATCH(x, "lif", {
      membrane_after = run<scalar_t, real>(arguments, SpikesAlone<scalar_t>{spikes.mutable_data_ptr<scalar_t>()});
    });
    return {spikes, membrane_after};
  }

  // Spikes added to the residual stream, some numbers of the sum dropped where there is a seed.
  static std::tuple<Tensor, Tensor> add(const Tensor& residual, const Tensor& x, const OptionalTensor& membrane,
                                        const OptionalTensor& mask, Settings... settings, const OptionalTensor& seed,
                                        double p) {
    const LifArguments arguments(x, membrane, mask, {settings...});
    check("LIF: residual", residual, x.sizes(), residual.scalar_type(), x);
    const Tensor stream = residual.contiguous();
    Tensor out = at::empty(x.sizes(), residual.options()), membrane_after;
    DISPATCH(x, "lif_add", {
      const DropoutMask<real> dropped = dropout_mask<real>(seed, p, x);
      dispatch_stream<scalar_t, real>("LIF: residual", residual.scalar_type(), [&](auto zero) {
        using type = decltype(zero);
        membrane_after = run<scalar_t, real>(arguments, SpikesAdded<type, real>{
            stream.const_data_ptr<type>(), out.template mutable_data_ptr<type>(), dropped});
      });
    });
    return {out, membrane_after};
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& x, const OptionalTensor& membrane,
                                             const OptionalTensor& mask, Settings... settings,
                                             const Tensor& grad_spikes, const Tensor& grad_membrane_after) {
    const LifArguments arguments(x, membrane, mask, {settings...});
    const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
    check("LIF: gradient of spikes", grad_spikes, {B, T, C}, grad_spikes.scalar_type(), x);
    check("LIF: gradient of membrane", grad_membrane_after, {B, C}, state_dtype(x), x);
    const Tensor gs = grad_spikes.contiguous(), gm = grad_membrane_after.contiguous();
    Tensor grad_x = at::empty({B, T, C}, x.options()), grad_membrane = new_state(x, {B, C});
    DISPATCH(x, "lif_backward", {
      dispatch_stream<scalar_t, real>("LIF: gradient of spikes", gs.scalar_type(), [&](auto zero) {
        using type = decltype(zero);
        using Kernel = LifBackward<scalar_t, real, type>;
        Device::template run<real>(B, T, C, x, Kernel{
            arguments.input<scalar_t, real>(), gs.const_data_ptr<type>(), gm.const_data_ptr<real>(),
            grad_x.template mutable_data_ptr<scalar_t>(), grad_membrane.template mutable_data_ptr<real>()},
            Kernel::scratch(T));
      });
    });
    return {grad_x, grad_membrane};
  }
};

template <class Device>
using Lif = LifOperators<Device, double, double, std::optional<double>, bool, double, bool>;

// ---- token shift, for two or three linear layers, with LayerNorm before it where gain and bias are given

struct NormArguments {  // of a LayerNorm over C; without gain there is none
  OptionalTensor gain, bias;
  Tensor mean, rstd;  // (B, T); (0,) without

  NormArguments(const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, const Tensor& mean,
                const Tensor& rstd)
      : gain(contiguous(gain)), bias(contiguous(bias)), mean(mean.contiguous()), rstd(rstd.contiguous()) {
    TORCH_CHECK_VALUE(gain.has_value() == bias.has_value(), "token shift: gain and bias must be given together");
    check("token shift: gain", gain, {x.size(2)}, state_dtype(x), x);
    check("token shift: bias", bias, {x.size(2)}, state_dtype(x), x);
    if (!gain.has_value()) return;
    check("token shift: mean", mean, {x.size(0), x.size(1)}, state_dtype(x), x);
    check("token shift: rstd", rstd, {x.size(0), x.size(1)}, state_dtype(x), x);
  }

  template <class real>
  Norm<real> norm() const {
    if (!gain.has_value()) return {nullptr, nullptr, nullptr, nullptr};
    return {mean.const_data_ptr<real>(), rstd.const_data_ptr<real>(), pointer<real>(gain), pointer<real>(bias)};
  }
};

template <int N>
struct ShiftArguments {
  Tensor x, shares[N];
  OptionalTensor last, mask;
  NormArguments norm;

  ShiftArguments(const Tensor& x, const OptionalTensor& last, const OptionalTensor& mask, const NormArguments& norm,
                 const std::array<Tensor, N>& shares)
      : norm(norm) {
    check("token shift: last", last, {x.size(0), x.size(2)}, x.scalar_type(), x);
    check("token shift: mask", mask, {x.size(0), x.size(1)}, at::kBool, x);
    this->x = x.contiguous(), this->last = contiguous(last), this->mask = contiguous(mask);
    for (int j = 0; j < N; j++) {
      check("token shift: share", shares[j], {x.size(2)}, state_dtype(x), x);
      this->shares[j] = shares[j].contiguous();
    }
  }

  template <class scalar, class real>
  ShiftInput<scalar, real, N> input() const {
    ShiftInput<scalar, real, N> in = {{x.size(1), x.size(2), pointer<bool>(mask)},
                                      x.const_data_ptr<scalar>(), pointer<scalar>(last), norm.norm<real>(), {}};
    for (int j = 0; j < N; j++) in.share[j] = shares[j].template const_data_ptr<real>();
    return in;
  }
};

template <int N>
struct Shifted {
  std::array<Tensor, N> mixed;  // in `dtype`
  Tensor last, mean, rstd;      // what is mixed of the last real token; of the LayerNorm
};

template <class Device, int N>
Shifted<N> shift(const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, double eps,
                 const OptionalTensor& last, const OptionalTensor& mask, const std::array<Tensor, N>& shares,
                 std::optional<at::ScalarType> dtype) {
  check_sequence("token shift: x", x);
  Shifted<N> out;
  std::tie(out.mean, out.rstd) = gain.has_value()
      ? Device::moments(x.contiguous(), eps) : std::make_tuple(new_state(x, {0}), new_state(x, {0}));
  const ShiftArguments<N> arguments(x, last, mask, {x, gain, bias, out.mean, out.rstd}, shares);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  const at::ScalarType product = dtype.value_or(x.scalar_type());
  for (Tensor& tensor : out.mixed) tensor = at::empty({B, T, C}, x.options().dtype(product));
  out.last = at::empty({B, C}, x.options());
  DISPATCH(x, "token_shift", {
    dispatch_product<scalar_t>("token shift: dtype", product, [&](auto zero) {
      using type = decltype(zero);
      ShiftForward<scalar_t, real, N, type> kernel = {
          arguments.template input<scalar_t, real>(), {}, out.last.template mutable_data_ptr<scalar_t>()};
      for (int j = 0; j < N; j++) kernel.mixed[j] = out.mixed[j].template mutable_data_ptr<type>();
      Device::template run<real>(B, T, C, x, kernel);
    });
  });
  return out;
}

// Gradients of what is mixed (B, T, C), of last, and of the shares (N, C), for which `share_gradients` asks; else they
// are 0.
template <class Device, int N>
std::tuple<Tensor, Tensor, Tensor> shift_backward(const Tensor& x, const NormArguments& norm,
                                                  const OptionalTensor& last, const OptionalTensor& mask,
                                                  const std::array<Tensor, N>& shares, std::array<Tensor, N> grads,
                                                  const Tensor& grad_last_after, bool share_gradients) {
  check_sequence("token shift: x", x);
  const ShiftArguments<N> arguments(x, last, mask, norm, shares);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  const at::ScalarType product = grads[0].scalar_type();
  for (Tensor& grad : grads) {
    check("token shift: gradient of a mix", grad, {B, T, C}, product, x);
    grad = grad.contiguous();
  }
  check("token shift: gradient of last", grad_last_after, {B, C}, x.scalar_type(), x);
  const Tensor gl = grad_last_after.contiguous();
  Tensor grad_x = at::empty({B, T, C}, x.options()), grad_last = at::empty({B, C}, x.options());
  Tensor grad_share = new_state(x, {share_gradients ? B : 0, N, C});
  DISPATCH(x, "token_shift_backward", {
    dispatch_product<scalar_t>("token shift: gradient of a mix", product, [&](auto zero) {
      using type = decltype(zero);
      ShiftBackward<scalar_t, real, N, type> kernel = {
          arguments.template input<scalar_t, real>(), {}, gl.const_data_ptr<scalar_t>(),
          grad_x.template mutable_data_ptr<scalar_t>(), grad_last.template mutable_data_ptr<scalar_t>(),
          share_gradients ? grad_share.template mutable_data_ptr<real>() : nullptr};
      for (int j = 0; j < N; j++) kernel.grad_mixed[j] = grads[j].template const_data_ptr<type>();
      Device::template run<real>(B, T, C, x, kernel);
    });
  });
  return {grad_x, grad_last, grad_share.sum(0)};
}

using at::ScalarType;

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_shift2(
    const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, double eps, const OptionalTensor& last,
    const OptionalTensor& mask, const Tensor& a, const Tensor& b, std::optional<ScalarType> dtype) {
  const Shifted<2> out = shift<Device, 2>(x, gain, bias, eps, last, mask, {a, b}, dtype);
  return {out.mixed[0], out.mixed[1], out.last, out.mean, out.rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_shift3(
    const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, double eps, const OptionalTensor& last,
    const OptionalTensor& mask, const Tensor& a, const Tensor& b, const Tensor& c, std::optional<ScalarType> dtype) {
  const Shifted<3> out = shift<Device, 3>(x, gain, bias, eps, last, mask, {a, b, c}, dtype);
  return {out.mixed[0], out.mixed[1], out.mixed[2], out.last, out.mean, out.rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_shift2_backward(
    const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& last, const OptionalTensor& mask, const Tensor& a, const Tensor& b, const Tensor& grad_a,
    const Tensor& grad_b, const Tensor& grad_last, bool share_gradients) {
  return shift_backward<Device, 2>(x, {x, gain, bias, mean, rstd}, last, mask, {a, b}, {grad_a, grad_b}, grad_last,
                                   share_gradients);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_shift3_backward(
    const Tensor& x, const OptionalTensor& gain, const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& last, const OptionalTensor& mask, const Tensor& a, const Tensor& b, const Tensor& c,
    const Tensor& grad_a, const Tensor& grad_b, const Tensor& grad_c, const Tensor& grad_last, bool share_gradients) {
  return shift_backward<Device, 3>(x, {x, gain, bias, mean, rstd}, last, mask, {a, b, c}, {grad_a, grad_b, grad_c},
                                   grad_last, share_gradients);
}

// ---- activations: any shape, number by number

template <class Device>
Tensor sigmoid_gate(const Tensor& r, const Tensor& y) {
  check("sigmoid_gate: y", y, r.sizes(), r.scalar_type(), r);
  const Tensor r_ = r.contiguous(), y_ = y.contiguous();
  Tensor out = at::empty(r.sizes(), r.options());
  DISPATCH(r, "sigmoid_gate", {
    Device::template run<real>(1, 1, r.numel(), r, SigmoidGateForward<scalar_t, real>{
        r_.const_data_ptr<scalar_t>(), y_.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>()});
  });
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor& r, const Tensor& y, const Tensor& grad) {
  check("sigmoid_gate: y", y, r.sizes(), r.scalar_type(), r);
  check("sigmoid_gate: gradient", grad, r.sizes(), r.scalar_type(), r);
  const Tensor r_ = r.contiguous(), y_ = y.contiguous(), g = grad.contiguous();
  Tensor grad_r = at::empty(r.sizes(), r.options()), grad_y = at::empty(r.sizes(), r.options());
  DISPATCH(r, "sigmoid_gate_backward", {
    Device::template run<real>(1, 1, r.numel(), r, SigmoidGateBackward<scalar_t, real>{
        r_.const_data_ptr<scalar_t>(), y_.const_data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(),
        grad_r.mutable_data_ptr<scalar_t>(), grad_y.mutable_data_ptr<scalar_t>()});
  });
  return {grad_r, grad_y};
}

template <class Device>
Tensor squared_relu(const Tensor& k) {
  const Tensor k_ = k.contiguous();
  Tensor out = at::empty(k.sizes(), k.options());
  DISPATCH(k, "squared_relu", {
    Device::template run<real>(1, 1, k.numel(), k, SquaredReluForward<scalar_t, real>{
        k_.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>()});
  });
  return out;
}

template <class Device>
Tensor squared_relu_backward(const Tensor& k, const Tensor& grad) {
  check("squared_relu: gradient", grad, k.sizes(), k.scalar_type(), k);
  const Tensor k_ = k.contiguous(), g = grad.contiguous();
  Tensor grad_k = at::empty(k.sizes(), k.options());
  DISPATCH(k, "squared_relu_backward", {
    Device::template run<real>(1, 1, k.numel(), k, SquaredReluBackward<scalar_t, real>{
        k_.const_data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(), grad_k.mutable_data_ptr<scalar_t>()});
  });
  return grad_k;
}

// ---- integer spikes: x (..., C)

struct FireArguments {
  Tensor x, scale, most;
  bool has_sign, squares;
  int64_t B, T;  // x as (B, T, C)

  FireArguments(const Tensor& x, const Tensor& log_scale, const Tensor& most, bool has_sign, bool squares)
      : has_sign(has_sign), squares(squares) {
    TORCH_CHECK_VALUE(x.dim() > 0, "integer_spikes: x must be (..., C), got ()");
    check("integer_spikes: log_scale", log_scale, {x.size(-1)}, state_dtype(x), x);
    check("integer_spikes: most", most, {x.size(-1)}, state_dtype(x), x);
    this->x = x.contiguous(), scale = log_scale.contiguous().exp(), this->most = most.contiguous();
    T = x.dim() > 1 ? x.size(-2) : 1;
    B = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1) / std::max<int64_t>(T, 1);
  }

  template <class scalar, class real>
  FireInput<scalar, real> input() const {
    return {{T, x.size(-1), nullptr}, x.const_data_ptr<scalar>(), scale.const_data_ptr<real>(),
            most.const_data_ptr<real>(), has_sign, squares};
  }
};

template <class Device>
Tensor integer_spikes(const Tensor& x, const Tensor& log_scale, const Tensor& most, bool has_sign, bool squares) {
  const FireArguments arguments(x, log_scale, most, has_sign, squares);
  Tensor spikes = at::empty(x.sizes(), x.options());
  DISPATCH(x, "integer_spikes", {
    Device::template run<real>(arguments.B, arguments.T, x.size(-1), x, FireForward<scalar_t, real>{
        arguments.input<scalar_t, real>(), spikes.mutable_data_ptr<scalar_t>()});
  });
  return spikes;
}

template <class Device>
std::tuple<Tensor, Tensor> integer_spikes_backward(const Tensor& x, const Tensor& log_scale, const Tensor& most,
                                                   bool has_sign, bool squares, const Tensor& grad) {
  const FireArguments arguments(x, log_scale, most, has_sign, squares);
  check("integer_spikes: gradient", grad, x.sizes(), x.scalar_type(), x);
  const Tensor g = grad.contiguous();
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_log_scale = new_state(x, {arguments.B, x.size(-1)});
  DISPATCH(x, "integer_spikes_backward", {
    Device::template run<real>(arguments.B, arguments.T, x.size(-1), x, FireBackward<scalar_t, real>{
        arguments.input<scalar_t, real>(), g.const_data_ptr<scalar_t>(), grad_x.mutable_data_ptr<scalar_t>(),
        grad_log_scale.mutable_data_ptr<real>()});
  });
  return {grad_x, grad_log_scale.sum(0)};
}

// ---- rows that read the integer residual, after the product

struct RowsArguments {
  Tensor z, mean, rstd, vectors;
  OptionalTensor share, last, mask;

  RowsArguments(const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& vectors,
                const OptionalTensor& share, const OptionalTensor& last, const OptionalTensor& mask) {
    check_sequence("integer_rows: z", z);
    const int64_t B = z.size(0), T = z.size(1), R = z.size(2);
    check("integer_rows: mean", mean, {B, T}, state_dtype(z), z);
    check("integer_rows: rstd", rstd, {B, T}, state_dtype(z), z);
    check("integer_rows: vectors", vectors, {3, R}, state_dtype(z), z);
    check("integer_rows: share", share, {R}, state_dtype(z), z);
    check("integer_rows: last", last, {B, R}, state_dtype(z), z);
    check("integer_rows: mask", mask, {B, T}, at::kBool, z);
    TORCH_CHECK_VALUE(share.has_value() || !(last.has_value() || mask.has_value()),
                      "integer_rows: last and mask are the token shift's: give them together with share");
    this->z = z.contiguous(), this->mean = mean.contiguous(), this->rstd = rstd.contiguous();
    this->vectors = vectors.contiguous(), this->share = contiguous(share), this->last = contiguous(last);
    this->mask = contiguous(mask);
  }

  template <class scalar, class real>
  RowsInput<scalar, real> input() const {
    return {{z.size(1), z.size(2), pointer<bool>(mask)}, z.const_data_ptr<scalar>(), mean.const_data_ptr<real>(),
            rstd.const_data_ptr<real>(), vectors.const_data_ptr<real>(), pointer<real>(share), pointer<real>(last)};
  }
};

template <class Device>
std::tuple<Tensor, Tensor> integer_rows(const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& vectors,
                                        const OptionalTensor& share, const OptionalTensor& last,
                                        const OptionalTensor& mask) {
  const RowsArguments arguments(z, mean, rstd, vectors, share, last, mask);
  const int64_t B = z.size(0), T = z.size(1), R = z.size(2);
  Tensor out = at::empty({B, T, R}, z.options()), last_after = new_state(z, {share.has_value() ? B : 0, R});
  DISPATCH(z, "integer_rows", {
    Device::template run<real>(B, T, R, z, RowsForward<scalar_t, real>{
        arguments.input<scalar_t, real>(), out.mutable_data_ptr<scalar_t>(), last_after.mutable_data_ptr<real>()});
  });
  return {out, last_after};
}

// Gradients of y (B, T, R), before it is mixed, of the shares and of last.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> integer_rows_backward(const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                                         const Tensor& vectors, const Tensor& share,
                                                         const OptionalTensor& last, const OptionalTensor& mask,
                                                         const Tensor& grad_out, const Tensor& grad_last_after) {
  const RowsArguments arguments(z, mean, rstd, vectors, share, last, mask);
  const int64_t B = z.size(0), T = z.size(1), R = z.size(2);
  check("integer_rows: gradient", grad_out, {B, T, R}, z.scalar_type(), z);
  check("integer_rows: gradient of last", grad_last_after, {B, R}, state_dtype(z), z);
  const Tensor go = grad_out.contiguous(), gl = grad_last_after.contiguous();
  Tensor grad_y = at::empty({B, T, R}, z.options()), grad_share = new_state(z, {B, R}), grad_last = new_state(z, {B, R});
  DISPATCH(z, "integer_rows_backward", {
    Device::template run<real>(B, T, R, z, RowsBackward<scalar_t, real>{
        arguments.input<scalar_t, real>(), go.const_data_ptr<scalar_t>(), gl.const_data_ptr<real>(),
        grad_y.mutable_data_ptr<scalar_t>(), grad_share.mutable_data_ptr<real>(), grad_last.mutable_data_ptr<real>()});
  });
  return {grad_y, grad_share.sum(0), grad_last};
}

// ---- dropout; its gradient is itself, with the same seed

template <class Device>
Tensor dropout(const Tensor& x, const Tensor& seed, double p) {
  const Tensor x_ = x.contiguous(), seed_ = seed.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  DISPATCH(x, "dropout", {
    Device::template run<real>(1, 1, x.numel(), x, Dropout<scalar_t, real>{
        x_.const_data_ptr<scalar_t>(), dropout_mask<real>(seed_, p, x), out.mutable_data_ptr<scalar_t>()});
  });
  return out;
}

// ---- matrices held in few bytes: the CPU's alone

template <class Device>
Tensor packed_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& scale) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "packed_linear: x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2, "packed_linear: weight must be (outputs, inputs), got ",
                    as_tuple(weight.sizes()));
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == inputs, "packed_linear: x must be (..., ", inputs, "), got ",
                    as_tuple(x.sizes()));
  check("packed_linear: weight", weight, weight.sizes(), weight.scalar_type(), x);
  check("packed_linear: scale", scale, {outputs}, at::kFloat, x);
  const Tensor x_ = x.contiguous(), weight_ = weight.contiguous();
  const OptionalTensor scale_ = contiguous(scale);
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor y = at::empty(shape, x.options());
  const int64_t rows = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  const auto run = [&](const auto* held) {
    Device::template run<float>(1, inputs, outputs, x, PackedLinear<std::decay_t<decltype(*held)>>{
        x_.const_data_ptr<float>(), held, pointer<float>(scale_), y.mutable_data_ptr<float>(), rows, inputs, outputs});
  };
  switch (weight.scalar_type()) {
    case at::kFloat: run(weight_.const_data_ptr<float>()); break;
    case at::kChar: run(weight_.const_data_ptr<int8_t>()); break;
    case at::kBFloat16: run(static_cast<const BFloat16Bits*>(weight_.const_data_ptr())); break;
    default:
      TORCH_CHECK_VALUE(false, "packed_linear: weight must be float32, bfloat16 or int8, got ", weight.scalar_type());
  }
  return y;
}

// ---- a whole block for few rows, so that Python is asked once: Block.forward of spikegpt_lora/model.py, in its order

template <class Device, class... Settings>
struct BlockSteps {
  // state: the five tensors of a layer of SpikeGPTState. vectors: weight and bias of ln1 and of ln2, time_decay and
  // time_first. shares: of att's key, value, receptance, of ffn's key, receptance. matrices, scales: of att's key, value,
  // receptance, output, of ffn's key, receptance, value. Returns x and the five new tensors.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run(
      const Tensor& x, at::TensorList state, at::TensorList vectors, at::TensorList shares, at::TensorList matrices,
      const c10::List<OptionalTensor>& scales, double eps, Settings... settings) {
    const bool complete = state.size() == 5 && vectors.size() == 6 && shares.size() == 5 && matrices.size() == 7;
    TORCH_CHECK_VALUE(complete && scales.size() == 7, "block_step takes 5 states, 6 vectors, 5 shares, 7 matrices and 7 "
                      "scales, got ", state.size(), ", ", vectors.size(), ", ", shares.size(), ", ", matrices.size(),
                      ", ", scales.size());
    using Lif = LifOperators<Device, Settings...>;
    const auto held = [&](int i) { return state[i].to(at::kFloat); };
    const auto vector = [&](int i) { return vectors[i].to(at::kFloat); };
    const auto share = [&](int i) { return shares[i].reshape(-1).to(at::kFloat); };
    const auto times = [&](const Tensor& from, int i) { return packed_linear<Device>(from, matrices[i], scales[i]); };

    const Shifted<3> att =
        shift<Device, 3>(x, vector(0), vector(1), eps, held(0), {}, {share(0), share(1), share(2)}, {});
    const Tensor k = times(att.mixed[0], 0), v = times(att.mixed[1], 1), r = times(att.mixed[2], 2);
    const auto [y, wkv_state] = wkv<Device>(vector(4).exp().neg_(), vector(5), k, v, held(1), {});
    const Tensor mixed_time = times(sigmoid_gate<Device>(r, y), 3);
    const auto [between, att_membrane] = Lif::add(x, mixed_time, held(2), {}, settings..., {}, 0.0);

    const Shifted<2> ffn = shift<Device, 2>(between, vector(2), vector(3), eps, held(3), {}, {share(3), share(4)}, {});
    const Tensor middle = times(squared_relu<Device>(times(ffn.mixed[0], 4)), 6);
    const Tensor mixed_channels = sigmoid_gate<Device>(times(ffn.mixed[1], 5), middle);
    const auto [after, ffn_membrane] = Lif::add(between, mixed_channels, held(4), {}, settings..., {}, 0.0);
    return {after, att.last, wkv_state, att_membrane, ffn.last, ffn_membrane};
  }
};

template <class Device>
using BlockStep = BlockSteps<Device, double, double, std::optional<double>, bool, double, bool>;

// The same of a block whose matrices read integers.
template <class Device, class... Settings>
struct IntegerBlockSteps {
  // state: as above. norms: weight, bias, offset and centre of ln1, then of ln2. time: time_decay and time_first.
  // matrices, each times its scale: att's key, value, receptance, ffn's key, receptance, att's output, ffn's value.
  // shares and vectors (3, R): of the first five; without vectors their channels are mixed, not their rows. neurons:
  // log_scale and most of those before att's output and ffn's value, and without vectors of those before the first five.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run(
      const Tensor& x, at::TensorList state, at::TensorList norms, at::TensorList time, at::TensorList shares,
      at::TensorList matrices, at::TensorList vectors, at::TensorList neurons, double eps, Settings... settings) {
    const bool rows = vectors.size() == 5, fits = rows ? neurons.size() == 4 : vectors.empty() && neurons.size() == 14;
    const bool complete = state.size() == 5 && norms.size() == 8 && time.size() == 2 && shares.size() == 5;
    TORCH_CHECK_VALUE(complete && matrices.size() == 7 && fits, "integer_block_step takes 5 states, 8 of norms, 2 of time,"
                      " 5 shares, 7 matrices, and 5 vectors with 4 of neurons or none with 14, got ", state.size(), ", ",
                      norms.size(), ", ", time.size(), ", ", shares.size(), ", ", matrices.size(), ", ", vectors.size(),
                      ", ", neurons.size());
    using Lif = LifOperators<Device, Settings...>;
    const auto held = [&](int i) { return state[i].to(at::kFloat); };
    const auto norm = [&](int i) { return norms[i].to(at::kFloat); };
    const auto share = [&](int i) { return shares[i].reshape(-1).to(at::kFloat); };
    const auto times = [&](const Tensor& from, int i) { return packed_linear<Device>(from, matrices[i], {}); };
    const auto fire = [&](const Tensor& from, int i, bool squares) {
      return integer_spikes<Device>(from, neurons[2 * i].to(at::kFloat), neurons[2 * i + 1].to(at::kFloat),
                                    i != 1, squares);
    };

    // What the N matrices from the `first` on give for a norm of n; and the new shift.
    const auto read = [&]<int N>(const Tensor& n, int of_norm, int first, const Tensor& last) {
      std::array<Tensor, N + 1> out;
      const Tensor stream = n.add(norm(of_norm + 2));
      if (!rows) {
        std::array<Tensor, N> mixes;
        for (int j = 0; j < N; j++) mixes[j] = share(first + j);
        const Shifted<N> shifted =
            shift<Device, N>(stream, norm(of_norm), norm(of_norm + 1), eps, last, {}, mixes, {});
        for (int j = 0; j < N; j++) out[j] = times(fire(shifted.mixed[j], 2 + first + j, false), first + j);
        out[N] = shifted.last;
        return out;
      }
      const auto [mean, rstd] = Device::moments(stream.contiguous(), eps);
      const Tensor spikes = n.sub(norm(of_norm + 3));
      std::vector<Tensor> lasts(N);
      int64_t row = 0;
      for (int j = 0; j < N; j++) {
        const int64_t R = matrices[first + j].size(0);
        std::tie(out[j], lasts[j]) =
            integer_rows<Device>(times(spikes, first + j), mean, rstd, vectors[first + j], share(first + j),
                                 last.narrow(1, row, R), {});
        row += R;
      }
      out[N] = at::cat(lasts, 1);
      return out;
    };

    const auto [k, v, r, att_shift] = read.template operator()<3>(x, 0, 0, held(0));
    const auto [y, wkv_state] =
        wkv<Device>(time[0].to(at::kFloat).exp().neg_(), time[1].to(at::kFloat), k, v, held(1), {});
    const Tensor mixed_time = times(fire(sigmoid_gate<Device>(r, y), 0, false), 5);
    const auto [between, att_membrane] = Lif::add(x, mixed_time, held(2), {}, settings..., {}, 0.0);

    const auto [key, receptance, ffn_shift] = read.template operator()<2>(between, 4, 3, held(3));
    const Tensor mixed_channels = sigmoid_gate<Device>(receptance, times(fire(key, 1, true), 6));
    const auto [after, ffn_membrane] = Lif::add(between, mixed_channels, held(4), {}, settings..., {}, 0.0);
    return {after, att_shift, wkv_state, att_membrane, ffn_shift, ffn_membrane};
  }
};

template <class Device>
using IntegerBlockStep = IntegerBlockSteps<Device, double, double, std::optional<double>, bool, double, bool>;

// Called by TORCH_LIBRARY_IMPL of each device: the names are those of the schemas in ops.cpp.
template <class Device, class Library>
void register_kernels(Library& library) {
  library.impl("wkv", &wkv<Device>);
  library.impl("wkv_backward", &wkv_backward<Device>);
  library.impl("lif", &Lif<Device>::forward);
  library.impl("lif_add", &Lif<Device>::add);
  library.impl("lif_backward", &Lif<Device>::backward);
  library.impl("token_shift2", &token_shift2<Device>);
  library.impl("token_shift2_backward", &token_shift2_backward<Device>);
  library.impl("token_shift3", &token_shift3<Device>);
  library.impl("token_shift3_backward", &token_shift3_backward<Device>);
  library.impl("sigmoid_gate", &sigmoid_gate<Device>);
  library.impl("sigmoid_gate_backward", &sigmoid_gate_backward<Device>);
  library.impl("squared_relu", &squared_relu<Device>);
  library.impl("dropout", &dropout<Device>);
  library.impl("integer_spikes", &integer_spikes<Device>);
  library.impl("integer_spikes_backward", &integer_spikes_backward<Device>);
  library.impl("integer_rows", &integer_rows<Device>);
  library.impl("integer_rows_backward", &integer_rows_backward<Device>);
  library.impl("squared_relu_backward", &squared_relu_backward<Device>);
}

}  // namespace spikegpt
