#include "channels_last_max_pool.h"

#include <algorithm>
#include <cmath>

namespace tetris {

MaxPoolNode::MaxPoolNode(const NodeReader& node) : where_(node.where()) {
  if (!node.has_ints("kernel_shape")) node.fail("attribute kernel_shape is missing");
  const std::vector<int64_t> kernel = node.sizes("kernel_shape", 2, 1, 1), strides = node.sizes("strides", 2, 1, 1);
  const std::vector<int64_t> pads = node.sizes("pads", 4, 0, 0);
  for (size_t d = 0; d < 2; ++d) {
    // As in ONNX: every window holds a value.
    if (pads[d] >= kernel[d] || pads[2 + d] >= kernel[d]) {
      node.fail("attribute pads is " + to_string(pads) + ", expected less than kernel_shape " + to_string(kernel));
    }
    window_.kernel[d] = kernel[d];
    window_.strides[d] = strides[d];
    window_.pads_begin[d] = pads[d];
    window_.pads_end[d] = pads[2 + d];
  }
}

std::vector<int64_t> MaxPoolNode::output_shape(const std::vector<int64_t>& shape) const {
  const std::string input = where_ + ": input 'X' has shape " + to_string(shape);
  if (shape.size() != 4) throw std::invalid_argument(input + ", expected [N, H, W, C]");
  std::vector<int64_t> output{shape[0]};
  for (size_t d = 0; d < 2; ++d) {
    if (shape[1 + d] > kMaxSize) throw std::invalid_argument(input + ", too large");
    const int64_t size = shape[1 + d] + window_.pads_begin[d] + window_.pads_end[d] - window_.kernel[d];
    if (size < 0) throw std::invalid_argument(input + ", too small for the window");
    output.push_back(size / window_.strides[d] + 1);
  }
  output.push_back(shape[3]);
  return output;
}

void MaxPoolNode::infer_shape(const ShapeInference& inference) {
  const std::vector<Dimension> input = inference.input_shape(kX);
  const std::vector<int64_t> kernel = inference.ints("kernel_shape");
  std::vector<int64_t> strides = inference.ints("strides"), pads = inference.ints("pads");
  if (input.size() != 4 || kernel.size() != 2) return;  // creation reports it
  if (strides.size() != 2) strides.assign(2, 1);
  if (pads.size() != 4) pads.assign(4, 0);
  std::vector<Dimension> output{input[0]};
  for (size_t d = 0; d < 2; ++d) {
    for (const int64_t value : {kernel[d], strides[d]}) {
      if (value < 1 || value > kMaxSize) return;
    }
    for (const int64_t pad : {pads[d], pads[2 + d]}) {
      if (pad < 0 || pad > kMaxSize) return;
    }
    const int64_t grow = pads[d] + pads[2 + d] - kernel[d];
    if (!input[1 + d].known()) {
      output.push_back(Dimension::unknown());
      continue;
    }
    if (input[1 + d].value > kMaxSize || input[1 + d].value + grow < 0) return;
    output.push_back(Dimension::of((input[1 + d].value + grow) / strides[d] + 1));
  }
  output.push_back(input[3]);
  inference.set_output_shape(output, kX);
}

ChannelsLastMaxPool::ChannelsLastMaxPool(const ort::Api& api, const ort::KernelInfo* info)
    : api_(api), node_(NodeReader(api, info, kName)) {}

void ChannelsLastMaxPool::compute(ort::KernelContext* context) const {
  std::vector<int64_t> shape;
  const auto* x = static_cast<const float*>(input_data(api_, context, kX, &shape));
  const std::vector<int64_t> out = node_.output_shape(shape);
  auto* y = static_cast<float*>(output_data(api_, context, out));
  if (shape[0] == 0 || shape[3] == 0) return;
  const int64_t rows = out[0] * out[1], columns = out[2], channels = out[3];
  struct Work {
    const MaxPoolNode::Window& window;
    const float* x;
    float* y;
    int64_t height, width, out_height, columns, channels;
  };
  Work work{node_.window(), x, y, shape[1], shape[2], out[1], columns, channels};
  SessionThreads(api_, context)
      .run(
          [](void* data, size_t index) {
            const Work& w = *static_cast<const Work*>(data);
            const auto row = static_cast<int64_t>(index);
            const int64_t image = row / w.out_height;
            const int64_t top = row % w.out_height * w.window.strides[0] - w.window.pads_begin[0];
            for (int64_t column = 0; column < w.columns; ++column) {
              const int64_t left = column * w.window.strides[1] - w.window.pads_begin[1];
              float* largest = w.y + (row * w.columns + column) * w.channels;
              std::fill(largest, largest + w.channels, -std::numeric_limits<float>::infinity());
              const int64_t bottom = std::min(w.height, top + w.window.kernel[0]);
              const int64_t right = std::min(w.width, left + w.window.kernel[1]);
              for (int64_t h = std::max<int64_t>(top, 0); h < bottom; ++h) {
                for (int64_t v = std::max<int64_t>(left, 0); v < right; ++v) {
                  const float* value = w.x + ((image * w.height + h) * w.width + v) * w.channels;
                  for (int64_t c = 0; c < w.channels; ++c) {
                    largest[c] = largest[c] < value[c] || std::isnan(value[c]) ? value[c] : largest[c];
                  }
                }
              }
            }
          },
          static_cast<size_t>(rows), &work);
}

}  // namespace tetris
