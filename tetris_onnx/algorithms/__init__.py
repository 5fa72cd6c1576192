"""The TETRIS search: importance, blocks, reordering, packing. Knows numpy and scipy, and no ONNX."""
