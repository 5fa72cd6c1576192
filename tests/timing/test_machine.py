"""The cache of measured coefficients: what is written is read, and nothing that is in the file can hurt."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tetris_onnx.graph.io import ModelError
from tetris_onnx.timing import machine as machine_module
from tetris_onnx.timing import processor
from tetris_onnx.timing.cost import AVX512, BUILT_IN
from tetris_onnx.timing.machine import built_in, cache_path, load_machine, machine_key, measured, save_machine
from tetris_onnx.timing.processor import instruction_set

OTHER = replace(AVX512, fork=(1.25, 2.5), precisions={"bf16": 0.5}, dense={**AVX512.dense, "wide": 0.5})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tetris-onnx" / "machine.json"


def test_without_a_measurement_the_built_in_ones_count() -> None:
    assert load_machine() == built_in()
    assert replace(built_in(), precisions={}) == BUILT_IN[instruction_set()]
    assert not measured(load_machine())


def test_what_is_saved_is_loaded(own_cache: Path) -> None:
    assert save_machine(OTHER) == own_cache == cache_path()
    found = load_machine()
    assert found == replace(OTHER, name="avx512, measured on this machine") and measured(found)
    save_machine(found)  # again: the name does not grow
    assert load_machine() == found


def test_it_counts_for_this_machine_and_these_versions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    save_machine(OTHER)
    monkeypatch.setattr(machine_module, "cpu_name", lambda: "Another CPU")
    assert load_machine() == built_in()
    save_machine(AVX512)
    assert measured(load_machine())
    monkeypatch.undo()
    assert "onnxruntime" in machine_key() and "tetris-onnx" in machine_key()


def test_several_machines_share_a_folder(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    save_machine(OTHER)
    with monkeypatch.context() as patch:
        patch.setattr(machine_module, "cpu_name", lambda: "Another CPU")
        save_machine(AVX512)
    assert load_machine().fork == (1.25, 2.5)
    assert len(json.loads(own_cache.read_text())) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"x": 1}', "\x00" * 10, "[" * 5000, "9" * 5000],
    ids=range(8),
)
def test_a_broken_file_counts_as_none_and_is_replaced(own_cache: Path, content: str) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text(content)
    assert load_machine() == built_in()
    save_machine(OTHER)
    assert measured(load_machine())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lanes", 0),
        ("lanes", "16"),
        ("fork", 1.0),
        ("fork", [1.0, -1.0]),
        ("fork", "12"),
        ("serial", None),
        ("reorder", [1.0, 2.0, 3.0]),
        ("precisions", {"bf16": float("inf")}),
        ("precisions", None),
        ("dense", {}),
        ("dense", {**AVX512.dense, "call": float("nan")}),
        ("sparse", {**AVX512.sparse, "wide": -0.1}),
        ("sparse", {**AVX512.sparse, "wide": True}),
        ("sparse", 3),
    ],
)
def test_nonsense_counts_as_none(own_cache: Path, field: str, value: object) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text(json.dumps({machine_key(): asdict(OTHER) | {field: value}}))
    assert load_machine() == built_in()
    own_cache.write_text(json.dumps({machine_key(): 7}))
    assert load_machine() == built_in()


def test_a_huge_file_is_not_read(own_cache: Path) -> None:
    save_machine(OTHER)
    own_cache.write_text(own_cache.read_text() + " " * 2**20)
    assert load_machine() == built_in()


def test_a_folder_that_cannot_be_written_is_named(own_cache: Path) -> None:
    own_cache.parent.parent.write_text("a file where the folder should be")
    assert load_machine() == built_in()
    with pytest.raises(ModelError, match=r"cannot write .*machine\.json") as error:
        save_machine(OTHER)
    assert "\n" not in str(error.value)


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_path() == Path.home() / ".cache" / "tetris-onnx" / "machine.json"


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl"}, "avx512"),
        ("x86_64", {"avx2", "fma", "avx512f"}, "avx2"),
        ("AMD64", set(), "avx2"),
        ("x86_64", {"sse2"}, "scalar"),
        ("aarch64", {"asimd"}, "neon"),
        ("arm64", set(), "neon"),
    ],
)
def test_instruction_sets(machine: str, flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TETRIS_ONNX_ISA", raising=False)
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(processor, "cpu_flags", lambda: flags)
    assert instruction_set() == expected


@pytest.mark.parametrize(
    ("forced", "flags", "expected"),
    [
        ("", {"avx512_vnni", "avx512_bf16"}, ("int8", "bf16")),
        ("", {"avx512_vnni"}, ("int8",)),
        ("", set(), ()),
        ("avx512", {"avx512_vnni", "avx512_bf16"}, ()),
        ("avx512_vnni", {"avx512_vnni", "avx512_bf16"}, ("int8",)),
        ("avx512_bf16", {"avx512_vnni"}, ("int8",)),
        ("scalar", {"avx512_vnni", "avx512_bf16"}, ()),
    ],
)
def test_precisions(forced: str, flags: set[str], expected: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", forced)
    monkeypatch.setattr(processor, "cpu_flags", lambda: {"avx512f", "avx512dq", "avx512bw", "avx512vl"} | flags)
    assert processor.precisions() == expected == tuple(built_in().precisions)
    if forced.startswith("avx512"):
        assert built_in().lanes == 16


def test_forced_kernels_are_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", "scalar")
    assert built_in().name == "scalar" and "scalar" in machine_key()
