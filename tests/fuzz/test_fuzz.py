"""A short form of the fuzzers: a few hundred files of a fixed seed."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.fuzz import fuzz_models


@pytest.mark.skipif(not hasattr(os, "fork"), reason="files are tried in processes of their own")
def test_mutated_models_end_in_a_result_or_in_one_line() -> None:
    models = fuzz_models.seeds()
    outcomes = fuzz_models.fuzz(fuzz_models.make_cases(200, seed=2026), models)
    assert [o for o in outcomes if o.kind not in fuzz_models.GOOD] == []
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert len(outcomes) == 200 and kinds["done"] > 20 and kinds["refused"] > 20, "mutations that matter, not too many"


def test_failures_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(args: list[str]) -> int:
        if args[0] == "inspect":
            os.abort()
        if args[0] == "compare":
            raise RuntimeError
        return 0  # without an output

    monkeypatch.setattr(fuzz_models.cli, "run", crash)
    models = [fuzz_models.plain_network()]
    cases = fuzz_models.make_cases(12, seed=1)
    outcomes = fuzz_models.fuzz(cases, models)
    assert [outcome.number for outcome in outcomes] == list(range(12))
    texts = {outcome.kind: outcome.text for outcome in outcomes}
    assert texts.keys() == {"crash", "half a file"}
    assert any("SIGABRT" in outcome.text for outcome in outcomes)
    assert any("exit code 1" in outcome.text for outcome in outcomes)


def test_a_case_is_the_same_each_time() -> None:
    models = fuzz_models.seeds()
    cases = fuzz_models.make_cases(20, seed=5)
    assert cases == fuzz_models.make_cases(30, seed=5)[:20]
    files = [fuzz_models.files(case, models) for case in cases]
    assert files == [fuzz_models.files(case, models) for case in cases]
    assert len({str(each) for each in files}) > 15, "a few mutations change nothing"
