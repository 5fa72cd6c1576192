"""samples/deploy_cpp builds against an installed onnxruntime and computes what Python does; the op library is plain."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tetris_onnx import InferenceSession, get_library_path

SOURCE = Path(__file__).parents[2] / "samples" / "deploy_cpp"
PACKAGE = Path(onnxruntime.__file__).parent / "capi"


def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built with CMake, or by its compiler alone where there is no CMake."""
    libraries = sorted(PACKAGE.glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this onnxruntime package has no library of its own (1.20 and later have)")
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("deploy")
    if shutil.which("cmake"):
        made = call("cmake", "-S", SOURCE, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}")
        assert made.returncode == 0, made.stderr
        made = call("cmake", "--build", folder)
    else:
        (folder / "libonnxruntime.so.1").symlink_to(libraries[0])
        flags = ["-std=c++17", "-Wall", "-Wextra", f"-Wl,-rpath,{folder}"]
        made = call("c++", *flags, SOURCE / "main.cc", libraries[0], "-o", folder / "deploy")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "warning" not in made.stdout + made.stderr
    return folder / "deploy"


def test_it_computes_what_python_computes(program: Path, block_sparse_sample: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((1, 1, 28, 28), dtype=np.float32)
    image.tofile(tmp_path / "in.f32")
    expected = InferenceSession(str(block_sparse_sample)).run(None, {"image": image})[0]
    outputs = []
    for library in (get_library_path(), "-"):
        files = tmp_path / "in.f32", tmp_path / "out.f32"
        result = call(program, block_sparse_sample, library, "1", *files)
        assert result.returncode == 0, result.stderr
        assert re.search(r"784 values in, 10 out, the largest at (\d+)", result.stdout)
        found = re.search(r"1 thread\(s\): median ([\d.]+) ms, least ([\d.]+) ms, (\d+) runs", result.stdout)
        assert found and 0 < float(found[2]) <= float(found[1]) and int(found[3]) >= 1
        outputs.append(np.fromfile(tmp_path / "out.f32", np.float32))
    np.testing.assert_array_equal(outputs[0], expected[0])
    # Without the op library, the file's own definitions run: another order of the sums.
    np.testing.assert_allclose(outputs[1], expected[0], atol=1e-4 * np.abs(expected).max())


def test_bad_input_is_one_line(program: Path, block_sparse_sample: Path, tmp_path: Path) -> None:
    library = get_library_path()
    (tmp_path / "short.f32").write_bytes(b"\0" * 8)
    for arguments, code, message in (
        (["model.onnx"], 2, "usage: deploy"),
        ([block_sparse_sample, library, "none"], 2, "usage: deploy"),
        ([tmp_path / "none.onnx", library], 1, "none.onnx"),
        ([block_sparse_sample, tmp_path / "none.so"], 1, "none.so"),
        (
            [block_sparse_sample, library, "1", tmp_path / "short.f32", tmp_path / "out"],
            1,
            "expected 784 float32 values",
        ),
    ):
        result = call(program, *arguments)
        assert result.returncode == code
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not shutil.which("readelf"), reason="there is no readelf")
def test_the_op_library_needs_the_c_library_only() -> None:
    path = Path(get_library_path())
    if path.read_bytes()[:4] != b"\x7fELF":
        pytest.skip("the op library is no ELF file")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", call("readelf", "-dW", path).stdout)
    if any("san.so" in name for name in needed):
        pytest.skip("this is a build with sanitizers")
    # What the C library consists of; libstdc++ and libgcc are linked in.
    allowed = r"lib(c|m|dl|pthread|rt)\.so\.\d+|ld-linux[\w-]*\.so\.\d+"
    assert needed and all(re.fullmatch(allowed, name) for name in needed), needed
