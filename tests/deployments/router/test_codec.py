"""Messages to dataclasses: defaults where a field is unset, the given value where it is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from twotower.deployments.completions.completions import Completion
from twotower.deployments.completions.counters import RouterLoad
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.router import codec
from twotower.deployments.telemetry.record import Origin, Recorder
from twotower.deployments.telemetry.router_metrics import RouterMetrics
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block, ProvisionalBlock, Scores
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams


class Letters:
    """A tokenizer of one id per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def test_unset_fields_take_the_defaults() -> None:
    params = codec.params_of(pb.SamplingParams(), eos_token_id=2)
    assert params.seed is not None
    assert params == GenerationParams(seed=params.seed, eos_token_id=2)


def test_every_scalar_of_the_message_arrives() -> None:
    given = {
        "mode": "ar",
        "max_tokens": 5,
        "block_size": 4,
        "steps_per_block": 3,
        "confidence_threshold": 0.5,
        "temperature": 0.25,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.125,
        "seed": 11,
        "draft_steps": 3,
        "min_tokens": 2,
        "min_steps_per_block": 2,
        "min_confidence_threshold": 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "top_logprobs": 4,
        "provisional": True,
        "quality": "fast",
        "draft_source": "denoiser",
        "acceptance": "mix",
        "mix_ratio": 0.625,
        "commit_rule": "released",
        "first_token": "context",
    }
    optional = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert optional == {*given, "stop", "logit_bias", "ignore_eos", "logprobs"}
    message = pb.SamplingParams(**given, stop=["a", "\n\n"], logit_bias={7: -1.5, 3: 0.25})
    params = codec.params_of(message, eos_token_id=2)
    assert params.stop == ("a", "\n\n")
    assert params.logit_bias == ((3, 0.25), (7, -1.5))
    assert {name: getattr(params, name) for name in given} == given


def test_zero_is_a_value() -> None:
    message = pb.SamplingParams(confidence_threshold=0.0, min_p=0.0, seed=0)
    params = codec.params_of(message, eos_token_id=None)
    assert (params.confidence_threshold, params.min_p, params.seed) == (0.0, 0.0, 0)
    with pytest.raises(InvalidRequestError, match="max_tokens: got 0"):
        codec.params_of(pb.SamplingParams(max_tokens=0), eos_token_id=None)


def test_ignore_eos() -> None:
    assert codec.params_of(pb.SamplingParams(ignore_eos=True), 2).eos_token_id is None
    assert codec.params_of(pb.SamplingParams(ignore_eos=False), 2).eos_token_id == 2


BLOCK = Block(
    start=5,
    token_ids=(8, 9),
    commit_steps=(1, 0),
    confidences=(0.5, 0.25),
    nfe=2,
    finish_reason="stop",
    log_probs=(-0.75, -1.5),
    accepted_tokens=3,
    drafted_tokens=4,
    cached_tokens=5,
    lookup_accepted_tokens=1,
    lookup_drafted_tokens=2,
    drafted_by="lookup",
)


PLAIN = GenerationParams()


USAGE = pb.Usage(
    prompt_tokens=5,
    completion_tokens=2,
    nfe=2,
    cached_tokens=5,
    accepted_tokens=3,
    drafted_tokens=4,
    lookup_accepted_tokens=1,
    lookup_drafted_tokens=2,
)


def completion(log: CommitLog, params: GenerationParams = PLAIN, index: int = 0) -> Completion:
    """A completion that has got as far as its log."""
    text = OutputText(Letters(), params)
    attempts: Any = None
    job = Job("row", tuple(range(log.prompt_tokens)), (), params)
    recorder = Recorder(RouterMetrics("tiny"), lambda _: "UNKNOWN")
    record = recorder.completion(Origin("r-1", "", None, 0.0), job.params.mode, log)
    return Completion(attempts, RouterLoad(), job, text, log, index, lambda _: None, record)


def log_of_one_block() -> CommitLog:
    log = CommitLog(5, ())
    log.append(BLOCK)
    return log


def test_a_block_comes_with_what_was_spent_up_to_it() -> None:
    log = log_of_one_block()
    want = pb.Block(
        index=0,
        start=5,
        token_ids=[8, 9],
        text="ab",
        commit_steps=[1, 0],
        confidences=[0.5, 0.25],
        usage=USAGE,
        drafted_by="lookup",
    )
    assert codec.block_event(completion(log), BLOCK, "ab", log_probs=False).block == want
    log.append(replace(BLOCK, start=7, nfe=5, cached_tokens=9))
    second = codec.block_event(completion(log), BLOCK, "", log_probs=False).block
    assert second.index == 1
    assert (second.usage.completion_tokens, second.usage.nfe) == (4, 7)
    assert second.usage.cached_tokens == 5


def test_log_probabilities_are_sent_if_asked_for() -> None:
    row = completion(log_of_one_block())
    asked = codec.block_event(row, BLOCK, "ab", log_probs=True).block
    assert list(asked.log_probs) == [-0.75, -1.5]


def test_blocks_of_a_request_with_floors_say_with_what_they_were_made() -> None:
    asked = GenerationParams(steps_per_block=8, min_steps_per_block=4, confidence_threshold=0.75)
    log = CommitLog(5, ())
    first = replace(BLOCK, eased=0.5)
    log.append(first)
    message = codec.block_event(completion(log, asked), first, "", log_probs=False).block
    assert (message.steps_per_block, message.confidence_threshold) == (6, 0.75)
    # A pair that takes over gets no floors, so its blocks know of no easing.
    second = replace(BLOCK, start=7)
    log.append(second)
    message = codec.block_event(completion(log, asked), second, "", log_probs=False).block
    assert (message.steps_per_block, message.confidence_threshold) == (6, 0.75)
    other = codec.block_event(completion(log), second, "", log_probs=False).block
    assert not other.HasField("steps_per_block")
    assert not other.HasField("confidence_threshold")


@pytest.mark.parametrize("matched", [None, "\t"])
def test_the_end_of_a_stream(matched: str | None) -> None:
    log = log_of_one_block()
    row = completion(log, GenerationParams(stop=("\t",) if matched else ()), index=2)
    row.text.take(replace(BLOCK, token_ids=(8, ord("\t"))))
    event = codec.complete_event(row)
    complete = event.complete
    assert event.choice == 2
    assert complete.HasField("matched_stop") == (matched is not None)
    assert complete.matched_stop == (matched or "")
    assert complete.finish_reason == "stop"
    assert complete.usage == USAGE


def test_alternatives_come_in_their_order() -> None:
    tops = (((8, -0.75), (3, -1.0)), ((9, -1.5),))
    row = completion(log_of_one_block())
    sent = codec.block_event(row, replace(BLOCK, top_log_probs=tops), "", log_probs=True).block
    assert [list(each.token_ids) for each in sent.top_log_probs] == [[8, 3], [9]]
    assert [list(each.log_probs) for each in sent.top_log_probs] == [[-0.75, -1.0], [-1.5]]
    scored = codec.score_response([1, 8, 9], Scores([-0.75, -1.5], list(tops)))
    assert list(scored.log_probs) == [-0.75, -1.5]
    assert list(scored.top_log_probs) == list(sent.top_log_probs)


def test_drafts() -> None:
    draft = ProvisionalBlock(5, 1, (8, 3), (False, True), (0.5, 0.25))
    event = codec.provisional_event(completion(CommitLog(5, ()), index=1), draft)
    want = pb.ProvisionalBlock(
        start=5, step=1, token_ids=[8, 3], masked=[False, True], confidences=[0.5, 0.25]
    )
    assert event == pb.GenerateResponse(provisional=want, choice=1)


def test_inputs() -> None:
    assert codec.input_of(pb.GenerateRequest(text="ab"), "prompt") == "ab"
    ids = pb.ScoreRequest(tokens=pb.TokenIds(ids=[3, -1]))
    assert codec.input_of(ids, "input") == [3, -1]
    assert codec.input_of(pb.GenerateRequest(), "prompt") == []


def test_a_whole_request() -> None:
    message = pb.GenerateRequest(request_id="job-7", text="ab", n=3)
    request = codec.completion_request(message, eos_token_id=2, max_bytes=100)
    assert (request.request_id, request.prompt, request.n) == ("job-7", "ab", 3)
    message = pb.GenerateRequest(generated_token_ids=[4, 5])
    request = codec.completion_request(message, eos_token_id=2, max_bytes=100)
    assert (request.prompt, request.generated, request.n) == ([], (4, 5), 1)
    for count in (0, 129):
        with pytest.raises(InvalidRequestError, match=f"n: got {count}, expected"):
            codec.completion_request(pb.GenerateRequest(n=count), 2, 100)
    with pytest.raises(InvalidRequestError, match="n: got 2, expected 1 with generated_token_ids"):
        codec.completion_request(pb.GenerateRequest(n=2, generated_token_ids=[1]), 2, 100)


def test_the_size_of_a_whole_message() -> None:
    message = pb.GenerateRequest(text="a" * 97)
    codec.check_size(message, 99)
    with pytest.raises(InvalidRequestError, match="message: got 99, expected at most 98 bytes"):
        codec.check_size(message, 98)


def test_stop_strings_are_counted_before_they_are_read() -> None:
    class Counted:
        """Stop strings that may be counted only."""

        def __len__(self) -> int:
            return 17

    class Message:
        stop = Counted()

    with pytest.raises(InvalidRequestError, match="stop: got '17 strings'"):
        codec.params_of(Message(), None)  # type: ignore[arg-type]


def test_every_proto_field_is_documented() -> None:
    """Comments are part of the contract; the generator drops them, so the source is read."""
    from pathlib import Path

    import twotower.protos.v1.generation_pb2 as module

    source = Path(module.__file__).with_name("generation.proto").read_text(encoding="utf-8")
    lines = [line.strip() for line in source.splitlines()]
    for message in module.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            assert isinstance(field, FieldDescriptor)
            declared = [i for i, line in enumerate(lines) if line.endswith(f"= {field.number};")]
            own = [i for i in declared if f" {field.name} " in lines[i]]
            assert own
            if message.name != "TokenIds":
                assert any(lines[i - 1].startswith("//") for i in own), field.full_name
