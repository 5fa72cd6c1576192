"""Everything that is decided before a model is rewritten: which blocks stay, in which order, with which weights.

One sparsity, speed-up or plan in, one `Decision` out; or the sparsest one that still answers well enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.config import Config
from tetris_onnx.data.calibration import (
    CalibrationError,
    Data,
    InputSpec,
    Samples,
    count,
    fixed_batch,
    model_inputs,
    select,
)
from tetris_onnx.errors import TetrisError
from tetris_onnx.operators import choose
from tetris_onnx.passes import NewWeights
from tetris_onnx.plan import Plan
from tetris_onnx.planner import Candidate, Progress, make_plan, match_plan, survey
from tetris_onnx.reports.report import LayerReport
from tetris_onnx.timing.cost import Machine

if TYPE_CHECKING:
    from tetris_onnx.accuracy.sensitivity import Sensitivity

# Halvings of the range of sparsities: the last one is 1.6 points wide.
_TRIALS = 6
_SEARCHED = 4  # one in so many labeled calibration samples measures the accuracy, and fits no weights


class DropError(TetrisError, ValueError):
    """No plan loses as little accuracy as was allowed."""


@dataclass(frozen=True, eq=False)
class Decision:
    """A plan, the weights of the layers that were fitted, by name, and a row per layer."""

    plan: Plan
    weights: dict[str, NewWeights]
    rows: list[LayerReport]
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class Problem:
    """What is decided on: a prepared graph, the same as a model, and the samples if there are any."""

    graph: gs.Graph
    model: onnx.ModelProto
    machine: Machine | None = None  # to predict times with; None: as `machine.load_machine` knows it
    samples: Samples | None = None
    progress: Progress | None = None
    sensitivities: list[Sensitivity] | None = None  # once they are known

    def decide(self, config: Config, plan: Plan | None = None) -> Decision:
        """The plan (or the given one) for ``config``. With samples, its weights are fitted.

        Raises `PlanError` for a plan of another model, `BudgetError` where the allocation's budget is out of reach.
        """
        candidates = survey(self.graph, config, self.machine, plan)
        predictions: dict[str, tuple[float, float]] = {}
        weights: dict[str, NewWeights] = {}
        notes: tuple[str, ...] = ()
        if plan is not None:
            rows = match_plan(candidates, plan, config)
        elif config.allocation != "uniform":
            candidates, predictions = self._allocate(candidates, config)
        if self.samples is not None:
            # These bring scipy, which takes its time to load.
            from tetris_onnx.accuracy.refine import recover_and_refine
            from tetris_onnx.data.augment import image_inputs

            recovery, notes = recover_and_refine(
                self.graph, candidates, self.model, config, self.samples, plan, self.progress
            )
            if config.augment and not image_inputs(self.samples, model_inputs(self.model)):
                notes += ("no varied copies: no input is an image (four axes, one to four channels, floats)",)
            plan, weights, rows = recovery.plan, recovery.weights, recovery.rows
        elif plan is None:
            plan, rows = make_plan(candidates, config, self.progress)
        for i, row in enumerate(rows):
            if row.layer in predictions:
                sensitivity, loss = predictions[row.layer]
                rows[i] = replace(row, sensitivity=sensitivity, predicted_loss=loss)
        return Decision(plan, weights, rows, notes)

    def sparsest(self, config: Config, most: float, lost: Callable[[Decision], float]) -> Decision:
        """The sparsest plan that loses ``most`` points of accuracy at most, by bisection over ``config.sparsity``.

        ``lost``: the points that a decision loses. Raises `DropError` where every plan tried loses more.
        """
        from tetris_onnx.algorithms.allocation import BudgetError

        best: Decision | None = None
        low, high, tried = 0.0, 1.0, []
        for trial in range(_TRIALS):
            if self.progress is not None:
                self.progress("max-drop", trial, _TRIALS)
            sparsity = (low + high) / 2
            try:
                found = self.decide(replace(config, sparsity=sparsity))
            except BudgetError:
                high = sparsity
                continue
            points = lost(found)
            tried.append(f"{sparsity:.3f}: {points:+.1f}")
            if points <= most:
                best, low, text = found, sparsity, f"sparsity {sparsity:.3f} loses {points:.1f} points of accuracy"
            else:
                high = sparsity
        if self.progress is not None:
            self.progress("max-drop", _TRIALS, _TRIALS)
        if best is None:
            raise DropError(
                f"every plan loses more than {most:g} points of accuracy (sparsity: points lost; {', '.join(tried)}); "
                "allow more, or give calibration samples"
            )
        note = f"{text}, at most {most:g} were allowed (tried {', '.join(tried)})"
        return replace(best, notes=(note, *best.notes))

    def _allocate(
        self, candidates: list[Candidate], config: Config
    ) -> tuple[list[Candidate], dict[str, tuple[float, float]]]:
        """The candidates with the sparsities of the allocation; by layer, its sensitivity and its predicted loss."""
        from tetris_onnx.accuracy.sensitivity import estimate, measure
        from tetris_onnx.budget import predicted_loss, spread

        if self.sensitivities is None:
            self.sensitivities = (
                estimate(candidates, config, self.progress)
                if self.samples is None
                else measure(candidates, self.model, config, self.samples, self.progress)
            )
        chosen = spread(candidates, self.sensitivities, config)
        if config.target == "cpu":
            chosen = choose(self.graph, chosen)
        predicted = predicted_loss(chosen, self.sensitivities)
        return chosen, {s.layer: (s.half, predicted[s.layer]) for s in self.sensitivities}


def split(data: Data, inputs: Sequence[InputSpec]) -> tuple[Data, Data]:
    """Labeled samples as (those to fit weights with, those to measure the accuracy on), in whole batches.

    Raises `CalibrationError` where there are too few.
    """
    n, batch = count(data.samples, inputs), fixed_batch(inputs) or 1
    some = n // _SEARCHED // batch * batch
    if some == 0 or data.labels is None:
        raise CalibrationError(f"{data.source}: {n} labeled samples are too few to fit weights and to measure accuracy")
    # Spread over all of them: files are often in the order of the classes.
    searched = np.zeros(n, bool)
    searched[np.linspace(_SEARCHED - 1, n - 1, some).round().astype(np.int64)] = True
    fitted = np.flatnonzero(~searched)
    return _part(data, inputs, fitted[: len(fitted) // batch * batch]), _part(data, inputs, np.flatnonzero(searched))


def _part(data: Data, inputs: Sequence[InputSpec], which: NDArray[np.int64]) -> Data:
    return replace(
        data, samples=select(data.samples, inputs, which), labels=None if data.labels is None else data.labels[which]
    )
