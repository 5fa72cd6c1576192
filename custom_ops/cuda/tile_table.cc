#include "tile_table.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

// tiles.csv as read-only data of the library.
__asm__(
    ".pushsection .rodata\n"
    ".hidden tetris_cuda_tiles\n"
    ".global tetris_cuda_tiles\n"
    "tetris_cuda_tiles:\n"
    ".incbin \"" TETRIS_CUDA_TILES
    "\"\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" const char tetris_cuda_tiles[];

namespace tetris::cuda {
namespace {

constexpr const char* kHeader = "sm,type,taps,height,rows,steps,pixels,tile_rows,tile_pixels,splits";

std::vector<TileChoice> parse(const std::string& text, const std::string& where) {
  std::vector<TileChoice> table;
  std::istringstream lines(text);
  std::string line;
  bool header = false;
  for (int number = 1; std::getline(lines, line); ++number) {
    if (line.empty() || line[0] == '#') continue;
    auto fail = [&](const std::string& expected) {
      throw std::invalid_argument(where + ", line " + std::to_string(number) + ": expected " + expected + ", found '" +
                                  line + "'");
    };
    if (!header) {
      if (line != kHeader) fail(kHeader);
      header = true;
      continue;
    }
    char name[8] = "", rest = 0;
    int sm = 0, taps = 0, height = 0, bm = 0, bn = 0;
    long long rows = 0, steps = 0, pixels = 0, splits = 0;
    if (std::sscanf(line.c_str(), "%d,%7[a-z0-9],%d,%d,%lld,%lld,%lld,%d,%d,%lld%c", &sm, name, &taps, &height, &rows,
                    &steps, &pixels, &bm, &bn, &splits, &rest) != 10 ||
        rows < 1 || steps < 1 || pixels < 1 || bm < 1 || bn < 1 || splits < 1 || splits > 1024) {
      fail("ten values as in the header");
    }
    const std::string type = name;
    if (type != "f16" && type != "bf16" && type != "tf32" && type != "f32") fail("type f16, bf16, tf32 or f32");
    table.push_back({sm,
                     type == "f16"    ? Type::f16
                     : type == "bf16" ? Type::bf16
                     : type == "tf32" ? Type::tf32
                                      : Type::f32,
                     taps, height, rows, steps, pixels, bm, bn, splits});
  }
  return table;
}

double octaves(int64_t a, int64_t b) { return std::abs(std::log2(static_cast<double>(a) / static_cast<double>(b))); }

}  // namespace

std::vector<TileChoice> tile_table() {
  const char* path = std::getenv("TETRIS_ONNX_CUDA_TILES");
  if (path == nullptr || *path == '\0') {
    static const std::vector<TileChoice> own = parse(tetris_cuda_tiles, "tiles.csv");
    return own;
  }
  std::ifstream file(path);
  std::stringstream text;
  if (!file || !(text << file.rdbuf())) {
    throw std::invalid_argument("TETRIS_ONNX_CUDA_TILES names '" + std::string(path) + "', which cannot be read");
  }
  return parse(text.str(), path);
}

const TileChoice* find_choice(const std::vector<TileChoice>& table, const TileChoice& layer) {
  const TileChoice* best = nullptr;
  double least = 1.0;
  for (const TileChoice& choice : table) {
    if (choice.sm != layer.sm || choice.type != layer.type || choice.taps != layer.taps || choice.height != layer.height) {
      continue;
    }
    const double distance = octaves(choice.rows, layer.rows) + octaves(choice.steps, layer.steps) +
                            octaves(choice.pixels, layer.pixels);
    if (distance <= least && (best == nullptr || distance < least)) {
      best = &choice;
      least = distance;
    }
  }
  return best;
}

}  // namespace tetris::cuda
