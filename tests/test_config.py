"""The options and the TOML file: precedence, defaults, and one line naming the key for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetris_onnx.config import Config, ConfigError, LayerConfig, LayerRule, load_config, parse_block_size

CONTRACT = """
block_size = "32x32"
sparsity = 0.5
[layers."features.0"]
skip = true
[layers."classifier.*"]
sparsity = 0.9
block_size = "64x64"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_contract_file_gives_each_layer_its_options(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, CONTRACT))
    assert config.for_layer("features.0") == LayerConfig(0.5, (32, 32), skip=True, explicit=True)
    assert config.for_layer("features.3") == LayerConfig(0.5, (32, 32), skip=False, explicit=False)
    assert config.for_layer("classifier.3") == LayerConfig(0.9, (64, 64), skip=False, explicit=True, own_sparsity=True)
    assert config.for_layer("Classifier.3").sparsity == 0.5, "globs respect case"


def test_the_first_matching_rule_in_file_order_wins(tmp_path: Path) -> None:
    text = '[layers."z*"]\nsparsity = 0.1\n[layers."*"]\nskip = true\n[layers."za"]\nsparsity = 0.2\n'
    config = load_config(write(tmp_path, text))
    assert [rule.pattern for rule in config.layers] == ["z*", "*", "za"]
    assert config.for_layer("za") == LayerConfig(
        0.1, (32, 32), skip=False, explicit=True, default_block=True, own_sparsity=True
    )
    assert config.for_layer("b").skip


def test_a_rule_may_allow_a_layer_explicitly(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, '[layers."first"]\nskip = false\n'))
    assert config.for_layer("first") == LayerConfig(0.5, (32, 32), skip=False, explicit=True, default_block=True)


def test_top_level_keys_reach_the_config(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            'importance = "l2"\nreorder = "greedy"\ngathers = "keep"\ntarget = "cuda"\nprecision = "int8"\nseed = 7\n',
        )
    )
    assert config == Config(importance="l2", reorder="greedy", gathers="keep", target="cuda", precision="int8", seed=7)
    assert load_config(write(tmp_path, "")) == Config()


def test_unused_patterns_are_found() -> None:
    config = Config(layers=(LayerRule("conv*"), LayerRule("fc?"), LayerRule("head")))
    assert config.unused_patterns(["conv1", "conv2", "fc10"]) == ("fc?", "head")


@pytest.mark.parametrize(
    ("text", "size"), [("32x64", (32, 64)), ("32", (32, 32)), (" 8 X 1 ", (8, 1)), ("1024x1", (1024, 1))]
)
def test_block_sizes_parse(text: str, size: tuple[int, int]) -> None:
    assert parse_block_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "32x", "x32", "0x32", "32x1025", "-1x4", "4x4x4", "4.0x4", "1" * 30])
def test_wrong_block_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="block_size: expected"):
        parse_block_size(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity = 1.0", "sparsity: expected a number from 0 to below 1, found 1.0"),
        ("sparsity = -0.1", "sparsity: expected a number"),
        ("sparsity = nan", "sparsity: expected a number"),
        ("sparsity = true", "sparsity: expected a number"),
        ('sparsity = "0.5"', "sparsity: expected a number"),
        ("block_size = 32", 'block_size: expected a string such as "32x32", found 32'),
        ('block_size = "0x32"', "block_size: expected two integers from 1 to 1024, found 0x32"),
        ('block_size = "2048"', "block_size: expected two integers from 1 to 1024, found 2048x2048"),
        ("sweeps = 0", "sweeps: expected an integer from 1, found 0"),
        ("augment = -1", "augment: expected an integer from 0, found -1"),
        ("refine = -1", "refine: expected an integer from 0, found -1"),
        ('importance = "l3"', "importance: expected one of auto, l1, l2, activation, hessian, found 'l3'"),
        ('reorder = "best"', "reorder: expected one of exact, greedy, none"),
        ('gathers = "drop"', "gathers: expected one of absorb, keep"),
        ('target = "gpu"', "target: expected one of cpu, cuda"),
        ('precision = "fp8"', "precision: expected one of float32, bf16, int8"),
        ("gathers = [1]", "gathers: expected one of absorb, keep"),
        ("seed = -1", "seed: expected an integer from 0"),
        ("seed = 1.5", "seed: expected an integer from 0"),
        ("sparsty = 0.5", "sparsty: unknown key; did you mean 'sparsity'?"),
        ("frobnicate = 1", "frobnicate: unknown key; known keys: sparsity, allocation"),
        ("layers = 3", "layers: expected tables"),
        ('[layers]\n"a" = 3', 'layers."a": expected a table'),
        ('[layers."a"]\nskipp = true', "layers.\"a\".skipp: unknown key; did you mean 'skip'?"),
        ('[layers."a"]\nskip = 1', 'layers."a".skip: expected true or false'),
        ('[layers."a"]\nsparsity = 2', 'layers."a".sparsity: expected a number'),
        ('[layers."a"]\nblock_size = "0"', 'layers."a".block_size: expected two integers'),
        ('[layers.""]\nskip = true', "an empty pattern"),
        ("[layers.features.0]\nskip = true", 'a name with a dot needs quotes: [layers."features.0"]'),
        ("sparsity = ", "not a TOML file"),
    ],
)
def test_every_mistake_is_one_line_naming_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(path)


def test_python_values_are_checked_too() -> None:
    for wrong in (
        {"block_size": (32,)},
        {"block_size": [32, 32]},
        {"block_size": (True, 1)},
        {"workers": 0},
        {"tolerance": 0.0},
        {"tolerance": float("inf")},
    ):
        with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: expected"):
            Config(**wrong)  # type: ignore[arg-type]
