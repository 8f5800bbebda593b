"""lm-eval's own command line, with the model `twotower` beside its own models.

python -m twotower.evaluation run --model twotower --model_args mode=verified --tasks TASK
"""

from __future__ import annotations

from twotower.evaluation import check_installed


def main() -> None:
    """Registers the model, then leaves the arguments to lm-eval."""
    check_installed()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    # Where lm-eval keeps the names of its models, by the place of their classes.
    import lm_eval.models  # noqa: F401  isort: skip

    model_registry.register("twotower", target="twotower.evaluation.lm_eval_model:TwoTowerLM")
    cli_evaluate()


if __name__ == "__main__":
    main()
