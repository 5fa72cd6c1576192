// Random convolutions and products through the CPU kernels, without onnxruntime: for processors that no onnxruntime is at
// hand for, under an emulator if need be. Compares with sums in double; prints one line, exits with 1 on a difference.
//   cmake -S custom_ops -B build -DTETRIS_KERNEL_CHECK=ON [-DCMAKE_TOOLCHAIN_FILE=...] && cmake --build build
//   build/kernel_check 300
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/conv.h"
#include "cpu/gemm.h"
#include "cpu/quantize.h"
#include "cpu/winograd.h"

namespace {

using tetris::Spatial;

class Threads final : public tetris::ThreadPool {
 public:
  explicit Threads(size_t count) : count_(count) {}
  void run(void (*function)(void* data, size_t index), size_t total, void* data) const override {
    auto share = [&](size_t first) {
      for (size_t i = first; i < total; i += count_) function(data, i);
    };
    std::vector<std::thread> others;
    for (size_t t = 1; t < count_; ++t) others.emplace_back(share, t);
    share(0);
    for (std::thread& other : others) other.join();
  }

 private:
  size_t count_;
};

struct Random {
  std::mt19937 engine{20181203};
  int64_t to(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
  float value() { return std::normal_distribution<float>()(engine); }
  std::vector<float> values(int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& x : v) x = value();
    return v;
  }
  std::vector<int64_t> permutation(int64_t count) {
    std::vector<int64_t> v(static_cast<size_t>(count));
    std::iota(v.begin(), v.end(), int64_t{0});
    std::shuffle(v.begin(), v.end(), engine);
    return v;
  }
};

// A random weight and what it stands for.
struct Weight {
  std::vector<float> blocks, bias, dense;  // dense: [outputs][inputs][taps]
  std::vector<int64_t> index, input_perm, output_perm;
  std::vector<bool> used;  // input channels in a kept block
  tetris::BlockSparseWeight view{};

  Weight(Random& random, int64_t outputs, int64_t inputs, int64_t taps)
      : bias(random.values(outputs)),
        dense(static_cast<size_t>(outputs * inputs * taps), 0.0F),
        input_perm(random.permutation(inputs)),
        output_perm(random.permutation(outputs)),
        used(static_cast<size_t>(inputs), false) {
    const int64_t bo = random.to(1, 40), bi = random.to(1, 40);
    for (int64_t r = 0; r * bo < outputs; ++r) {
      for (int64_t c = 0; c * bi < inputs; ++c) {
        if (random.to(0, 2) == 0) continue;
        const std::vector<float> block = random.values(bo * bi * taps);
        for (int64_t i = 0; i < bo && r * bo + i < outputs; ++i) {
          for (int64_t j = 0; j < bi && c * bi + j < inputs; ++j) {
            const int64_t to = output_perm[static_cast<size_t>(r * bo + i)] * inputs +
                               input_perm[static_cast<size_t>(c * bi + j)];
            std::copy_n(block.begin() + (i * bi + j) * taps, taps, dense.begin() + to * taps);
          }
        }
        for (int64_t j = c * bi; j < std::min((c + 1) * bi, inputs); ++j) {
          used[static_cast<size_t>(input_perm[static_cast<size_t>(j)])] = true;
        }
        blocks.insert(blocks.end(), block.begin(), block.end());
        index.insert(index.end(), {r, c});
      }
    }
    view = {outputs,      inputs,       taps,
            bo,           bi,           static_cast<int64_t>(index.size()) / 2,
            blocks.data(), index.data(), input_perm.data(),
            output_perm.data(), bias.data()};
  }
};

float bfloat16(float value) {
  const uint32_t bits = tetris::to_bfloat16(value) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What the kernels make of the weights, in place: `count` of them to an output channel.
void round_weights(tetris::Precision precision, std::vector<float>& dense, int64_t count) {
  for (size_t row = 0; row < dense.size(); row += static_cast<size_t>(count)) {
    float most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, std::abs(dense[row + static_cast<size_t>(i)]));
    const float scale = most > 0 ? most / 127 : 1;
    for (int64_t i = 0; i < count; ++i) {
      float& w = dense[row + static_cast<size_t>(i)];
      if (precision == tetris::Precision::kBFloat16) w = bfloat16(w);
      if (precision == tetris::Precision::kInt8) w = std::nearbyint(w / scale) * scale;
    }
  }
}

// And of the inputs of one image or sample: `used` says which count for the range of the bytes.
template <class Used>
void round_inputs(tetris::Precision precision, float* x, int64_t count, Used used) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (used(i)) low = std::min(low, x[i]), high = std::max(high, x[i]);
  }
  float scale = high / 255 - low / 255;
  if (scale == 0) scale = 1;
  const float zero_point = std::nearbyint(-low / scale), inverse = 1 / scale;
  for (int64_t i = 0; i < count; ++i) {
    if (precision == tetris::Precision::kBFloat16) x[i] = bfloat16(x[i]);
    if (precision == tetris::Precision::kInt8) {
      x[i] = scale * std::clamp(std::nearbyint(x[i] * inverse), -zero_point, 255 - zero_point);
    }
  }
}

// The largest difference, relative to the largest value.
double difference(const std::vector<float>& y, const std::vector<double>& expected) {
  double most = 0, scale = 1;
  for (size_t i = 0; i < y.size(); ++i) {
    most = std::isnan(y[i]) ? std::numeric_limits<double>::infinity() : std::max(most, std::abs(y[i] - expected[i]));
    scale = std::max(scale, std::abs(expected[i]));
  }
  return most / scale;
}

// Largest values of 2 x 2 windows of each map.
std::vector<double> pooled(const std::vector<double>& maps, int64_t count, int64_t height, int64_t width) {
  std::vector<double> out;
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t r = 0; r < height / 2; ++r) {
      for (int64_t c = 0; c < width / 2; ++c) {
        const double* at = maps.data() + (m * height + 2 * r) * width + 2 * c;
        out.push_back(std::max({at[0], at[1], at[width], at[width + 1]}));
      }
    }
  }
  return out;
}

// The largest difference of what run(y, pool) writes, called from two threads at once, and once more after.
template <class Run>
double difference_of_runs(const std::vector<double>& expected, Run run) {
  std::vector<float> first(expected.size(), std::nanf("")), second = first, third = first;
  std::thread other([&] { run(first.data(), Threads(3)); });
  run(second.data(), Threads(1));
  other.join();
  run(third.data(), Threads(2));
  return std::max({difference(first, expected), difference(second, expected), difference(third, expected)});
}

double check_conv(Random& random, const tetris::KernelSet& kernels) {
  tetris::ConvAttributes a{};
  Spatial size{};
  const bool same = random.to(0, 1) == 0;  // 3x3, stride 1, size kept: the kernels made for it
  const bool point = !same && random.to(0, 1) == 0;  // pointwise, on maps that are a few pixels more than whole vectors
  for (size_t d = 0; d < 3; ++d) {
    const bool unused = d == 1 && random.to(0, 3) > 0;
    a.kernel[d] = unused ? 1 : same && d != 1 ? 3 : random.to(1, 4);
    a.strides[d] = unused || same ? 1 : random.to(1, 3);
    a.dilations[d] = unused || same ? 1 : random.to(1, 2);
    a.pads_begin[d] = unused ? 0 : same ? a.kernel[d] / 2 : random.to(0, 3);
    a.pads_end[d] = unused ? 0 : same ? a.kernel[d] / 2 : random.to(0, 3);
    size[d] = unused ? 1 : (a.kernel[d] - 1) * a.dilations[d] + random.to(1, d == 1 ? 4 : 40);
    if (point) {
      a.kernel[d] = a.strides[d] = 1;
      a.pads_begin[d] = a.pads_end[d] = 0;
      size[d] = d == 1 ? 1 : 7 * random.to(1, 3);
    }
  }
  const int64_t batch = random.to(1, 2), inputs = random.to(1, 30), outputs = random.to(1, 30);
  const int64_t taps = a.kernel[0] * a.kernel[1] * a.kernel[2];
  Weight weight(random, outputs, inputs, taps);
  const Spatial out = tetris::conv_output_size(a, size);
  const bool can_pool = out[1] == 1 && out[0] > 1 && out[2] > 1 && size[1] == 1 && a.kernel[1] == 1;
  const int64_t choice = random.to(0, can_pool ? 2 : 1);
  const tetris::Fused fused = choice == 0   ? tetris::Fused::kNothing
                              : choice == 1 ? tetris::Fused::kAdd
                                            : tetris::Fused::kMaxPool;
  const int64_t plane = size[0] * size[1] * size[2], out_plane = out[0] * out[1] * out[2];
  const std::vector<float> x = random.values(batch * inputs * plane);
  std::vector<float> rounded = x;
  round_weights(kernels.precision, weight.dense, inputs * taps);
  for (int64_t n = 0; n < batch; ++n) {
    round_inputs(kernels.precision, rounded.data() + n * inputs * plane, inputs * plane,
                 [&](int64_t i) { return weight.used[static_cast<size_t>(i / plane)]; });
  }
  std::vector<double> expected(static_cast<size_t>(batch * outputs * out_plane));
  const std::vector<float> addend = random.values(fused == tetris::Fused::kAdd ? batch * outputs * out_plane : 0);
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t p = 0; p < out_plane; ++p) {
        double sum = weight.bias[static_cast<size_t>(o)];
        for (int64_t t = 0; t < taps; ++t) {
          const Spatial at{p / (out[1] * out[2]), p / out[2] % out[1], p % out[2]};
          const Spatial tap{t / (a.kernel[1] * a.kernel[2]), t / a.kernel[2] % a.kernel[1], t % a.kernel[2]};
          int64_t from = 0;
          bool inside = true;
          for (size_t d = 0; d < 3; ++d) {
            const int64_t q = at[d] * a.strides[d] + tap[d] * a.dilations[d] - a.pads_begin[d];
            inside = inside && q >= 0 && q < size[d];
            from = from * size[d] + q;
          }
          for (int64_t c = 0; inside && c < inputs; ++c) {
            sum += static_cast<double>(weight.dense[static_cast<size_t>((o * inputs + c) * taps + t)]) *
                   rounded[static_cast<size_t>((n * inputs + c) * plane + from)];
          }
        }
        const size_t at = static_cast<size_t>((n * outputs + o) * out_plane + p);
        if (!addend.empty()) sum += addend[at];
        expected[at] = std::clamp(sum, -20.0, 90.0);
      }
    }
  }
  if (fused == tetris::Fused::kMaxPool) expected = pooled(expected, batch * outputs, out[0], out[2]);
  const bool winograd = tetris::WinogradConv::applies(a, size);
  double worst = 0;
  using Algorithm = tetris::ConvAlgorithm;
  for (const Algorithm asked : {Algorithm::kAuto, Algorithm::kDirect, Algorithm::kWinograd2, Algorithm::kWinograd4}) {
    if (asked != Algorithm::kAuto && !winograd) continue;
    tetris::ConvKernel kernel(a, weight.view, {-20.0F, 90.0F}, kernels, fused, asked);
    if (random.to(0, 1) == 0) kernel.specialize(batch, size);
    const double difference = difference_of_runs(expected, [&](float* y, const Threads& pool) {
      kernel.run(x.data(), addend.empty() ? nullptr : addend.data(), batch, size, y, pool);
    });
    // Of bfloat16, it rounds to other integers than those expected here: exactly in test_winograd_integers.py.
    const bool rounds = kernels.precision == tetris::Precision::kBFloat16 &&
                        kernel.algorithm_for(batch, size) != Algorithm::kDirect;
    worst = std::max(worst, rounds ? difference * 1e-3 : difference);
  }
  return worst;
}

double check_gemm(Random& random, const tetris::KernelSet& kernels) {
  const int64_t samples = random.to(1, random.to(0, 1) == 0 ? 30 : 90), inputs = random.to(1, 90), outputs = random.to(1, 90);
  Weight weight(random, outputs, inputs, 1);
  const std::vector<float> x = random.values(samples * inputs);
  std::vector<float> rounded = x;
  round_weights(kernels.precision, weight.dense, inputs);
  for (int64_t s = 0; s < samples; ++s) {
    round_inputs(kernels.precision, rounded.data() + s * inputs, inputs, [](int64_t) { return true; });
  }
  std::vector<double> expected(static_cast<size_t>(samples * outputs));
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = weight.bias[static_cast<size_t>(o)];
      for (int64_t c = 0; c < inputs; ++c) {
        sum += static_cast<double>(weight.dense[static_cast<size_t>(o * inputs + c)]) *
               rounded[static_cast<size_t>(s * inputs + c)];
      }
      expected[static_cast<size_t>(s * outputs + o)] = std::clamp(sum, -20.0, 90.0);
    }
  }
  const tetris::GemmKernel kernel(weight.view, {-20.0F, 90.0F}, kernels);
  return difference_of_runs(expected,
                            [&](float* y, const Threads& pool) { kernel.run(x.data(), samples, y, pool); });
}

// 0 if the algorithm that is chosen is the expected one.
int check_choice(Random& random, const tetris::KernelSet& kernels) {
  using Algorithm = tetris::ConvAlgorithm;
  const tetris::ConvAttributes same{{3, 1, 3}, {1, 1, 1}, {1, 1, 1}, {1, 0, 1}, {1, 0, 1}};
  tetris::ConvAttributes strided = same;
  strided.strides[2] = 2;
  const Weight wide(random, 256, 256, 9), narrow(random, 8, 8, 9);
  struct Case {
    const char* what;
    const tetris::ConvAttributes& attributes;
    const Weight& weight;
    Algorithm asked, expected;
    int64_t batch;
    Spatial size;
  };
  const Case cases[] = {
      {"many channels, large map", same, wide, Algorithm::kAuto, Algorithm::kWinograd4, 1, {56, 1, 56}},
      {"a single pixel", same, wide, Algorithm::kAuto, Algorithm::kDirect, 1, {1, 1, 1}},
      {"few channels", same, narrow, Algorithm::kAuto, Algorithm::kDirect, 1, {28, 1, 28}},
      {"stride 2", strided, wide, Algorithm::kWinograd4, Algorithm::kDirect, 1, {56, 1, 56}},
      {"3-D", same, wide, Algorithm::kWinograd4, Algorithm::kDirect, 1, {56, 2, 56}},
      {"asked for direct", same, wide, Algorithm::kDirect, Algorithm::kDirect, 1, {56, 1, 56}},
      {"asked for 2x2", same, narrow, Algorithm::kWinograd2, Algorithm::kWinograd2, 1, {1, 1, 1}},
      {"asked for 4x4", same, narrow, Algorithm::kWinograd4, Algorithm::kWinograd4, 1, {1, 1, 1}},
  };
  int wrong = 0;
  for (const Case& c : cases) {
    const tetris::ConvKernel kernel(c.attributes, c.weight.view, {-20.0F, 90.0F}, kernels, tetris::Fused::kNothing,
                                    c.asked);
    if (kernel.algorithm_for(c.batch, c.size) != c.expected) {
      std::printf("%s: not the expected algorithm\n", c.what);
      ++wrong;
    }
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  double most = 0;
  int wrong = 0;
  for (const auto precision : {tetris::Precision::kFloat32, tetris::Precision::kBFloat16, tetris::Precision::kInt8}) {
    const tetris::KernelSet& kernels = tetris::select_kernels(precision);
    if (kernels.precision != precision) continue;  // the processor has none
    Random random;
    if (precision == tetris::Precision::kFloat32) wrong += check_choice(random, kernels);
    double worst = 0;
    for (int i = 0; i < count; ++i) {
      worst = std::max({worst, check_conv(random, kernels), check_gemm(random, kernels)});
    }
    std::printf("%s: %d convolutions and products, largest relative difference %.1e\n", kernels.name, count, worst);
    most = std::max(most, worst);
  }
  return most < 1e-5 && wrong == 0 ? 0 : 1;  // float32 sums of some hundred products
}
