"""lm-eval's `hf` model on two-tower checkpoints, offline: two small tasks, each against this
package's own scores and texts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from twotower import TwoTower
from twotower.transformers import SHIPPED_MODEL

pytestmark = [
    pytest.mark.clients,
    # lm-eval and the packages that it brings use spellings that are deprecated.
    pytest.mark.filterwarnings("default"),
]

CHOICES = [
    {"context": "import os\nimport", "choices": [" sys", " class", "("], "gold": 0},
    {"context": "class A:\n    def __init__(self", "choices": ["):", "[", " import"], "gold": 0},
    {"context": "if x is None:\n    return", "choices": [" None", " 7 7 7 7"], "gold": 0},
]
PROMPTS = ["    def test_open(self):", "import os\nimport", "class A:\n    def __init__(self):\n"]
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
UNTIL_TASK = """
task: tiny_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/prompts.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, told before it is imported that there is no network, nor a home."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks

        yield lm_eval


def evaluated(lm_eval: Any, model: Any, folder: Path) -> dict[str, Any]:
    """Results of both tasks, whose files are written to `folder`."""
    own = TwoTower.from_pretrained()
    lines = [json.dumps(line) for line in CHOICES]
    (folder / "choices.jsonl").write_text("\n".join(lines), encoding="utf-8")
    targets = [{"prompt": prompt, "target": greedy_line(own, prompt)} for prompt in PROMPTS]
    lines = [json.dumps(line) for line in targets]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, text in (("choice", CHOICE_TASK), ("until", UNTIL_TASK)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    tasks = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    names = ["tiny_choice", "tiny_until"]
    return lm_eval.simple_evaluate(  # type: ignore[no-any-return]
        model=model, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True
    )


def greedy_line(model: TwoTower, prompt: str) -> str:
    """What the context tower writes after a prompt, up to the end of the line."""
    eos = model.config.eos_token_id
    (result,) = model.generate([prompt], mode="ar", max_tokens=NEW_TOKENS, eos_token_id=eos)
    return result.text.split("\n")[0]


@pytest.mark.parametrize("given", ["folder", "model"])
def test_both_kinds_of_task(lm_eval: Any, shipped: Any, tmp_path: Path, given: str) -> None:
    lm = lm_eval.models.huggingface.HFLM(
        pretrained=str(SHIPPED_MODEL) if given == "folder" else shipped,
        tokenizer=str(SHIPPED_MODEL),
        device="cpu",
        dtype="float32",
        batch_size=2,
    )
    found = evaluated(lm_eval, lm, tmp_path)
    # The targets are the context tower's own lines; padding and batches change none of them.
    assert found["results"]["tiny_until"]["exact_match,none"] == 1.0
    own = TwoTower.from_pretrained()
    right = 0
    for sample, case in zip(found["samples"]["tiny_choice"], CHOICES, strict=True):
        got = [float(response[0][0]) for response in sample["resps"]]
        want = [score(own, case["context"], choice) for choice in case["choices"]]
        assert got == pytest.approx(want, abs=1e-3)
        right += want.index(max(want)) == case["gold"]
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(CHOICES))


def score(model: TwoTower, context: Any, choice: str) -> float:
    """The context tower's log-probability of a choice after its context."""
    start = len(model.encode(context))
    return sum(model.score(model.encode(context + choice))[start - 1 :])
