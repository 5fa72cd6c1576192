// The CUDA kernels apart from onnxruntime, for gpu.py: create, run, destroy.
#include <cstdio>
#include <exception>

#include "../cuda/sparse_kernel.h"

using tetris::cuda::SparseKernel;
using tetris::cuda::Type;

namespace {
void report(const std::exception& error, char* text, size_t size) { std::snprintf(text, size, "%s", error.what()); }
}  // namespace

extern "C" {
struct Layer {
  int64_t device, type, last, has_depth;
  int64_t kernel[3], strides[3], dilations[3], pads[3];
  int64_t outputs, inputs, taps, block_outputs, block_inputs, block_count;
  const float* blocks;
  const int64_t *block_index, *input_perm, *output_perm;
  const float* bias;
  float low, high;
};

void* tetris_gpu_create(const Layer* layer, char* text, size_t size) {
  try {
    tetris::cuda::Window window;
    for (size_t d = 0; d < 3; ++d) {
      window.kernel[d] = layer->kernel[d];
      window.strides[d] = layer->strides[d];
      window.dilations[d] = layer->dilations[d];
      window.pads_begin[d] = layer->pads[d];
    }
    window.has_depth = layer->has_depth != 0;
    const tetris::BlockSparseWeight weight{layer->outputs,      layer->inputs,       layer->taps,
                                           layer->block_outputs, layer->block_inputs, layer->block_count,
                                           layer->blocks,        layer->block_index,  layer->input_perm,
                                           layer->output_perm,   layer->bias};
    return new SparseKernel(static_cast<int>(layer->device), static_cast<Type>(layer->type), window, weight,
                            {layer->low, layer->high}, layer->last != 0);
  } catch (const std::exception& error) {
    report(error, text, size);
    return nullptr;
  }
}

int tetris_gpu_run(const void* kernel, uint64_t x, int64_t batch, const int64_t* input, const int64_t* output, uint64_t y,
                   void* stream, char* text, size_t size) {
  try {
    static_cast<const SparseKernel*>(kernel)->run(x, batch, {input[0], input[1], input[2]},
                                                  {output[0], output[1], output[2]}, y,
                                                  static_cast<tetris::cuda::StreamHandle*>(stream));
    return 0;
  } catch (const std::exception& error) {
    report(error, text, size);
    return 1;
  }
}

void tetris_gpu_destroy(void* kernel) { delete static_cast<SparseKernel*>(kernel); }
}
