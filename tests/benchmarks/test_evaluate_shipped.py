"""What the smoke test counts, on completions written by hand."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from benchmarks.evaluate_shipped import Problem, adds_code, first_line, same_first_lines

PROMPT = 'def f(x):\n    """Doubles."""'


@pytest.mark.parametrize(
    ("completion", "adds"),
    [
        ("\n    return 2 * x", True),
        ("\n    raise SystemExit", True),
        ("", False),
        ("\n\n", False),
        ("\n    # only a comment", False),
        ("\n    return (", False),
        ("\n   return x\n  y", False),
        ("\n    return '\\d'", True),
        ("\x00", False),
    ],
)
def test_completions_that_parse_and_add_code(completion: str, adds: bool) -> None:
    assert adds_code(PROMPT, completion) == adds


def test_first_lines() -> None:
    assert first_line("\n\n    return x \n    y") == "return x"
    assert first_line("") == ""
    asked = [Problem(PROMPT, "    return 2 * x\n"), Problem(PROMPT, "    y = x\n    return y\n")]
    assert same_first_lines(asked, ["\n    return 2 * x\n    z", "\n    return x"]) == 0.5
