"""Masks in PyTorch: pruned weights stay zero through training, layers are found or asked for, exports fit the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from tetris_onnx import Config, LayerPlan, LayerRule, Plan, optimize  # noqa: E402
from tetris_onnx.algorithms.blocks import original_mask  # noqa: E402
from tetris_onnx.torch import MaskError, apply_masks, remove_masks  # noqa: E402


class Net(nn.Module):
    """Scopes in a Sequential and beside it, a BatchNorm, two layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        )
        self.side = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.side(torch.relu(self.features(x)))).mean((2, 3))
        return self.last(torch.relu(self.head(x)))


def layer_plan(name: str, out: int, channels: int, block: tuple[int, int] = (8, 8), seed: int = 0) -> LayerPlan:
    rng = np.random.default_rng(seed)
    keep = np.zeros((-(-out // block[0]), -(-channels // block[1])), bool)
    keep.ravel()[rng.permutation(keep.size)[: keep.size // 2]] = True
    return LayerPlan(name, rng.permutation(out), rng.permutation(channels), block, keep)


def mask_of(plan: LayerPlan) -> torch.Tensor:
    return torch.from_numpy(original_mask(plan.keep, plan.block_size, plan.out_perm, plan.in_perm))


def train(module: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = module(torch.rand(4, 3, 8, 8, generator=generator)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


PLAN = Plan(
    (
        layer_plan("/features/features.2/Conv_output_0", 16, 16),
        layer_plan("/side/Conv_output_0", 16, 16, seed=1),
        layer_plan("/head/Gemm_output_0", 32, 16, (16, 8), seed=2),
    )
)
MATCHES = dict(zip((p.layer for p in PLAN), ("features.2", "side", "head"), strict=True))


def test_pruned_weights_stay_zero_and_the_others_learn() -> None:
    net = Net()
    before = {name: net.get_submodule(name).weight.detach().clone() for name in MATCHES.values()}
    assert apply_masks(net, PLAN) == MATCHES
    train(net)
    remove_masks(net)
    assert type(net.head) is nn.Linear and isinstance(net.head.weight, nn.Parameter)
    for layer in PLAN:
        weight = net.get_submodule(MATCHES[layer.layer]).weight.detach()
        mask = mask_of(layer)
        assert not weight[~mask].any()
        changed = weight[mask] != before[MATCHES[layer.layer]][mask]
        assert changed.float().mean() > 0.9


def test_a_checkpoint_of_the_masked_module_is_read_back() -> None:
    one, two = Net(), Net()
    for net in (one, two):
        apply_masks(net, PLAN)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.side.weight, two.side.weight)
    one.side.weight = torch.ones_like(one.side.weight)  # an assignment is masked too
    assert float(one.side.weight.detach().sum()) == 9 * int(mask_of(PLAN.layers[1]).sum())


def test_layers_are_matched_by_shape_where_names_say_nothing() -> None:
    plan = Plan((layer_plan("a", 16, 16), layer_plan("b", 16, 16), layer_plan("c", 32, 16)))
    assert apply_masks(Net(), plan) == {"a": "features.2", "b": "side", "c": "head"}


def test_names_of_the_submodules_and_given_names_come_first() -> None:
    plan = Plan((layer_plan("side", 16, 16), layer_plan("b", 32, 16)))
    assert apply_masks(Net(), plan) == {"side": "side", "b": "head"}
    plan = Plan((layer_plan("a", 16, 16), layer_plan("b", 16, 16)))
    assert apply_masks(Net(), plan, {"a": "side", "b": "features.2"}) == {"a": "side", "b": "features.2"}


@pytest.mark.parametrize(
    ("plan", "names", "message"),
    [
        (
            Plan((layer_plan("a", 16, 16),)),
            {},
            "'a' of the plan has 16 x 16 channels, which may be 'features.2', 'side'",
        ),
        (
            Plan((layer_plan("a", 64, 16),)),
            {},
            "'a' of the plan has 64 x 16 channels, but the module has no such layer",
        ),
        (Plan((layer_plan("a", 16, 16),)), {"b": "side"}, "the plan has no layer 'b'; it has 'a'"),
        (Plan((layer_plan("a", 16, 16),)), {"a": "x"}, "no convolution or linear layer 'x'; it has 'features.0'"),
        (Plan((layer_plan("a", 16, 16),)), {"a": "head"}, r"16 x 16 channels, but the weight of 'head' is \(32, 16\)"),
        (
            Plan((layer_plan("a", 16, 16), layer_plan("b", 16, 16))),
            {"a": "side", "b": "side"},
            "two layers of the plan match 'side'",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(plan: Plan, names: dict[str, str], message: str) -> None:
    net = Net()
    with pytest.raises(MaskError, match=message):
        apply_masks(net, plan, names)
    assert not any("parametrizations" in name for name, _ in net.named_parameters())


def test_masks_are_not_applied_twice() -> None:
    net = Net()
    apply_masks(net, PLAN)
    with pytest.raises(MaskError, match="call remove_masks first"):
        apply_masks(net, PLAN)


def test_works_in_data_parallel_wrappers() -> None:
    net = Net()
    apply_masks(net, PLAN)
    train(nn.DataParallel(net))
    if torch.distributed.is_available():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            train(nn.parallel.DistributedDataParallel(net))
        finally:
            torch.distributed.destroy_process_group()
    remove_masks(net)
    assert not net.head.weight[~mask_of(PLAN.layers[2])].any()


def test_a_plan_found_on_an_export_masks_the_module_it_came_from(tmp_path: Path) -> None:
    def export(net: nn.Module, name: str) -> Path:
        torch.onnx.export(net.eval(), (torch.zeros(1, 3, 8, 8),), str(tmp_path / name), input_names=["x"], dynamo=False)
        return tmp_path / name

    net = Net()
    # Asked for by name, whatever the cost model says of layers so small.
    rules = tuple(LayerRule(pattern, sparsity=0.5) for pattern in ("*features.2*", "*side*"))
    config = Config(sparsity=0.0, block_size=(8, 8), layers=rules)
    plan = optimize(export(net, "dense.onnx"), config).plan
    matches = apply_masks(net, plan)
    assert set(matches.values()) == {"features.2", "side"}
    train(net)
    remove_masks(net)
    # Nothing is left for pruning to drop: the block-sparse model computes what the fine-tuned module does.
    result = optimize(export(net, "tuned.onnx"), plan=plan)
    x = torch.rand(1, 3, 8, 8)
    import onnxruntime as ort

    session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = net.eval()(x).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-3, atol=1e-4)
    assert [p.layer for p in result.plan] == [p.layer for p in plan]
