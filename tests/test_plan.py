"""Plans: what is accepted, saved and loaded, and that no file does harm."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tetris_onnx.plan import LayerPlan, Plan, PlanError


def layer_plan(name: str = "conv", out: int = 6, in_: int = 4, block: tuple[int, int] = (4, 2)) -> LayerPlan:
    rng = np.random.default_rng(0)
    grid = -(-out // block[0]), -(-in_ // block[1])
    return LayerPlan(name, rng.permutation(out), rng.permutation(in_), block, rng.random(grid) < 0.5)


def arrays(plan: Plan, tmp_path: Path) -> dict[str, Any]:
    plan.save(tmp_path / "plan.npz")
    with np.load(tmp_path / "plan.npz") as file:
        return dict(file)


class TestLayerPlan:
    def test_density_counts_cut_off_blocks_with_their_size(self) -> None:
        plan = LayerPlan("a", np.arange(6), np.arange(3), (4, 2), np.array([[True, False], [False, True]]))
        assert plan.shape == (6, 3)
        assert plan.density == pytest.approx((4 * 2 + 2 * 1) / 18) and plan.sparsity == pytest.approx(8 / 18)

    @pytest.mark.parametrize(
        "perm", [[0, 0, 1], [1, 2, 3], [-1, 0, 1], [], [[0, 1, 2]], [0.0, 1.0, 2.0], np.array([0, 1, 2], np.int32)]
    )
    @pytest.mark.parametrize("which", ["out_perm", "in_perm"])
    def test_permutations(self, perm: Any, which: str) -> None:
        perms = {"out_perm": np.arange(3), "in_perm": np.arange(3), which: np.asarray(perm)}
        with pytest.raises(PlanError, match=f"layer 'a': {which} is no permutation"):
            LayerPlan("a", **perms, block_size=(3, 3), keep=np.ones((1, 1), bool))

    @pytest.mark.parametrize("block", [(0, 3), (3,), (4, 3), (3, 10**9), (2.0, 3.0), (-1, 1)])
    def test_block_sizes(self, block: Any) -> None:
        with pytest.raises(PlanError, match="layer 'a': block size"):
            LayerPlan("a", np.arange(3), np.arange(3), block, np.ones((1, 1), bool))

    @pytest.mark.parametrize("keep", [np.ones((2, 1), bool), np.ones((1, 1)), np.ones(1, bool)])
    def test_keep_masks(self, keep: Any) -> None:
        with pytest.raises(PlanError, match=r"layer 'a': the keep mask is .*make bool \(1, 1\)"):
            LayerPlan("a", np.arange(3), np.arange(3), (3, 3), keep)

    def test_a_layer_is_there_once(self) -> None:
        with pytest.raises(PlanError, match="twice"):
            Plan((layer_plan(), layer_plan()))

    def test_get(self) -> None:
        plan = Plan((layer_plan("a"), layer_plan("b")))
        found = plan.get("b")
        assert found is not None and found.layer == "b"
        assert plan.get("c") is None and len(plan) == 2 and [p.layer for p in plan] == ["a", "b"]


class TestFile:
    @pytest.mark.parametrize("count", [0, 1, 12])
    def test_roundtrip(self, tmp_path: Path, count: int) -> None:
        plan = Plan(tuple(layer_plan(f"features.{i}/Conv:0 é", 5 + i, 7, (2, 3)) for i in range(count)))
        plan.save(tmp_path / "plan.npz")
        loaded = Plan.load(tmp_path / "plan.npz")
        assert len(loaded) == count
        for a, b in zip(plan, loaded, strict=True):
            assert (a.layer, a.block_size) == (b.layer, b.block_size)
            for field in ("out_perm", "in_perm", "keep"):
                np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        assert [p.name for p in tmp_path.iterdir()] == ["plan.npz"]

    def test_the_path_is_taken_as_it_is(self, tmp_path: Path) -> None:
        Plan(()).save(tmp_path / "plan")
        assert [p.name for p in tmp_path.iterdir()] == ["plan"]
        assert len(Plan.load(str(tmp_path / "plan"))) == 0

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot write"):
            Plan(()).save(tmp_path / "no" / "plan.npz")


def refused(path: Path, match: str = ".") -> None:
    with pytest.raises(PlanError, match=match) as error:
        Plan.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.count(str(path)) == 1
    assert "\n" not in message and "pickle" not in message.removeprefix(str(path))


class TestHostileFiles:
    def test_missing_folder_and_garbage(self, tmp_path: Path) -> None:
        refused(tmp_path / "no.npz", "no such file")
        refused(tmp_path, "not a regular file")
        for content in (b"", b"garbage", b"PK\x03\x04" + bytes(100), bytes(1000), pickle.dumps({"a": 1})):
            (tmp_path / "x.npz").write_bytes(content)
            refused(tmp_path / "x.npz", "not a plan")

    def test_truncated_and_flipped(self, tmp_path: Path) -> None:
        Plan((layer_plan(),)).save(tmp_path / "plan.npz")
        data = (tmp_path / "plan.npz").read_bytes()
        path = tmp_path / "x.npz"
        for length in range(0, len(data), 37):
            path.write_bytes(data[:length])
            refused(path)
        rng = np.random.default_rng(0)
        for _ in range(200):
            broken = bytearray(data)
            broken[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(broken))
            try:
                Plan.load(path)  # a bit that nobody reads, or a name, may be flipped
            except PlanError as error:
                assert "\n" not in str(error)

    def test_other_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", a=np.ones(3))
        refused(tmp_path / "x.npz", "not a plan")
        np.save(tmp_path / "x.npy", np.ones(3))
        refused(tmp_path / "x.npy", "not a plan")

    @pytest.mark.parametrize("missing", ["format", "layers", "0.out_perm", "0.keep", "0.block_size"])
    def test_missing_keys(self, tmp_path: Path, missing: str) -> None:
        content = arrays(Plan((layer_plan(),)), tmp_path)
        del content[missing]
        np.savez(tmp_path / "x.npz", **content)
        refused(tmp_path / "x.npz", "not a plan")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", np.array("tetris-onnx plan 99")),
            ("layers", np.array("conv")),
            ("layers", np.array(["conv", "conv"])),
            ("0.out_perm", np.array([0, 1, 2, 3, 4, 4])),
            ("0.out_perm", np.array([0.0, 1, 2, 3, 4, 5])),
            ("0.in_perm", np.array([0, 1, 2, 2**62])),
            ("0.block_size", np.array([4])),
            ("0.block_size", np.array([4, 10**9])),
            ("0.block_size", np.array([4.0, 2.0])),
            ("0.keep", np.ones((2, 3), bool)),
            ("0.keep", np.ones((2, 2))),
        ],
    )
    def test_wrong_values(self, tmp_path: Path, key: str, value: Any) -> None:
        content = arrays(Plan((layer_plan(),)), tmp_path)
        np.savez(tmp_path / "x.npz", **(content | {key: value}))
        refused(tmp_path / "x.npz")

    def test_no_pickle_is_ever_run(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self) -> tuple:
                return (marker.touch, ())

        content = arrays(Plan((layer_plan(),)), tmp_path)
        np.savez(tmp_path / "x.npz", **(content | {"0.keep": np.array([Evil()], dtype=object)}))
        refused(tmp_path / "x.npz")
        assert not marker.exists()

    def test_huge_claims(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A header that says 10**12 numbers, and a member that unpacks to more than any plan has."""
        content = arrays(Plan((layer_plan(),)), tmp_path)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
        np.savez(tmp_path / "x.npz", **{k: v for k, v in content.items() if k != "0.out_perm"})
        with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
            archive.writestr("0.out_perm.npy", header.getvalue())
        refused(tmp_path / "x.npz")

        monkeypatch.setattr("tetris_onnx.plan._MAX_BYTES", 2**20)
        path = tmp_path / "bomb.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("layers.npy", bytes(2**21))
        refused(path, "more than any plan")
