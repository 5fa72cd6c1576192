"""Budgets of the whole network: what they count, what they leave alone, and what they say when they cannot be met."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models import Net
from tetris_onnx.accuracy.sensitivity import Sensitivity, is_free
from tetris_onnx.algorithms.allocation import BudgetError
from tetris_onnx.budget import kept_blocks, network_budget, predicted_loss, spread
from tetris_onnx.config import Config, LayerRule
from tetris_onnx.graph import io
from tetris_onnx.planner import Candidate, prepare, survey
from tetris_onnx.timing.cost import predict, predict_dense
from tetris_onnx.timing.machine import load_machine


@pytest.fixture(autouse=True)
def built_in_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Predictions of a machine on which a layer gains in proportion to what is dropped of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TETRIS_ONNX_ISA", "avx512")


def network(size: int | str = 16) -> Net:
    """Layers of 3 -> 32 (dense), 32 -> 64, 64 -> 64 and 64 -> 10 (dense) channels."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 3, size, size]), (3, 32)))
    a = net.op("Relu", net.conv(a, (32, 64)))
    a = net.op("Relu", net.conv(a, (64, 64), strides=[2, 2]))
    a = net.op("Flatten", net.op("GlobalAveragePool", a))
    net.output(net.gemm(a, (64, 10)))
    return net


def candidates(config: Config, net: Net | None = None) -> list[Candidate]:
    return survey(prepare(io.to_graph((net or network()).build())), config)


def sensitivities(listing: list[Candidate], weights: dict[str, float] | None = None) -> list[Sensitivity]:
    """Loss (1 - density)**2 times a weight per layer."""
    found = []
    for candidate in listing:
        if is_free(candidate):
            out, in_ = candidate.layer.weight_shape[:2]
            blocks = -(-out // candidate.block_size[0]) * -(-in_ // candidate.block_size[1])
            weight = (weights or {}).get(candidate.layer.name, 1.0)
            found.append(Sensitivity(candidate.layer.name, weight * (1 - np.arange(blocks + 1) / blocks) ** 2))
    return found


def config(**options: object) -> Config:
    return Config(**({"block_size": (8, 8), "allocation": "global"} | options))  # type: ignore[arg-type]


def macs(listing: list[Candidate]) -> float:
    """Multiplications of the layers that the budget is for."""
    total = 0.0
    for candidate in listing:
        out, in_ = candidate.layer.weight_shape[:2]
        if candidate.layer.name in ("conv2", "conv3"):
            total += (candidate.layer.multiplications or 0) * kept_blocks(candidate) * 64 / (out * in_)
    return total


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.9])
def test_the_budget_is_kept_and_used(sparsity: float) -> None:
    before = candidates(config(sparsity=sparsity))
    after = spread(before, sensitivities(before), config(sparsity=sparsity))
    limit = macs(before) if sparsity == 0 else (1 - sparsity) * sum(c.layer.multiplications or 0 for c in before[1:3])
    assert 0.97 * limit < macs(after) <= limit


def test_the_more_sensitive_layer_keeps_more() -> None:
    before = candidates(config(sparsity=0.6))
    kept = []
    for weight in (0.1, 10.0):
        after = spread(before, sensitivities(before, {"conv2": weight}), config(sparsity=0.6))
        kept.append([kept_blocks(c) for c in after[1:3]])
    assert kept[0][0] < kept[1][0] and kept[0][1] > kept[1][1]
    assert predicted_loss(after, sensitivities(before))["conv2"] == pytest.approx((1 - kept[1][0] / 32) ** 2)


def test_a_layer_may_stay_dense() -> None:
    before = candidates(config(sparsity=0.3))
    after = spread(before, sensitivities(before, {"conv3": 1e6}), config(sparsity=0.3))
    assert after[2].why_dense == "the allocation leaves it dense" and not after[1].why_dense


def test_rules_of_the_config_are_left_alone() -> None:
    names = [str(c.layer.node.name) for c in candidates(config())]
    rules = (LayerRule(names[1], sparsity=0.25), LayerRule(names[2], block_size=(16, 16)))
    options = config(sparsity=0.5, layers=rules)
    listing = candidates(options)
    assert [is_free(c) for c in listing] == [False, False, True, False]
    after = spread(listing, sensitivities(listing), options)
    assert after[1].options.sparsity == 0.25 and after[2].options.sparsity == pytest.approx(0.5)
    assert not is_free(candidates(config(layers=(LayerRule(names[2], skip=True),)))[2])


def test_an_impossible_sparsity_says_what_is_possible() -> None:
    # Blocks of 32 x 16 and 32 x 32: a half and a quarter is the least that they leave.
    options = config(sparsity=0.9, block_size=(32, 32))
    listing = candidates(options)
    with pytest.raises(BudgetError, match=r"sparsity 0.9 is out of reach: .* 25.0 % of the multiplications are left"):
        spread(listing, sensitivities(listing), options)


def seconds(listing: list[Candidate]) -> float:
    machine, total = load_machine(), 0.0
    for candidate in listing:
        shape = candidate.shape
        assert shape is not None
        if candidate.why_dense:
            assert candidate.unpruned_seconds is not None
            total += candidate.unpruned_seconds  # by our operator, where that is faster
        else:
            total += float(predict(shape, 1 - candidate.options.sparsity, candidate.block_size, machine))
    return total


@pytest.mark.parametrize("speedup", [1.6, 1.9])
def test_the_predicted_time_of_the_whole_network_is_what_was_asked_for(speedup: float) -> None:
    options = config(allocation="latency", speedup=speedup)
    before = candidates(options)
    dense = sum(predict_dense(shape, load_machine()) for c in before if (shape := c.shape))
    after = spread(before, sensitivities(before), options)
    assert dense / seconds(after) >= speedup * (1 - 1e-9)
    assert dense / seconds(after) < speedup * 1.05  # a block of 8 x 8 is a hundredth of a layer


def test_an_impossible_speedup_says_what_is_possible() -> None:
    options = config(allocation="latency", speedup=50.0)
    listing = candidates(options)
    with pytest.raises(BudgetError, match=r"a speed-up of 50 is out of reach: .* it is [1-9]\.\d\d \(predicted\)"):
        spread(listing, sensitivities(listing), options)


def test_open_sizes_are_counted_in_weights_and_timed_for_a_usual_size() -> None:
    net = network("size")
    listing = candidates(config(), net)
    assert network_budget(listing, config()).unit == "weights"
    assert network_budget(candidates(config()), config()).unit == "multiplications"
    options = config(allocation="latency", speedup=1.5)
    timed = candidates(options, net)
    assert network_budget(timed, options).unit == "predicted time"
    with pytest.raises(BudgetError, match="the time of layer 'conv2' is not known"):
        network_budget([replace(candidate, shape=None) for candidate in timed], options)
