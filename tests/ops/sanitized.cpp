// Every kernel of cuda/ on heap memory of exactly the size that it may touch; test_sanitizers.py compiles this with
// sanitizers, and with NARROWEST and WIDEST, the VECTORS and LANES of ops.cpp.
//
//   sanitized                all kernels, sizes, masks and types
//   sanitized buffers        a line a kernel: its name, and how many buffers it is given
//   sanitized short NAME I   buffer I of this kernel is one element too small
//   sanitized overlap NAME   two threads do the same blocks of this kernel
//   sanitized undefined      a conversion that has no result
//
// A new kernel is one statement in every_kernel.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "activations.h"
#include "dropout.h"
#include "integer_rows.h"
#include "integer_spikes.h"
#include "lif.h"
#include "packed_linear.h"
#include "token_shift.h"
#include "wkv.h"

using namespace spikegpt;

struct Bfloat16 {  // 16 bits without torch; cuts where torch rounds
  uint16_t bits;
  explicit Bfloat16(float x) {
    uint32_t all;
    std::memcpy(&all, &x, sizeof all);
    bits = all >> 16;
  }
  explicit operator float() const {
    const uint32_t all = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &all, sizeof x);
    return x;
  }
};

struct Shape {
  int64_t B, T, C;
};

class Driver {
 public:
  std::string mode, name;  // as on the command line
  int64_t shortened = -1;

  Shape shape;
  enum { NO_MASK, SOME, NOTHING } masked;  // which tokens are real
  bool given;                              // what an operator may be called without
  bool wild;                               // inputs are NaN, infinities and what overflows

  Steps steps() {
    if (masked == NO_MASK) return {shape.T, shape.C, nullptr};
    return {shape.T, shape.C, filled<bool>(shape.B * shape.T, [&](int64_t i) { return masked == SOME && i % 3 != 1; })};
  }

  template <class T>
  const T* in(int64_t size) {
    return filled<T>(size, [&](int64_t i) {
      const float strange[] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, 0.0f, -0.0f, 1e-40f, 3e38f, -87.5f, 1.0f};
      return T(wild ? strange[(i + buffers.size()) % 11] : float(i * 7919 % 401) / 100 - 2);
    });
  }

  template <class T>
  const T* optional(int64_t size) {
    return given ? in<T>(size) : nullptr;
  }

  // A matrix as packed_linear.h holds it.
  template <class weight>
  const weight* packed(int64_t size) {
    return filled<weight>(size, [](int64_t i) { return weight{static_cast<decltype(bits_of(weight()))>(i % 127)}; });
  }
  static float bits_of(float);
  static int8_t bits_of(int8_t);
  static uint16_t bits_of(BFloat16Bits);

  const int64_t* seed() {
    return filled<int64_t>(1, [](int64_t) { return -0x123456789abcdef; });
  }

  template <class T>
  T* out(int64_t size) {
    T* memory = allocate<T>(size);
    outputs.push_back([=](std::vector<double>& values) {
      for (int64_t i = 0; i < size; i++) values.push_back(static_cast<double>(static_cast<float>(memory[i])));
    });
    return memory;
  }

  // Runs a kernel as Cpu::run of ops.cpp does, in blocks of several widths, by two threads where there are two blocks.
  // What it writes must be the same each time, whatever its memory held before.
  template <class real, class Make>
  void run(const char* kernel_name, Shape over, Make make, int64_t numbers = 0) {
    if (!name.empty() && name != kernel_name) return;
    buffers.clear(), outputs.clear();
    const auto kernel = make();
    if (mode == "buffers") std::printf("%s %zu\n", kernel_name, buffers.size() + (numbers ? 1 : 0));
    std::vector<double> expected;
    for (const int width : {NARROWEST, 2 * NARROWEST, WIDEST}) {
      for (const int before : {0x00, 0xff}) {
        for (const Buffer& buffer : buffers) {
          if (buffer.written) std::memset(buffer.memory.get(), before, buffer.bytes);
        }
        const int64_t blocks = (over.C + width - 1) / width, all = over.B * blocks;
        const auto some_blocks = [&](int64_t begin, int64_t end) {
          const int64_t size = numbers * width - (shortened == static_cast<int64_t>(buffers.size()));
          const std::unique_ptr<real[]> memory(numbers ? new real[size] : nullptr);
          if (numbers) std::memset(memory.get(), before, size * sizeof(real));
          for (int64_t i = begin; i < end; i++) {
            const int64_t b = i / blocks, channel = i % blocks * width;
            const int n = static_cast<int>(std::min<int64_t>(width, over.C - channel));
            kernel.template operator()<WIDEST>(b, channel, n, Scratch<real>{memory.get(), width});
          }
        };
        if (mode == "overlap") {
          std::thread other(some_blocks, 0, all);
          some_blocks(0, all);
          other.join();
        } else if (all > 1) {
          std::thread other(some_blocks, 0, all / 2);
          some_blocks(all / 2, all);
          other.join();
        } else {
          some_blocks(0, all);
        }
        std::vector<double> values;
        for (const auto& read : outputs) read(values);
        if (expected.empty()) expected = values;
        for (size_t i = 0; i < values.size(); i++) {
          if (values[i] == expected[i] || (std::isnan(values[i]) && std::isnan(expected[i]))) continue;
          std::fprintf(stderr, "%s (%d, %d, %d), blocks of %d: number %zu is %g, was %g\n", kernel_name, int(over.B),
                       int(over.T), int(over.C), width, i, values[i], expected[i]);
          std::exit(1);
        }
      }
    }
  }

 private:
  struct Buffer {
    std::unique_ptr<char[]> memory;
    int64_t bytes;
    bool written;  // by the kernel
  };
  std::vector<Buffer> buffers;  // of the present kernel
  std::vector<std::function<void(std::vector<double>&)>> outputs;

  template <class T>
  T* allocate(int64_t size, bool written = true) {
    const int64_t bytes = (size - (shortened == static_cast<int64_t>(buffers.size()))) * sizeof(T);
    buffers.push_back({std::unique_ptr<char[]>(new char[bytes]), bytes, written});
    return reinterpret_cast<T*>(buffers.back().memory.get());
  }

  template <class T, class Value>
  const T* filled(int64_t size, Value value) {
    T* memory = allocate<T>(size, false);
    const int64_t room = buffers.back().bytes / sizeof(T);
    for (int64_t i = 0; i < room; i++) memory[i] = value(i);
    return memory;
  }
};

// Of each kernel: its name, what it runs over, its arguments as in ops.h, and how many numbers its scratch memory holds.
template <class scalar, class real>
void every_kernel(Driver& d) {
  const Shape all = d.shape;
  const int64_t BC = all.B * all.C, BTC = all.T * BC, C = all.C, T = all.T;
  const Shape one_by_one = {1, 1, BTC};
  const auto sequence = [&] { return d.in<scalar>(BTC); };
  const auto new_sequence = [&] { return d.out<scalar>(BTC); };

  const auto wkv = [&]() -> WkvInput<scalar, real> {
    return {d.steps(), d.in<real>(C), d.in<real>(C), sequence(), sequence(), d.optional<real>(3 * BC)};
  };
  d.run<real>("WkvForward", all, [&] {
    return WkvForward<scalar, real>{wkv(), new_sequence(), d.out<real>(3 * BC)};
  });
  d.run<real>("WkvBackward", all, [&] {
    return WkvBackward<scalar, real>{wkv(), sequence(), d.in<real>(3 * BC), d.out<real>(BC), d.out<real>(BC),
                                     new_sequence(), new_sequence(), d.out<real>(3 * BC)};
  }, WkvBackward<scalar, real>::scratch(T));

  const auto lif = [&]() -> LifInput<scalar, real> {
    const LifNeuron<real> neuron = {real(2), real(1), real(0), real(2), d.given, !d.given, d.given};
    return {d.steps(), neuron, sequence(), d.optional<real>(BC)};
  };
  d.run<real>("LifForward", all, [&] {
    return LifForward<scalar, real, SpikesAlone<scalar>>{lif(), {new_sequence()}, d.out<real>(BC)};
  });
  d.run<real>("LifForwardAdded", all, [&] {
    const DropoutMask<real> dropped = {d.given ? d.seed() : nullptr, 1u << 30, real(4) / 3};
    return LifForward<scalar, real, SpikesAdded<real, real>>{
        lif(), {d.in<real>(BTC), d.out<real>(BTC), dropped}, d.out<real>(BC)};
  });
  d.run<real>("LifBackward", all, [&] {
    return LifBackward<scalar, real, real>{lif(), d.in<real>(BTC), d.in<real>(BC), new_sequence(), d.out<real>(BC)};
  }, LifBackward<scalar, real, real>::scratch(T));

  const auto shift = [&]<int N>() {
    const auto input = [&]() -> ShiftInput<scalar, real, N> {
      ShiftInput<scalar, real, N> in = {d.steps(), sequence(), d.optional<scalar>(BC), {}, {}};
      if (d.given) in.norm = {d.in<real>(all.B * T), d.in<real>(all.B * T), d.in<real>(C), d.in<real>(C)};
      for (auto& share : in.share) share = d.in<real>(C);
      return in;
    };
    d.run<real>(N == 2 ? "ShiftForward2" : "ShiftForward3", all, [&] {
      ShiftForward<scalar, real, N, real> kernel = {input(), {}, d.out<scalar>(BC)};
      for (auto& mixed : kernel.mixed) mixed = d.out<real>(BTC);
      return kernel;
    });
    d.run<real>(N == 2 ? "ShiftBackward2" : "ShiftBackward3", all, [&] {
      ShiftBackward<scalar, real, N, real> kernel = {input(), {}, d.in<scalar>(BC), new_sequence(),
                                                     d.out<scalar>(BC), d.given ? d.out<real>(N * BC) : nullptr};
      for (auto& grad : kernel.grad_mixed) grad = d.in<real>(BTC);
      return kernel;
    });
  };
  shift.template operator()<2>();
  shift.template operator()<3>();

  const auto packed = [&]<class weight>(const char* name) {
    const int64_t rows = all.B * T, outputs = NARROWEST + 1;
    d.run<float>(name, {1, 1, outputs}, [&] {
      return PackedLinear<weight>{d.in<float>(rows * C), d.packed<weight>(outputs * C), d.optional<float>(outputs),
                                  d.out<float>(rows * outputs), rows, C, outputs};
    });
  };
  if constexpr (std::is_same_v<scalar, float>) {
    packed.template operator()<float>("PackedLinearFloat32");
    packed.template operator()<BFloat16Bits>("PackedLinearBFloat16");
    packed.template operator()<int8_t>("PackedLinearInt8");
  }

  d.run<real>("RowMoments", {1, 1, all.B * T}, [&] {
    return RowMoments<scalar, real>{sequence(), C, real(1e-5), d.out<real>(all.B * T), d.out<real>(all.B * T)};
  });

  const auto fire = [&]() -> FireInput<scalar, real> {
    return {{T, C, nullptr}, sequence(), d.in<real>(C), d.in<real>(C), d.given, !d.given};
  };
  d.run<real>("FireForward", all, [&] { return FireForward<scalar, real>{fire(), new_sequence()}; });
  d.run<real>("FireBackward", all, [&] {
    return FireBackward<scalar, real>{fire(), sequence(), new_sequence(), d.out<real>(BC)};
  });

  const auto rows = [&](bool mixed) -> RowsInput<scalar, real> {
    const Steps steps = mixed ? d.steps() : Steps{T, C, nullptr};
    return {steps, sequence(), d.in<real>(all.B * T), d.in<real>(all.B * T), d.in<real>(3 * C),
            mixed ? d.in<real>(C) : nullptr, mixed ? d.optional<real>(BC) : nullptr};
  };
  d.run<real>("RowsForward", all, [&] {
    return RowsForward<scalar, real>{rows(d.given), new_sequence(), d.given ? d.out<real>(BC) : nullptr};
  });
  d.run<real>("RowsBackward", all, [&] {
    return RowsBackward<scalar, real>{rows(true), sequence(), d.in<real>(BC), new_sequence(), d.out<real>(BC),
                                      d.out<real>(BC)};
  });

  d.run<real>("SigmoidGateForward", one_by_one, [&] {
    return SigmoidGateForward<scalar, real>{sequence(), sequence(), new_sequence()};
  });
  d.run<real>("SigmoidGateBackward", one_by_one, [&] {
    return SigmoidGateBackward<scalar, real>{sequence(), sequence(), sequence(), new_sequence(), new_sequence()};
  });
  d.run<real>("SquaredReluForward", one_by_one, [&] {
    return SquaredReluForward<scalar, real>{sequence(), new_sequence()};
  });
  d.run<real>("SquaredReluBackward", one_by_one, [&] {
    return SquaredReluBackward<scalar, real>{sequence(), sequence(), new_sequence()};
  });
  d.run<real>("Dropout", one_by_one, [&] {
    return Dropout<scalar, real>{sequence(), {d.seed(), 1u << 30, real(4) / 3}, new_sequence()};
  });
}

int main(int argc, char** argv) {
  Driver d;
  if (argc > 1) d.mode = argv[1];
  if (argc > 2) d.name = argv[2];
  if (argc > 3) d.shortened = std::atoi(argv[3]);
  if (d.mode == "undefined") return static_cast<int>(std::strtof("1e30", nullptr)) == 0;
  if (!d.mode.empty()) {  // one call that touches all memory that it is given
    d.shape = {1, 3, NARROWEST}, d.masked = Driver::SOME, d.given = true, d.wild = false;
    every_kernel<float, float>(d);
    return 0;
  }
  std::vector<Shape> shapes = {{2, 130, 3}};  // longer than two of WKV's segments
  for (const int64_t C : {1, 3, 63, 65, 513}) {
    for (const int64_t T : {1, 2, 7}) {
      for (const int64_t B : {1, 2}) shapes.push_back({B, T, C});
    }
  }
  for (const Shape& shape : shapes) {
    for (const auto masked : {Driver::NO_MASK, Driver::SOME, Driver::NOTHING}) {
      for (const int choice : {0, 1, 2, 3}) {
        d.shape = shape, d.masked = masked, d.given = choice % 2, d.wild = choice / 2;
        every_kernel<float, float>(d);
        every_kernel<double, double>(d);
        every_kernel<Bfloat16, float>(d);
      }
    }
  }
  return 0;
}
