"""Faults that somebody might make, and the test files that should catch each.

The text that is replaced stands once below `folders`. If that text has changed on purpose, change
the fault with it, so that it stays the same mistake.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in the one file below `folders` that has it. `tests` are names of test
    files without folder and ending. Folders and tests are separated by spaces."""

    name: str
    folders: str
    old: str
    new: str
    tests: str


SCHEDULER = [
    Fault(
        "scheduler: no limit of rows",
        "towers",
        "if taken and (cost > left or len(taken) == rows):",
        "if taken and cost > left:",
        "test_scheduler",
    ),
    Fault(
        "scheduler: small work overtakes",
        "towers",
        "            break\n        taken.append(ticket)",
        "            continue\n        taken.append(ticket)",
        "test_scheduler",
    ),
    Fault(
        "scheduler: prefill never rests",
        "towers",
        "self._prefill_rests = bool(pieces)",
        "self._prefill_rests = False",
        "test_scheduler",
    ),
    Fault(
        "scheduler: begun blocks come last",
        "towers",
        "[*self._begun.items(), *self._other.items()]",
        "[*self._other.items(), *self._begun.items()]",
        "test_scheduler",
    ),
    Fault(
        "scheduler: prefill alone has its share only",
        "towers",
        "        elif taken:\n            pieces",
        "        elif True:\n            pieces",
        "test_scheduler",
    ),
]
UNMASKING = [
    Fault(
        "unmasking: a confidence at the threshold counts",
        "towers",
        "if confidence > threshold]",
        "if confidence >= threshold]",
        "test_unmasking",
    ),
    Fault(
        "unmasking: not done within the steps",
        "towers",
        "-(-masked // left)",
        "masked // left",
        "test_unmasking",
    ),
    Fault(
        "unmasking: ties go to the right",
        "towers",
        "key=lambda i: -confidences[i])",
        "key=lambda i: (-confidences[i], -i))",
        "test_unmasking",
    ),
    Fault(
        "unmasking: the timestep is the committed fraction",
        "towers",
        "return len(self.masked) / len(self.token_ids)",
        "return 1 - len(self.masked) / len(self.token_ids)",
        "test_unmasking",
    ),
    Fault(
        "unmasking on device: ties go to the right",
        "kernels",
        "(index < index[:, None])",
        "(index > index[:, None])",
        "test_commit",
    ),
    Fault(
        "unmasking on device: a committed position that is not finite fails the row",
        "kernels",
        "busy & (masked & ~finite).any(1)",
        "busy & (~finite).any(1)",
        "test_commit",
    ),
    Fault(
        "unmasking on device: the threshold is rounded to nearest",
        "kernels",
        "if float(nearest) > threshold:",
        "if False:",
        "test_commit",
    ),
    Fault(
        "unmasking on device: a finished block counts on",
        "kernels",
        "busy = (slots >= 0) & masked.any(1) & ",
        "busy = (slots >= 0) & ",
        "test_commit",
    ),
]
REPLAY = [
    Fault(
        "replay: no dt bias",
        "kernels",
        "+ weights.dt_bias)\n    decays",
        ")\n    decays",
        "test_replay",
    ),
    Fault(
        "replay: the last token does not join the history",
        "kernels",
        "padded[:, -kept:].transpose",
        "padded[:, -kept - 1 : -1].transpose",
        "test_replay",
    ),
    Fault(
        "replay: heads take other groups",
        "kernels",
        "heads // weights.groups, -1, -1).flatten(3, 4)",
        "heads // weights.groups, -1, -1).transpose(3, 4).flatten(3, 4)",
        "test_replay",
    ),
    Fault(
        "replay: values are not scaled",
        "kernels",
        "(heads, head_dim)) * steps[..., None])[..., None]",
        "(heads, head_dim)))[..., None]",
        "test_replay",
    ),
    Fault(
        "replay: the log's rest is kept from its beginning",
        "towers",
        "log.part(count, count + rest)",
        "log.part(0, rest)",
        "test_context_state test_engine",
    ),
    Fault(
        "replay: a delta may begin behind the snapshot",
        "towers",
        'if plan.kind == "delta" and plan.start != self.position:',
        "if False:",
        "test_context_state",
    ),
    Fault(
        "replay: a delta from anywhere",
        "towers",
        "unsent.kept and unsent.start == start < self.position",
        "unsent.kept",
        "test_context_state",
    ),
]
ADMISSION = [
    Fault(
        "admission: a small row overtakes the queue",
        "towers",
        "if not self._queue and self._has_room(capacity):",
        "if self._has_room(capacity):",
        "test_admission",
    ),
    Fault(
        "admission: one row too many waits",
        "towers",
        "len(self._queue) >= self._max",
        "len(self._queue) > self._max",
        "test_admission",
    ),
    Fault(
        "admission: a cancelled head holds up those behind it",
        "towers",
        "            self._queue.remove(waiter)\n            self.admit()\n            return",
        "            self._queue.remove(waiter)\n            return",
        "test_admission",
    ),
    Fault(
        "admission: a place given to a cancelled row is lost",
        "towers",
        "            self.release(waiter.row_id)\n",
        "            pass\n",
        "test_admission",
    ),
    Fault(
        "admission: a row released at its turn goes on",
        "towers",
        "if self.rows.get(waiter.row_id) is not state:",
        "if False:",
        "test_admission",
    ),
    Fault(
        "admission: the cache is emptied where slots are missing",
        "towers",
        "if missing > 0 and pool.slots.num_free and",
        "if missing > 0 and",
        "test_admission",
    ),
]
PARAMS = [
    Fault(
        "params: the last block may not fit",
        "towers",
        "-(-self.max_tokens // unit) * unit",
        "self.max_tokens",
        "test_params",
    ),
    Fault(
        "params: a complete output may be resumed",
        "towers",
        "if len(generated) >= self.max_tokens:",
        "if len(generated) > self.max_tokens:",
        "test_params",
    ),
    Fault(
        "params: a row that just fits is refused",
        "towers",
        "if needed > max_context:",
        "if needed >= max_context:",
        "test_params",
    ),
    Fault(
        "params: half a block may be resumed",
        "towers",
        'if self.traits.unit == "block" and len(generated) % self.block_size:',
        "if False:",
        "test_params",
    ),
    Fault(
        "params: eased below the floor in its last bit",
        "towers",
        "max(floor, threshold - share * (threshold - floor))",
        "threshold - share * (threshold - floor)",
        "test_params",
    ),
    Fault(
        "params: min_tokens count from the prompt's beginning",
        "towers",
        "eos_from=prompt_tokens + self.min_tokens",
        "eos_from=self.min_tokens",
        "test_params",
    ),
]
PREFIX_CACHE = [
    Fault(
        "prefix cache: the shortest entry is taken",
        "towers",
        "for index in range(len(keys) - 1, -1, -1):",
        "for index in range(len(keys)):",
        "test_prefix_cache test_cached_rows",
    ),
    Fault(
        "prefix cache: an entry that is used does not become younger",
        "towers",
        "self._entries.move_to_end(key)\n        self",
        "self",
        "test_prefix_cache",
    ),
    Fault(
        "prefix cache: borders of passes are not in the key",
        "towers",
        'digest.update(len(piece).to_bytes(8, "little"))',
        "pass",
        "test_prefix_cache",
    ),
    Fault(
        "prefix cache: pages that rows hold count as its own",
        "towers",
        "sum(allocator.holders(page) == count for",
        "sum(allocator.holders(page) >= count for",
        "test_prefix_cache",
    ),
    Fault(
        "prefix cache: a partly filled page without a copy",
        "towers",
        "        if not rest:\n            return pages\n",
        "        return pages\n",
        "test_prefix_cache",
    ),
]
PAIR_TOWERS = [
    Fault(
        "pair towers: a lost denoiser is the best",
        "cluster",
        "(not seat.ready.is_set(), len(seat.rows))",
        "(len(seat.rows), not seat.ready.is_set())",
        "test_pair_towers",
    ),
    Fault(
        "pair towers: failures are never forgiven",
        "cluster",
        "            seat.failures = 0\n",
        "            pass\n",
        "test_pair_towers",
    ),
    Fault(
        "pair towers: rows of a new link are not released",
        "cluster",
        "for row_id in list(seat.rows)]",
        "for row_id in ()]",
        "test_pair_towers",
    ),
    Fault(
        "pair towers: a moved row counts at both denoisers",
        "cluster",
        "capacity = self._seat(row_id).rows.pop(row_id)",
        "capacity = self._seat(row_id).rows[row_id]",
        "test_pair_towers",
    ),
    Fault(
        "pair towers: a moved row's state is not sent",
        "cluster",
        "        await self.tower.move(row_id, seat.index)\n",
        "",
        "test_pair_towers",
    ),
]
BREAKER = [
    Fault(
        "breaker: old losses count for ever",
        "deployments",
        "if now - at < WINDOW_S]",
        "]",
        "test_policy",
    ),
    Fault(
        "breaker: every attempt probes",
        "deployments",
        "        self._probed[due[0]] = self._clock()\n",
        "",
        "test_policy",
    ),
    Fault(
        "breaker: nothing to choose from if no pair works",
        "deployments",
        "        if not working:\n            return [pairs]\n",
        "",
        "test_policy",
    ),
    Fault(
        "moves: one row moves for each pair that has room",
        "deployments",
        "first + sum(free.values()))",
        "first + len(free))",
        "test_policy",
    ),
    Fault(
        "moves: rows that have a place move",
        "deployments",
        "max(0, room.places - len(here.begun))",
        "0",
        "test_policy",
    ),
]
OUTPUT_TEXT = [
    Fault(
        "output text: of two stop strings the shorter",
        "towers",
        "(found[0], -len(found[1]))",
        "(found[0], len(found[1]))",
        "test_output_text",
    ),
    Fault(
        "output text: a stop string that did not count ends the output later",
        "towers",
        "text.find(stop, max(0, len(self._held) - len(stop) + 1))",
        "text.find(stop)",
        "test_output_text",
    ),
    Fault(
        "output text: a stop string counts one token late",
        "towers",
        "self._num_tokens >= self._params.min_tokens",
        "self._num_tokens > self._params.min_tokens",
        "test_output_text",
    ),
    Fault(
        "output text: too little is held back",
        "towers",
        "min(self._longest - 1, len(text))",
        "min(self._longest - 2, len(text))",
        "test_output_text",
    ),
    Fault(
        "output text: the last letters are lost",
        "towers",
        "                piece += self._stream.flush()\n",
        "                pass\n",
        "test_output_text",
    ),
    Fault(
        "output text: a whole stop string that did not count begins no longer one",
        "towers",
        "if any(len(stop) > length and stop.startswith(tail)",
        "if tail not in self._stop and any(len(stop) > length and stop.startswith(tail)",
        "test_output_text",
    ),
]
COMMIT_LOG = [
    Fault(
        "commit log: a gap is committed",
        "towers deployments",
        "if block.start > self.end:",
        "if False:",
        "test_commit_log",
    ),
    Fault(
        "commit log: a block is committed twice",
        "towers deployments",
        "return block.start < self.end",
        "return False",
        "test_commit_log",
    ),
    Fault(
        "commit log: the last attempt settles what was eased and cached",
        "towers deployments",
        "if not self.num_blocks:",
        "if True:",
        "test_commit_log",
    ),
    Fault(
        "commit log: cached tokens beyond the prompt",
        "towers deployments",
        "min(block.cached_tokens, self.prompt_tokens)",
        "block.cached_tokens",
        "test_commit_log test_attempts",
    ),
]
ROUTER = [
    Fault(
        "router: what follows a stop string is committed",
        "deployments towers",
        "log.append(cut)",
        "log.append(block)",
        "test_router test_router_stopping",
    ),
    Fault(
        "router: it reads on after a stop string",
        "deployments towers",
        "if text.matched_stop is not None:",
        "if False:",
        "test_router test_router_stopping",
    ),
    Fault(
        "router: modes that are not served are let in",
        "deployments",
        "if params.mode not in modes:",
        "if False:",
        "test_router",
    ),
    Fault(
        "router: the model's own limit of context is passed over",
        "deployments",
        "min(config.max_context, model.max_position_embeddings)",
        "config.max_context",
        "test_router",
    ),
    Fault(
        "attempts: a request that is complete is tried again",
        "deployments",
        "                    if log.finish_reason is not None:\n",
        "                    if False:\n",
        "test_attempts",
    ),
    Fault(
        "attempts: the next attempt begins at the prompt",
        "deployments",
        "generated=log.token_ids, params=params)",
        "params=params)",
        "test_attempts",
    ),
    Fault(
        "attempts: the next attempt is eased anew",
        "deployments",
        "params = log.served(job.params)",
        "params = job.params",
        "test_attempts test_overload",
    ),
    Fault(
        "attempts: losses before a committed block count on",
        "deployments",
        "                                losses.forget()\n",
        "",
        "test_attempts",
    ),
]
GENERATION = [
    Fault(
        "generation: a resumed row has all of max_tokens again",
        "towers",
        "left = params.max_tokens - len(generated)",
        "left = params.max_tokens",
        "test_generation",
    ),
    Fault(
        "generation: EOS is cut off",
        "towers",
        "tokens = tokens[: tokens.index(eos_token_id) + 1]\n        reason",
        "tokens = tokens[: tokens.index(eos_token_id)]\n        reason",
        "test_generation",
    ),
    Fault(
        "generation: passes of the prefill count with every block",
        "towers",
        "prefilled, first = Prefilled(0), None\n",
        "first = None\n",
        "test_generation",
    ),
]
FRONTS = [
    Fault(
        "front: a path that is not listed needs no caller",
        "deployments/http",
        "if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):",
        'if path.startswith(("/v1", "/admin")):',
        "test_front",
    ),
    Fault(
        "front: anybody may use the paths of administrators",
        "deployments/http",
        "            caller.check_admin()\n",
        "            pass\n",
        "test_front",
    ),
    Fault(
        "front: the front of another machine makes its clients local",
        "deployments/http",
        'forwarded = "x-forwarded-for" in headers',
        "forwarded = False",
        "test_front",
    ),
    Fault(
        "completions: a caller is not charged for its output",
        "deployments/completions",
        "                        self._charge(len(block.token_ids))\n",
        "",
        "test_front",
    ),
    Fault(
        "completions: all choices have one seed",
        "deployments/completions",
        "choice_seed(first.seed, index) for index",
        "first.seed for index",
        "test_requests test_completions",
    ),
    Fault(
        "http: a place of a caller is kept where no answer begins",
        "deployments/http",
        "        admission.release()\n        raise",
        "        raise",
        "test_front",
    ),
    Fault(
        "http: texts of tokens begin at 0 after an echo",
        "deployments/http",
        "TokenTexts(tokenizer, prompts[each.index // choices].length) for",
        "TokenTexts(tokenizer) for",
        "test_completions",
    ),
    Fault(
        "http: the last token has no unfinished text",
        "deployments/http",
        "text + self._stream.flush(), offset",
        "text, offset",
        "test_completions",
    ),
    Fault(
        "http: an answer in a proxy keeps Serve's words",
        "deployments/http",
        "if not (self._own or marked):",
        "if False:",
        "test_middleware",
    ),
    Fault(
        "attempts: calls of one request share Serve's identity",
        "deployments/routing",
        'replace(context, _internal_request_id="")',
        "context",
        "test_attempts",
    ),
]
DRAFTS = [
    Fault(
        "drafts: a round's time costs nothing",
        "towers/decoding",
        "worth = 1.0 + _run(rate, count) - speed * cost(1 + count)",
        "worth = 1.0 + _run(rate, count)",
        "test_draft_policy",
    ),
    Fault(
        "drafts: a mix is drafted by what was learned",
        "towers/decoding",
        "if params.mix and not params.traits.chooses:",
        "if False:",
        "test_draft_policy",
    ),
    Fault(
        "drafts: passes with prefill tell what a pass costs",
        "towers/decoding",
        "if self.fixed or passed.prefill_tokens:",
        "if self.fixed:",
        "test_pass_times",
    ),
    Fault(
        "drafts: one token more is accepted",
        "towers/engine",
        "return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))",
        "return min(len(tokens) - 1, 1 + "
        "len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))))",
        "test_draft_rounds",
    ),
    Fault(
        "drafts: the mix gives each tower the other's share",
        "towers/decoding",
        "target = draft.mix * theirs + (1 - draft.mix) * own",
        "target = draft.mix * own + (1 - draft.mix) * theirs",
        "test_acceptance",
    ),
    Fault(
        "drafts: an updated mirror is thought to stand at the row's begin",
        "towers/engine",
        "row.mirrored = state.position",
        "row.mirrored = 0",
        "test_lazy_mirrors",
    ),
    Fault(
        "commit rules: the rightmost where nothing is above the threshold",
        "towers",
        "return _above(confidences, threshold) or [0]",
        "return _above(confidences, threshold) or [len(confidences) - 1]",
        "test_unmasking",
    ),
]
GPU = [
    Fault(
        "sort: pairs of a block begin where the last block's do",
        "kernels",
        "    target = first_pair + before\n",
        "    target = first_pair\n",
        "test_expert_tiles_triton test_router_triton",
    ),
    Fault(
        "sort: an expert's pairs lose their order",
        "kernels",
        "earlier = (index[None, :] < index[:, None]) &",
        "earlier = (index[None, :] > index[:, None]) &",
        "test_expert_tiles_triton",
    ),
    Fault(
        "norm: experts' sum is not rounded before it is weighed",
        "kernels",
        "            added = added.to(total.dtype.element_ty).to(tl.float32)\n        else:",
        "            added = added * 1.001\n        else:",
        "test_norm_triton",
    ),
    Fault(
        "draft lines: a draft that is fixed is drawn with its step's noise",
        "kernels",
        "moving = tl.load(own + _FIXED_STEP) <= 0",
        "moving = tl.load(own + _FIXED_STEP) >= 0",
        "test_draft_lines",
    ),
    Fault(
        "launch table: an entry holds below its size alone",
        "kernels",
        "if size <= entry.get(_UP_TO, size):",
        "if size < entry.get(_UP_TO, size + 1):",
        "test_launch_table",
    ),
    Fault(
        "deterministic: experts' tiles follow the number of tokens",
        "kernels",
        "            return self.steady\n",
        "            return next((own for most, own in self.up_to if tokens <= most), self.more)\n",
        "test_determinism",
    ),
    Fault(
        "link test: bytes are not compared",
        "cluster",
        "    return torch.equal(share.view(bits), known.view(bits))",
        "    return share.view(bits).shape == known.view(bits).shape",
        "test_self_test",
    ),
    Fault(
        "self-test: NaN is near everything",
        "towers",
        "        if not (error <= limit and peak <= PEAK * limit):",
        "        if error > limit or peak > PEAK * limit:",
        "test_on_device",
    ),
]
CONTROL_PLANE = [
    Fault(
        "calls: any secret will do",
        "cluster",
        "if not shows(metadata, TOKEN_KEY, self._token.encode()):",
        "if not metadata.get(TOKEN_KEY):",
        "test_stream",
    ),
    Fault(
        "calls: those of a broken stream wait on",
        "cluster",
        "                waiting.set_exception(UnavailableError(_GONE))",
        "                pass",
        "test_stream",
    ),
    Fault(
        "calls: what nobody waits for goes on",
        "cluster",
        "        for task in self._calls:\n            task.cancel()\n",
        "        self._calls.clear()\n",
        "test_stream",
    ),
    Fault(
        "patience: a check ends a later wait",
        "deployments",
        "        if limit is self._limit and self._error is None:",
        "        limit = self._limit or limit\n        if self._error is None:",
        "test_pair_patience",
    ),
    Fault(
        "loads: a report that is told again undoes own rows",
        "deployments",
        "rows is None or read_at == self._read_at.get(pair, math.nan):",
        "rows is None:",
        "test_loads",
    ),
    Fault(
        "moves: a report from before the row says that it waits",
        "deployments",
        "        if index is None or self._came[index] <= at:",
        "        if index is None:",
        "test_loads test_pairs",
    ),
]
FAULTS = (
    *SCHEDULER,
    *UNMASKING,
    *REPLAY,
    *ADMISSION,
    *PARAMS,
    *PREFIX_CACHE,
    *PAIR_TOWERS,
    *BREAKER,
    *OUTPUT_TEXT,
    *COMMIT_LOG,
    *ROUTER,
    *GENERATION,
    *FRONTS,
    *DRAFTS,
    *GPU,
    *CONTROL_PLANE,
)
