"""Completes a file of requests in OpenAI's batch format, with a service of its own.

The same command goes on after an interruption. `python examples/batch_job.py`
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from twotower.batch import BatchDefaults, JobOptions, run_job

PROMPTS = ["def read(path):\n", "class Point:\n", "import os\n", ""]

if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "requests.jsonl"), Path(folder, "answers.jsonl")
        lines = [
            {
                "custom_id": f"request-{index}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": prompt, "max_tokens": 16},
            }
            for index, prompt in enumerate(PROMPTS)
        ]
        source.write_text("\n".join(map(json.dumps, lines)))
        options = JobOptions(
            inputs=(str(source),),
            output=str(target),
            defaults=BatchDefaults(body={"mode": "verified"}),
            service={"num_threads": 1},
            ordered=True,
        )
        summary = run_job(options)
        for line in target.read_text().splitlines():
            answer = json.loads(line)
            print(answer["custom_id"], repr(answer["response"]["body"]["choices"][0]["text"]))
        print(summary.to_dict())
