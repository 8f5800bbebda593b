"""lm-eval's own command line, with the model `twotower` beside its own models.

python -m twotower.evaluation run --model twotower --model_args mode=verified --tasks TASK
"""

from __future__ import annotations

from twotower.evaluation import check_installed

NAME = "twotower"
# Loaded when it is asked for.
CLASS = "twotower.evaluation.lm_eval_model:TwoTowerLM"


def main() -> None:
    """Registers the model, then leaves the arguments to lm-eval."""
    check_installed()
    import lm_eval.__main__

    # Its own names first: it adds them only where there are none yet.
    import lm_eval.models
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=CLASS)
    lm_eval.__main__.cli_evaluate()


if __name__ == "__main__":
    main()
