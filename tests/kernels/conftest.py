"""Fixtures of the tests of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter, where there is one, multiply bf16 as numbers and not as their bits."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    multiply = interpreter.InterpreterBuilder.create_dot
    language = pytest.importorskip("triton.language")

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != language.bfloat16:
            return operand
        bits = operand.data.view("uint16").astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), language.float32)

    def correct(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(builder, widened(a), widened(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", correct)
