#include "images.h"

#include <iterator>

#include "signatures.h"

// kernels.bin as read-only data of the library.
__asm__(
    ".pushsection .rodata\n"
    ".balign 64\n"
    ".hidden tetris_cuda_images\n"
    ".global tetris_cuda_images\n"
    "tetris_cuda_images:\n"
    ".incbin \"" TETRIS_CUDA_KERNELS
    "/kernels.bin\"\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" const unsigned char tetris_cuda_images[];

namespace tetris::cuda {
namespace {
#include "kernels.inc"
}  // namespace

const std::vector<Image>& images() {
  static const std::vector<Image> all(std::begin(kImages), std::end(kImages));
  return all;
}

const std::vector<Tile>& tiles() {
  static const std::vector<Tile> all(std::begin(kTiles), std::end(kTiles));
  return all;
}

const unsigned char* image_data() { return tetris_cuda_images; }

int parameter_count(const std::string& function) {
  const std::string signature = function == "block_sparse_conv" ? k_block_sparse_conv
                                : function == "sum_splits"      ? k_sum_splits
                                : function == "max_pool"        ? k_max_pool
                                                                : k_channels_last;
  return static_cast<int>(signature.size()) + 2;
}

}  // namespace tetris::cuda
