// Runs a model with the block-sparse operators in onnxruntime, and times it: no Python anywhere.
//
//     deploy MODEL.onnx OP_LIBRARY [THREADS [INPUT.f32 OUTPUT.f32]]
//
// MODEL has one input of float32 and at least one output; sizes that it leaves open are 1. INPUT holds the input's
// values as raw float32 (pseudo-random without), OUTPUT gets those of the first output. OP_LIBRARY "-": none, which
// runs dense models, and block-sparse ones at dense speed by the definitions that their files carry.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "ort.h"

namespace {

constexpr double kSeconds = 1.0;  // to time for
constexpr int kWarmUps = 5;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::vector<float> read_or_draw(const char* path, size_t count) {
  std::vector<float> values(count);
  if (path == nullptr) {
    std::mt19937 random(0);
    std::uniform_real_distribution<float> uniform(0, 1);
    for (float& value : values) value = uniform(random);
    return values;
  }
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(count * sizeof(float));
  file.read(reinterpret_cast<char*>(values.data()), bytes);
  if (file.gcount() != bytes || file.peek() != EOF) {
    throw std::runtime_error(std::string(path) + ": expected " + std::to_string(count) + " float32 values");
  }
  return values;
}

int deploy(const char* model, const std::string& library, int threads, const char* input_path, const char* output_path) {
  const ort::Api api;
  ort::SessionOptions* options = api.CreateSessionOptions();
  api.SetIntraOpNumThreads(options, threads);
  if (library != "-") api.RegisterCustomOpsLibrary(options, library.c_str());
  ort::Session* session = api.CreateSession(api.CreateEnv(), model, options);

  const ort::TensorInfo* info = api.CastTypeInfoToTensorInfo(api.SessionGetInputTypeInfo(session, 0));
  if (info == nullptr || api.GetTensorElementType(info) != ort::kFloat) {
    throw std::runtime_error("the model's input is no tensor of float32");
  }
  std::vector<int64_t> shape(api.GetDimensionsCount(info));
  api.GetDimensions(info, shape.data(), shape.size());
  size_t count = 1;
  for (int64_t& size : shape) {
    size = std::max<int64_t>(size, 1);  // -1 is open
    count *= static_cast<size_t>(size);
  }
  std::vector<float> values = read_or_draw(input_path, count);
  ort::Value* input =
      api.CreateTensor(api.CreateCpuMemoryInfo(), values.data(), count * sizeof(float), shape.data(), shape.size());
  ort::Allocator* allocator = api.GetAllocatorWithDefaultOptions();
  const char* input_name = api.SessionGetInputName(session, 0, allocator);
  const char* output_name = api.SessionGetOutputName(session, 0, allocator);

  ort::Value* output = api.Run(session, input_name, input, output_name);
  const size_t outputs = api.GetTensorShapeElementCount(api.GetTensorTypeAndShape(output));
  const float* result = api.GetTensorMutableData(output);
  std::printf("%s: %zu values in, %zu out, the largest at %td\n", model, count, outputs,
              std::max_element(result, result + outputs) - result);
  if (output_path != nullptr) {
    std::ofstream file(output_path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(result), static_cast<std::streamsize>(outputs * sizeof(float)));
    if (!file.flush()) throw std::runtime_error(std::string(output_path) + ": cannot be written");
  }
  api.ReleaseValue(output);

  std::vector<double> times;
  for (const double end = now() + kSeconds; times.size() <= kWarmUps || now() < end;) {
    const double start = now();
    api.ReleaseValue(api.Run(session, input_name, input, output_name));
    times.push_back(1e3 * (now() - start));
  }
  times.erase(times.begin(), times.begin() + kWarmUps);
  std::sort(times.begin(), times.end());
  std::printf("onnxruntime %s, %d thread(s): median %.3f ms, least %.3f ms, %zu runs\n",
              ort::OrtGetApiBase()->GetVersionString(), threads, times[times.size() / 2], times[0], times.size());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 3 ? std::atoi(argv[3]) : 1;
  if ((argc != 3 && argc != 4 && argc != 6) || threads < 1) {
    std::fprintf(stderr, "usage: deploy MODEL.onnx OP_LIBRARY [THREADS [INPUT.f32 OUTPUT.f32]]\n");
    return 2;
  }
  try {
    return deploy(argv[1], argv[2], threads, argc > 5 ? argv[4] : nullptr, argc > 5 ? argv[5] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
