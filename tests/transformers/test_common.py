"""Transformers' own common model tests: what a dense class passes, its sparse class passes too, or is an exception.

Run by `make test-transformers` (`-m transformers`); on first use they are fetched from the package index.
"""

from __future__ import annotations

import gc
import unittest
import warnings
from dataclasses import dataclass
from functools import cache

import pytest
from transformers import set_seed
from transformers.utils import logging

from tests.transformers import sdist
from tests.transformers.exceptions import expected_failure
from tests.transformers.testers import SUITES, test_case

# tests of what models of text do not have
OTHER_KINDS = ("_image_", "_video_", "_audio_", "_vision_", "multimodal", "deepspeed")

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]
# it makes test cases and is none
test_case.__test__ = False


@dataclass(frozen=True)
class Outcome:
    """What one test came to: "passed", "skipped" or "failed", and why; one in parts has passed if a part has."""

    status: str
    reason: str = ""
    skipped_parts: int = 0


class _Result(unittest.TestResult):
    passed = 0

    def addSuccess(self, test):  # noqa: N802 (a method of unittest)
        super().addSuccess(test)
        self.passed += 1

    def addSubTest(self, test, subtest, err):  # noqa: N802
        super().addSubTest(test, subtest, err)
        self.passed += err is None


@cache
def _case(family: str, sparse: bool) -> type[unittest.TestCase]:
    return test_case(SUITES[family], sparse)


def _names(family: str) -> list[str]:
    case = _case(family, True)
    found = [name for name in dir(case) if name.startswith("test_") and callable(getattr(case, name))]
    return [name for name in found if not any(kind in name for kind in OTHER_KINDS)]


def _run(family: str, name: str, sparse: bool) -> Outcome:
    set_seed(0)
    result = _Result()
    # some tests look for a warning among those they record; kept out of pytest's summary
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        _case(family, sparse)(name).run(result)
    gc.collect()
    wrong = [text for _, text in result.errors + result.failures]
    # a skip of pytest's is no skip to unittest
    skips = [reason for _, reason in result.skipped] + [text for text in wrong if "Skipped: " in text]
    wrong = [text for text in wrong if text not in skips]
    if wrong:
        return Outcome("failed", "\n".join(wrong))
    return Outcome("passed", "", len(skips)) if result.passed else Outcome("skipped", skips[0])


def pytest_generate_tests(metafunc):
    # collecting alone must neither fetch nor import what was not asked for
    asked = metafunc.config.option.markexpr.strip() == "transformers"
    for name in sdist.marks() if asked else ():
        # ours are strict, and theirs are made when their tests are imported
        metafunc.config.addinivalue_line("markers", f"{name}: of Transformers")
    cases = [(family, name) for family in SUITES for name in _names(family)] if asked else []
    metafunc.parametrize(("family", "name"), cases)


@pytest.fixture(autouse=True)
def _as_released():
    # others read what models log
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


def test_common(family, name):
    dense = _run(family, name, sparse=False)
    if dense.status != "passed":
        pytest.skip(f"the dense class: {dense.status}: {dense.reason.strip().splitlines()[-1]}")
    sparse = _run(family, name, sparse=True)
    reason = expected_failure(family, name)
    if reason is None:
        assert sparse.status == "passed", f"{sparse.status}: {sparse.reason}"
        assert sparse.skipped_parts <= dense.skipped_parts, "the sparse class skips parts that the dense one does not"
    elif sparse.status == "passed":
        pytest.fail(f"listed in exceptions.py, and passes: {reason}")
    else:
        pytest.xfail(reason)
