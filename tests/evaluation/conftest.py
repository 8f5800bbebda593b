"""lm-eval without a network or a home, small tasks in files, and the shipped model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twotower import TwoTower

ROWS = [
    {"context": "import os\nimport", "choices": [" sys", " class", "("], "gold": 0},
    {"context": "class A:\n    def __init__(self", "choices": ["):", "[", " import"], "gold": 0},
    {"context": "if x is None:\n    return", "choices": [" 7 7 7 7", " None"], "gold": 1},
]
# Name, then what is the task's own.
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "tiny_until": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{line}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="session")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package, told before it is imported that there is no network, nor a home."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        import lm_eval
        import lm_eval.tasks

        # It asks the machine for compilers and processors, which takes a second.
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked")
        yield lm_eval


@pytest.fixture(scope="session")
def shipped() -> TwoTower:
    """The shipped model through this package's own API."""
    return TwoTower.from_pretrained()


@pytest.fixture(scope="session")
def lines(shipped: TwoTower) -> list[str]:
    """The context tower's own line after each context."""
    results = shipped.generate(
        [str(row["context"]) for row in ROWS],
        mode="ar",
        max_tokens=12,
        stop=["\n"],
        eos_token_id=shipped.config.eos_token_id,
    )
    return [result.text for result in results]


@pytest.fixture
def task_folder(tmp_path: Path, lines: list[str]) -> Path:
    """A folder of task files; the greedy line of the last row is wrong on purpose."""
    data = tmp_path / "rows.jsonl"
    rows = [{**row, "line": line} for row, line in zip(ROWS, [*lines[:-1], "?"], strict=True)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f'dataset_kwargs: {{data_files: {{test: "{data}"}}}}'
        (tmp_path / f"{name}.yaml").write_text(head + text, encoding="utf-8")
    return tmp_path
