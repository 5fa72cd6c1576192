// The CUDA kernels apart from onnxruntime, for gpu.py: create, run, destroy.
#include <algorithm>
#include <cstdio>
#include <exception>

#include "../cuda/pool_kernel.h"
#include "../cuda/sparse_kernel.h"

using tetris::cuda::PoolKernel;
using tetris::cuda::SparseKernel;
using tetris::cuda::Type;

namespace {
void report(const std::exception& error, char* text, size_t size) { std::snprintf(text, size, "%s", error.what()); }
}  // namespace

extern "C" {
struct Layer {
  int64_t device, type, input_last, output_last, has_depth;
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
                            {layer->low, layer->high}, {layer->input_last != 0, layer->output_last != 0});
  } catch (const std::exception& error) {
    report(error, text, size);
    return nullptr;
  }
}

int tetris_gpu_run(const void* kernel, uint64_t x, int64_t batch, const int64_t* input, const int64_t* output,
                   uint64_t addend, uint64_t y, void* stream, char* text, size_t size) {
  try {
    static_cast<const SparseKernel*>(kernel)->run(x, batch, {input[0], input[1], input[2]},
                                                  {output[0], output[1], output[2]}, addend, y,
                                                  static_cast<tetris::cuda::StreamHandle*>(stream));
    return 0;
  } catch (const std::exception& error) {
    report(error, text, size);
    return 1;
  }
}

// What the table of tiles knows the layer by: sm, taps, height, rows, steps.
void tetris_gpu_describe(const void* kernel, int64_t pixels, int64_t* out) {
  const tetris::cuda::TileChoice layer = static_cast<const SparseKernel*>(kernel)->describe(pixels);
  const int64_t values[] = {layer.sm, layer.taps, layer.height, layer.rows, layer.steps};
  std::copy(values, values + 5, out);
}

// How so many output pixels are computed: tile rows, tile pixels, splits.
void tetris_gpu_plan(const void* kernel, int64_t pixels, int64_t* out) {
  const tetris::cuda::TileChoice choice = static_cast<const SparseKernel*>(kernel)->choose(pixels);
  const int64_t values[] = {choice.bm, choice.bn, choice.splits};
  std::copy(values, values + 3, out);
}

// y = the largest values of windows of x [batch, h, w, channels], on device 0.
int tetris_gpu_max_pool(int64_t type, uint64_t x, int64_t batch, const int64_t* input, const int64_t* output,
                        int64_t channels, int64_t window, int64_t stride, int64_t pad, uint64_t y, void* stream, char* text,
                        size_t size) {
  try {
    PoolKernel(0, static_cast<Type>(type))
        .run(x, batch, {input[0], input[1]}, {output[0], output[1]}, channels, {window, window}, {stride, stride},
             {pad, pad}, y, static_cast<tetris::cuda::StreamHandle*>(stream));
    return 0;
  } catch (const std::exception& error) {
    report(error, text, size);
    return 1;
  }
}

void tetris_gpu_destroy(void* kernel) { delete static_cast<SparseKernel*>(kernel); }
}
