"""lm-eval's model class in process, against the package's own API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.evaluation.conftest import ROWS
from twotower import TwoTower
from twotower.evaluation.in_process import InProcess
from twotower.towers.errors import InvalidRequestError

pytestmark = pytest.mark.filterwarnings("default")
CONTEXTS = [str(row["context"]) for row in ROWS]
GREEDY = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}


@pytest.fixture(scope="module")
def backend() -> InProcess:
    return InProcess(rows=4)


@pytest.fixture
def make(lm_eval: Any, backend: InProcess) -> Any:
    """Makes models of the class over one loaded backend."""
    assert lm_eval is not None
    from twotower.evaluation.lm_eval_model import TwoTowerLM

    return lambda **settings: TwoTowerLM(backend=backend, batch_size=4, **settings)


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def texts(lm: Any, arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    return list(lm.generate_until(asked(*arguments), disable_tqdm=True))


def test_the_class_is_registered(make: Any) -> None:
    from lm_eval.api.registry import get_model

    assert type(make()) is get_model("twotower")


def test_lm_evals_own_command_has_the_model(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.registry import get_model

    from twotower.evaluation.__main__ import main

    called: list[Any] = []
    monkeypatch.setattr(
        "lm_eval.__main__.cli_evaluate", lambda: called.append(get_model("twotower"))
    )
    main()
    assert called == [type(make())]
    assert get_model("hf") is not None


def test_continuations_have_the_context_towers_scores(
    make: Any, shipped: TwoTower, lines: list[str]
) -> None:
    pairs = [(row["context"], choice) for row in ROWS for choice in row["choices"]]  # type: ignore[attr-defined]
    pairs += list(zip(CONTEXTS, lines, strict=True))
    found = make().loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, continuation), (log_prob, is_greedy) in zip(pairs, found, strict=True):
        start = len(shipped.encode(context))
        want = sum(shipped.score(shipped.encode(context + continuation))[start - 1 :])
        assert log_prob == pytest.approx(want, abs=1e-4)
        logits = shipped.logits([context + continuation])[0][start - 1 : -1]
        greedy = logits.argmax(-1).tolist() == shipped.encode(context + continuation)[start:]
        assert is_greedy == greedy
    assert {is_greedy for _, is_greedy in found} == {True, False}


def test_an_empty_context_is_the_prefix_token(make: Any, shipped: TwoTower) -> None:
    ids = shipped.encode("import os")
    for settings, prefix in (({}, shipped.config.eos_token_id), ({"prefix_token_id": 1}, 1)):
        assert prefix is not None
        [(log_prob, _)] = make(**settings).loglikelihood(asked(("", "import os")))
        assert log_prob == pytest.approx(sum(shipped.score([prefix, *ids])), abs=1e-4)


def test_a_rolling_text_is_scored_in_windows(
    make: Any, shipped: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make()
    text = "def read(path):\n    with open(path) as file:\n        return file.read()\n"
    ids = shipped.encode(text)
    monkeypatch.setattr(lm.backend, "max_context", 9)
    assert lm.max_length == 8 < len(ids)
    [found] = lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    # Every window reads 8 tokens; the last begins earlier, so that it is as long as the others.
    whole = [lm.eot_token_id, *ids]
    want = 0.0
    for done, end in pairwise([0, *range(8, len(ids), 8), len(ids)]):
        want += sum(shipped.score(whole[end - 8 : end + 1])[done - end :])
    assert found == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "verified", "mock_ar"])
def test_texts_are_those_of_the_api(make: Any, shipped: TwoTower, mode: Any) -> None:
    how: dict[str, Any] = {"mode": mode, "block_size": 8, "draft_source": "denoiser"}
    lm = make(**how)
    found = texts(lm, [(context, GREEDY) for context in CONTEXTS])
    eos = shipped.config.eos_token_id
    settings: dict[str, Any] = {**how, "max_tokens": 12, "stop": ["\n"]}
    results = shipped.generate(CONTEXTS, eos_token_id=eos, **settings)
    assert found == [result.text for result in results]
    assert lm.spent.completions == len(CONTEXTS)
    assert lm.spent.tokens == sum(len(result.token_ids) for result in results)
    assert lm.spent.nfe == sum(result.nfe for result in results)
    assert (lm.spent.report()["tokens_per_nfe"] is None) == (mode == "ar")


def test_draws_belong_to_prompts(make: Any) -> None:
    warm = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    arguments = [(context, warm) for context in CONTEXTS]
    together = texts(make(), arguments)
    assert [texts(make(), [one])[0] for one in arguments] == together
    assert texts(make(), arguments[::-1]) == together[::-1]
    assert texts(make(seed=5), arguments) != together
    assert len(set(texts(make(), arguments[:1] * 4))) > 1


def test_long_prompts_lose_their_beginning(
    make: Any, shipped: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make(mode="ar")
    text = "import os\n" * 20 + CONTEXTS[0]
    monkeypatch.setattr(lm.backend, "max_context", 32)
    [found] = texts(lm, [(text, GREEDY)])
    ids = shipped.encode(text)[-20:]
    [want] = shipped.generate([ids], mode="ar", max_tokens=12, stop=["\n"])
    assert found == want.text
    assert lm.spent.cut_prompts == 1
    with pytest.raises(InvalidRequestError, match="max_tokens: got 40, expected at most 31"):
        texts(lm, [(text, {**GREEDY, "max_gen_toks": 40})])
    with pytest.raises(InvalidRequestError, match="continuation"):
        lm.loglikelihood(asked(("a", "import os\n" * 40)), disable_tqdm=True)
    [(log_prob, _)] = lm.loglikelihood(asked((text, " sys")), disable_tqdm=True)
    whole = shipped.encode(text + " sys")
    assert log_prob == pytest.approx(sum(shipped.score(whole[-32:])[-1:]), abs=1e-4)


def test_the_denoisers_bound_takes_the_place_of_scores(make: Any) -> None:
    lm = make(likelihood="denoiser", samples=4)
    pair = (CONTEXTS[0], " sys.path.append(os.path.dirname(__file__))\n")
    [(bound, _)] = lm.loglikelihood(asked(pair), disable_tqdm=True)
    [(score, _)] = make().loglikelihood(asked(pair), disable_tqdm=True)
    assert bound != score
    assert bound < 0
    assert lm.spent.scored_nfe > 0
    assert lm.get_model_info()["samples"] == 4
    [rolling] = lm.loglikelihood_rolling(asked((pair[1],)), disable_tqdm=True)
    assert rolling < 0


def test_scores_are_the_recorded_ones(folder: Path) -> None:
    cases = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["cases"]
    [case] = [case["id"] for case in cases if case["kind"] == "score"]
    recorded = load_file(folder / "golden.safetensors")
    found = InProcess(str(folder), rows=2).score(recorded[f"{case}/tokens"].tolist())
    for scored, want in zip(found, recorded[f"{case}/token_logprobs"], strict=True):
        assert scored.log_probs == pytest.approx(want.tolist(), abs=1e-3)
        assert len(scored.best) == len(scored.log_probs)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "beam"}, "mode: got 'beam'"),
        ({"likelihood": "both"}, "likelihood: got 'both', expected one of context, denoiser"),
        ({"samples": 0}, "samples: got 0"),
        ({"batch_size": "many"}, "batch_size: got 'many'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"beams": 3}, "param: got 'beams'"),
        ({"pretrained": "no-such-folder"}, "no-such-folder"),
    ],
)
def test_wrong_settings_are_named(lm_eval: Any, settings: dict[str, Any], text: str) -> None:
    assert lm_eval is not None
    from twotower.evaluation.lm_eval_model import TwoTowerLM
    from twotower.towers.errors import TwoTowerError

    with pytest.raises(TwoTowerError, match=text):
        TwoTowerLM(**settings)


def test_services_do_not_judge_with_the_denoiser(lm_eval: Any, shipped: TwoTower) -> None:
    assert lm_eval is not None
    from twotower.evaluation.lm_eval_model import TwoTowerLM

    service: Any = SimpleNamespace(encode=shipped.encode, decode=shipped.decode)
    with pytest.raises(InvalidRequestError, match="services do not judge with the denoiser"):
        TwoTowerLM(backend=service, likelihood="denoiser")
