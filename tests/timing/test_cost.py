"""The cost model: its work counts, its promises (monotone, linear, fitted) and plausible built-in coefficients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tetris_onnx.timing.cost import (
    ALGORITHMS,
    AVX512,
    BUILT_IN,
    DENSE_WORK,
    KINDS,
    SPARSE_WORK,
    LayerShape,
    algorithms,
    dense_work,
    fit,
    predict,
    predict_dense,
    predict_reorder,
    sparse_work,
)

WIDE = LayerShape(64, 32, (3, 3), (1, 1), (1, 1), (14, 14), (14, 14))
SHAPES = {
    "wide": WIDE,
    "strided": LayerShape(64, 32, (3, 3), (2, 2), (1, 1), (28, 28), (14, 14)),
    "pointwise": LayerShape(64, 32, (1, 1), (1, 1), (1, 1), (14, 14), (14, 14)),
    "general": LayerShape(64, 32, (5, 5), (1, 1), (1, 1), (14, 14), (14, 14)),
    "product": LayerShape(64, 32, samples=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    assert SHAPES[kind].kind == kind


def test_other_kinds() -> None:
    assert LayerShape(8, 8, (3,), (1,), (1,), (50,), (50,)).kind == "wide"
    assert LayerShape(8, 8, (3, 3), (3, 3), (1, 1), (9, 9), (3, 3)).kind == "general"
    assert LayerShape(8, 8, (3, 3), (1, 1), (2, 2), (9, 9), (5, 5)).kind == "general"
    assert LayerShape(8, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1), (4, 4, 4), (4, 4, 4)).kind == "general"
    assert LayerShape(8, 8, (1, 1), (2, 2), (1, 1), (8, 8), (4, 4)).kind == "general"


def test_the_work_is_counted() -> None:
    dense = dict(zip(DENSE_WORK, dense_work(WIDE), strict=True))
    assert dense["wide"] == WIDE.multiplications == 64 * 32 * 9 * 196
    assert dense["weights"] == 64 * 32 * 9
    assert dense["input"] == 32 * 196 and dense["output"] == 64 * 196
    assert dense["call"] == 1 and dense["pointwise"] == 0
    # 17 channels are computed as 32.
    odd = LayerShape(17, 32, (1, 1), (1, 1), (1, 1), (4, 4), (4, 4), samples=3)
    assert dict(zip(DENSE_WORK, dense_work(odd), strict=True))["pointwise"] == 3 * 32 * 32 * 16

    sparse = dict(zip(SPARSE_WORK, sparse_work(WIDE, 0.25, (32, 32)), strict=True))
    assert sparse["wide"] == 64 * 32 * 9 * 196 / 4  # 196 = 12 vectors and 4 pixels
    assert sparse["weights"] == 64 * 32 * 9 / 4
    assert sparse["panel"] == pytest.approx(32 * 196 * (1 - 0.75**2))
    # By Winograd's algorithm, F(4x4, 3x3): 36 multiplications for 144, of 16 tiles at a time; the weights once a strip.
    many = LayerShape(1024, 1024, (3, 3), (1, 1), (1, 1), (64, 64), (64, 64))
    work = dict(zip(SPARSE_WORK, sparse_work(many, 0.5, (32, 32), algorithm="winograd4"), strict=True))
    assert work["winograd"] == many.multiplications / 4 / 2 and work["wide"] == work["weights"] == 0
    assert work["transformed"] == 1024 * 1024 * 36 / 2 * 6  # 256 tiles in strips of 48
    assert work["transform"] == pytest.approx(36 * (1024 * 16 + 1024 * 16), rel=1e-6)
    # Blocks of 12 rows are a group of 8 and one of 4; 7x7 pixels 3 vectors and 1; 5x5 two vectors.
    small = LayerShape(24, 8, (1, 1), (1, 1), (1, 1), (5, 5), (5, 5))
    assert dict(zip(SPARSE_WORK, sparse_work(small, 1.0, (12, 8)), strict=True))["pointwise"] == 24 * 8 * 32
    assert dict(zip(SPARSE_WORK, sparse_work(small, 1.0, (1, 8)), strict=True))["pointwise"] == 3 * 24 * 8 * 32


def test_the_work_of_products_is_counted() -> None:
    def work(samples: int, rows: int) -> dict[str, float]:
        shape = LayerShape(96, 64, samples=samples)
        return dict(zip(SPARSE_WORK, sparse_work(shape, 0.5, (rows, 16)), strict=True))

    # Many rows: groups of 8 output channels; X and Y are turned. A few: whole vectors of them; Y is scattered, too.
    many, few, one = work(100, 24), work(4, 24), work(1, 32)
    assert many["product"] == 96 * 64 / 2 * 100 and few["product"] == 96 * 64 / 2 * 4 * 32 / 24
    assert many["packing"] == 100 * (64 + 96) and few["packing"] == 4 * (64 + 96) and one["packing"] == 0
    assert many["output"] == 0 and few["output"] == 4 * 96 and one["input"] == 64
    assert work(100, 12)["product"] == many["product"] * 16 / 12


@pytest.mark.parametrize(("rows", "fraction"), [(64, 0.7), (197, 0.75), (4096, 0.8)])
def test_products_of_transformers_gain_in_proportion(rows: int, fraction: float) -> None:
    for outputs, inputs in ((768, 768), (3072, 768), (768, 3072), (512, 512)):
        shape = LayerShape(outputs, inputs, samples=rows)
        gain = predict_dense(shape, AVX512) / float(predict(shape, 0.3, (32, 32), AVX512))
        assert fraction < 0.3 * gain < 1.05, (outputs, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_grow_with_the_density(kind: str) -> None:
    densities = np.linspace(0, 1, 21)
    times = predict(SHAPES[kind], densities, (16, 16), AVX512)
    assert times.shape == (21,)
    assert (np.diff(times) > 0).all()
    assert times[7] == pytest.approx(float(predict(SHAPES[kind], densities[7], (16, 16), AVX512)), rel=1e-12)
    assert times[0] >= 1e-9 * AVX512.sparse["call"]


def test_large_layers_gain_in_proportion_and_small_ones_do_not() -> None:
    large = LayerShape(1024, 1024, (1, 1), (1, 1), (1, 1), (28, 28), (28, 28))
    dense = predict_dense(large, AVX512)
    assert 0.004 < dense < 0.009  # 0.82 G multiplications
    assert 0.8 < 0.25 * dense / predict(large, 0.25, (32, 32), AVX512) < 1.1
    tiny = LayerShape(32, 32, (1, 1), (1, 1), (1, 1), (1, 1), (1, 1))
    assert predict(tiny, 0.5, (16, 16), AVX512) > predict_dense(tiny, AVX512)


def test_weights_of_a_large_network_come_from_memory() -> None:
    layer = LayerShape(4096, 4096)
    cold = replace(layer, cold=True)
    assert predict_dense(cold, AVX512) > 1.5 * predict_dense(layer, AVX512)
    assert predict(cold, 0.5, (32, 32), AVX512) > 1.2 * predict(layer, 0.5, (32, 32), AVX512)
    work = dict(zip(DENSE_WORK, dense_work(cold), strict=True))
    assert (work["cold"], work["weights"]) == (2**24, 0)


def test_threads_divide_the_work_but_not_the_call() -> None:
    machine = replace(AVX512, fork=(1000.0, 2000.0), serial=(0.1, 0.2))
    for one, two, call, fork, serial in (
        (predict_dense(WIDE, machine), predict_dense(WIDE, machine, 2), machine.dense["call"], 1000, 0.1),
        (
            *(float(predict(WIDE, 0.5, (32, 32), machine, threads)) for threads in (1, 2)),
            machine.sparse["call"],
            2000,
            0.2,
        ),
    ):
        assert one / 2 < two < one
        work = one - 1e-9 * call
        assert two == pytest.approx(1e-9 * (call + fork) + work * (serial + (1 - serial) / 2))


def test_a_change_of_layout_takes_a_call_and_a_time_for_each_value() -> None:
    machine = replace(AVX512, reorder=(1000.0, 0.5), serial=(0.0, 0.0))
    assert predict_reorder(4000, machine) == pytest.approx(3e-6)
    assert predict_reorder(4000, machine, 2) == pytest.approx(2e-6)


def test_a_precision_multiplies_faster_where_the_machine_has_it() -> None:
    layer = LayerShape(512, 512, (1, 1), (1, 1), (1, 1), (28, 28), (28, 28))
    exact = float(predict(layer, 0.5, (32, 32), AVX512))
    assert float(predict(layer, 0.5, (32, 32), replace(AVX512, precisions={}), precision="bf16")) == exact
    has = replace(AVX512, precisions={"bf16": 0.5, "int8": 0.25})
    bf16, int8 = (float(predict(layer, 0.5, (32, 32), has, precision=p)) for p in ("bf16", "int8"))
    assert int8 < bf16 < 0.7 * exact
    # A 3x3 layer may be computed by Winograd's algorithm in bf16, at half the products of its float32, not in int8.
    assert float(predict(WIDE, 0.5, (32, 32), has, precision="bf16")) < 0.75 * float(predict(WIDE, 0.5, (32, 32), has))
    assert algorithms(WIDE, "bf16") == ALGORITHMS and algorithms(WIDE, "int8") == ("direct",) == algorithms(layer)


def test_every_instruction_set_has_coefficients() -> None:
    assert set(BUILT_IN) == {"avx512", "avx2", "neon", "scalar"}
    for name, machine in BUILT_IN.items():
        assert machine.name == name
        assert tuple(machine.dense) == DENSE_WORK and tuple(machine.sparse) == SPARSE_WORK
        assert machine.lanes == {"avx512": 16, "avx2": 8, "neon": 4, "scalar": 1}[name]


def test_the_fit_finds_the_coefficients_that_made_the_times() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([AVX512.sparse[name] for name in SPARSE_WORK])
    shapes = [
        LayerShape(o, i, (k, k), (s, s), (1, 1), (n, n), (n // s, n // s), b)
        for o, i, n, b in rng.choice([16, 32, 64, 128], (40, 4)) // np.array([1, 1, 4, 16])
        for k, s in ((3, 1), (3, 2), (1, 1), (5, 1))
    ] + [LayerShape(o, i, samples=n) for o, i, n in rng.choice([16, 64, 1024], (40, 3))]
    work = np.array([sparse_work(s, d, (16, 16)) for s in shapes for d in (0.1, 0.7)])
    seconds = 1e-9 * work @ truth
    found = fit(work, seconds, prior=truth * 3)  # the prior is off, and hardly counts
    predicted = 1e-9 * work @ found
    assert np.abs(predicted / seconds - 1).max() < 0.02
    assert (found >= 0).all()
    # Where no layer tells, the prior stays.
    product = SPARSE_WORK.index("product")
    assert fit(work[:8], seconds[:8], truth)[product] == pytest.approx(truth[product])


def test_the_groups_of_a_dense_layer_divide_its_work() -> None:
    """The block-sparse form has them as zeros: nothing is saved but what is dropped."""
    whole = LayerShape(256, 256, (3, 3), (1, 1), (1, 1), (28, 28), (28, 28))
    grouped = replace(whole, groups=8)
    assert predict_dense(grouped, AVX512) < predict_dense(whole, AVX512) / 4
    assert predict(grouped, 0.1, (32, 32), AVX512) == predict(whole, 0.1, (32, 32), AVX512)
