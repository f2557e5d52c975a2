// The operators of this extension for any device: arguments checked, results allocated, kernels started. `Device` says
// how: ops.cpp has the CPU's, ops_cuda.cu CUDA's.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <sstream>
#include <tuple>

#include "activations.h"
#include "dropout.h"
#include "lif.h"
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

// Operators take the settings one by one: `Settings` are the types of LifSettings' members.
template <class Device, class... Settings>
struct LifOperators {
  static std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& membrane, const OptionalTensor& mask,
                                            Settings... settings) {
    const LifArguments arguments(x, membrane, mask, {settings...});
    const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
    Tensor spikes = at::empty({B, T, C}, x.options()), membrane_after = new_state(x, {B, C});
    DISPATCH(x, "lif", {
      Device::template run<real>(B, T, C, x, LifForward<scalar_t, real>{
          arguments.input<scalar_t, real>(), spikes.mutable_data_ptr<scalar_t>(),
          membrane_after.mutable_data_ptr<real>()});
    });
    return {spikes, membrane_after};
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& x, const OptionalTensor& membrane,
                                             const OptionalTensor& mask, Settings... settings,
                                             const Tensor& grad_spikes, const Tensor& grad_membrane_after) {
    const LifArguments arguments(x, membrane, mask, {settings...});
    const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
    check("LIF: gradient of spikes", grad_spikes, {B, T, C}, x.scalar_type(), x);
    check("LIF: gradient of membrane", grad_membrane_after, {B, C}, state_dtype(x), x);
    const Tensor gs = grad_spikes.contiguous(), gm = grad_membrane_after.contiguous();
    Tensor grad_x = at::empty({B, T, C}, x.options()), grad_membrane = new_state(x, {B, C});
    DISPATCH(x, "lif_backward", {
      using Kernel = LifBackward<scalar_t, real>;
      Device::template run<real>(B, T, C, x, Kernel{
          arguments.input<scalar_t, real>(), gs.const_data_ptr<scalar_t>(), gm.const_data_ptr<real>(),
          grad_x.mutable_data_ptr<scalar_t>(), grad_membrane.mutable_data_ptr<real>()}, Kernel::scratch(T));
    });
    return {grad_x, grad_membrane};
  }
};

template <class Device>
using Lif = LifOperators<Device, double, double, std::optional<double>, bool, double, bool>;

// ---- token shift, for two or three linear layers

template <int N>
struct ShiftArguments {
  Tensor x, shares[N];
  OptionalTensor last, mask;

  ShiftArguments(const Tensor& x, const OptionalTensor& last, const OptionalTensor& mask,
                 const std::array<Tensor, N>& shares) {
    check_sequence("token shift: x", x);
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
    ShiftInput<scalar, real, N> in = {
        {x.size(1), x.size(2), pointer<bool>(mask)}, x.const_data_ptr<scalar>(), pointer<scalar>(last), {}};
    for (int j = 0; j < N; j++) in.share[j] = shares[j].template const_data_ptr<real>();
    return in;
  }
};

// The mixes, and x at the last real token.
template <class Device, int N>
std::pair<std::array<Tensor, N>, Tensor> shift(const Tensor& x, const OptionalTensor& last, const OptionalTensor& mask,
                                               const std::array<Tensor, N>& shares) {
  const ShiftArguments<N> arguments(x, last, mask, shares);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  std::array<Tensor, N> mixed;
  for (Tensor& tensor : mixed) tensor = at::empty({B, T, C}, x.options());
  Tensor last_after = at::empty({B, C}, x.options());
  DISPATCH(x, "token_shift", {
    ShiftForward<scalar_t, real, N> kernel = {
        arguments.template input<scalar_t, real>(), {}, last_after.mutable_data_ptr<scalar_t>()};
    for (int j = 0; j < N; j++) kernel.mixed[j] = mixed[j].template mutable_data_ptr<scalar_t>();
    Device::template run<real>(B, T, C, x, kernel);
  });
  return {mixed, last_after};
}

// Gradients of x, of last, and of the shares (N, C), for which `share_gradients` asks; else they are 0.
template <class Device, int N>
std::tuple<Tensor, Tensor, Tensor> shift_backward(const Tensor& x, const OptionalTensor& last,
                                                  const OptionalTensor& mask, const std::array<Tensor, N>& shares,
                                                  std::array<Tensor, N> grads, const Tensor& grad_last_after,
                                                  bool share_gradients) {
  const ShiftArguments<N> arguments(x, last, mask, shares);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  for (Tensor& grad : grads) {
    check("token shift: gradient of a mix", grad, {B, T, C}, x.scalar_type(), x);
    grad = grad.contiguous();
  }
  check("token shift: gradient of last", grad_last_after, {B, C}, x.scalar_type(), x);
  const Tensor gl = grad_last_after.contiguous();
  Tensor grad_x = at::empty({B, T, C}, x.options()), grad_last = at::empty({B, C}, x.options());
  Tensor grad_share = new_state(x, {share_gradients ? B : 0, N, C});
  DISPATCH(x, "token_shift_backward", {
    ShiftBackward<scalar_t, real, N> kernel = {
        arguments.template input<scalar_t, real>(), {}, gl.const_data_ptr<scalar_t>(),
        grad_x.mutable_data_ptr<scalar_t>(), grad_last.mutable_data_ptr<scalar_t>(),
        share_gradients ? grad_share.mutable_data_ptr<real>() : nullptr};
    for (int j = 0; j < N; j++) kernel.grad_mixed[j] = grads[j].template const_data_ptr<scalar_t>();
    Device::template run<real>(B, T, C, x, kernel);
  });
  return {grad_x, grad_last, grad_share.sum(0)};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_shift2(const Tensor& x, const OptionalTensor& last, const OptionalTensor& mask,
                                                const Tensor& a, const Tensor& b) {
  auto [mixed, last_after] = shift<Device, 2>(x, last, mask, {a, b});
  return {mixed[0], mixed[1], last_after};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> token_shift3(const Tensor& x, const OptionalTensor& last,
                                                        const OptionalTensor& mask, const Tensor& a, const Tensor& b,
                                                        const Tensor& c) {
  auto [mixed, last_after] = shift<Device, 3>(x, last, mask, {a, b, c});
  return {mixed[0], mixed[1], mixed[2], last_after};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_shift2_backward(const Tensor& x, const OptionalTensor& last,
                                                         const OptionalTensor& mask, const Tensor& a, const Tensor& b,
                                                         const Tensor& grad_a, const Tensor& grad_b,
                                                         const Tensor& grad_last, bool share_gradients) {
  return shift_backward<Device, 2>(x, last, mask, {a, b}, {grad_a, grad_b}, grad_last, share_gradients);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> token_shift3_backward(const Tensor& x, const OptionalTensor& last,
                                                         const OptionalTensor& mask, const Tensor& a, const Tensor& b,
                                                         const Tensor& c, const Tensor& grad_a, const Tensor& grad_b,
                                                         const Tensor& grad_c, const Tensor& grad_last,
                                                         bool share_gradients) {
  return shift_backward<Device, 3>(x, last, mask, {a, b, c}, {grad_a, grad_b, grad_c}, grad_last, share_gradients);
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

// ---- dropout; its gradient is itself, with the same seed

template <class Device>
Tensor dropout(const Tensor& x, const Tensor& seed, double p) {
  check("dropout: seed", seed, {1}, at::kLong, x);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "dropout: p must be at least 0 and less than 1, got ", p);
  const Tensor x_ = x.contiguous(), seed_ = seed.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  DISPATCH(x, "dropout", {
    Device::template run<real>(1, 1, x.numel(), x, Dropout<scalar_t, real>{
        x_.const_data_ptr<scalar_t>(), seed_.const_data_ptr<int64_t>(), out.mutable_data_ptr<scalar_t>(),
        static_cast<uint32_t>(p * 4294967296.0), static_cast<real>(1 / (1 - p))});
  });
  return out;
}

// Called by TORCH_LIBRARY_IMPL of each device: the names are those of the schemas in ops.cpp.
template <class Device, class Library>
void register_kernels(Library& library) {
  library.impl("wkv", &wkv<Device>);
  library.impl("wkv_backward", &wkv_backward<Device>);
  library.impl("lif", &Lif<Device>::forward);
  library.impl("lif_backward", &Lif<Device>::backward);
  library.impl("token_shift2", &token_shift2<Device>);
  library.impl("token_shift2_backward", &token_shift2_backward<Device>);
  library.impl("token_shift3", &token_shift3<Device>);
  library.impl("token_shift3_backward", &token_shift3_backward<Device>);
  library.impl("sigmoid_gate", &sigmoid_gate<Device>);
  library.impl("sigmoid_gate_backward", &sigmoid_gate_backward<Device>);
  library.impl("squared_relu", &squared_relu<Device>);
  library.impl("dropout", &dropout<Device>);
  library.impl("squared_relu_backward", &squared_relu_backward<Device>);
}

}  // namespace spikegpt
