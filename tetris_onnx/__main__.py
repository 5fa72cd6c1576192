"""``python -m tetris_onnx``: the command line."""

from tetris_onnx.cli import main

if __name__ == "__main__":
    main()
