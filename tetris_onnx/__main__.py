"""``python -m tetris_onnx``: the command line."""

from tetris_onnx.cli.main import main

if __name__ == "__main__":
    main()
