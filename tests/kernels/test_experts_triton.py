"""The kernels of the experts against fp64, and against the reference with weights in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from tests.support.hopper import Compiled, Launch, compile_all
from twotower.kernels import experts_triton, moe
from twotower.kernels.experts_triton import Tiling, experts, fp8_tiling_of, tiling_of
from twotower.kernels.moe import ExpertWeights
from twotower.kernels.quantized import (
    FP8_MAX,
    LEAST_LARGEST,
    ExpertProducts,
    QuantizedExperts,
    quantize,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
HIDDEN, WIDTH, EXPERTS = 16, 12, 12
# fp16 rounds after both products and at the end, 5e-4 each at most.
LIMITS = {torch.float32: 1e-6, torch.float16: 1.5e-3}
# A sum in another order rounds a few values to their 8-bit neighbours, which are a sixteenth away.
FP8_LIMITS = {torch.float32: 1e-3, torch.float16: 3e-3}
# One part, two parts, and a width that the experts' does not divide.
SHARED = [12, 24, 20]


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that a read of an element that no kernel wrote shows."""
    allocate = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        new: Tensor = allocate(*args, **kwargs)  # type: ignore[call-overload]
        return new.fill_(NAN) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty", filled)


@dataclass(frozen=True)
class Mixture:
    """Weights of one layer."""

    up: ExpertWeights
    down: ExpertWeights
    shared_up: Tensor
    shared_down: Tensor

    @staticmethod
    def make(shared: int = 24, dtype: torch.dtype = torch.float32) -> Mixture:
        shapes = (
            (EXPERTS, WIDTH, HIDDEN),
            (EXPERTS, HIDDEN, WIDTH),
            (shared, HIDDEN),
            (HIDDEN, shared),
        )
        return Mixture(*(normal(*s, seed=i, scale=0.3).to(dtype) for i, s in enumerate(shapes)))

    @property
    def all(self) -> tuple[ExpertWeights, ExpertWeights, Tensor, Tensor]:
        return self.up, self.down, self.shared_up, self.shared_down

    def quantized(self, products: ExpertProducts = "widened") -> Mixture:
        assert isinstance(self.up, Tensor)
        assert isinstance(self.down, Tensor)
        up, down = quantize(self.up, products), quantize(self.down, products)
        return replace(self, up=up, down=down)

    def on_device(self) -> Mixture:
        return Mixture(*(_on_device(one) for one in self.all))  # type: ignore[arg-type]

    def truth(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """The experts' output in fp64."""
        total = _mlp(x, self.shared_up, self.shared_down)
        for expert in range(len(self.up)):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            own = _mlp(x[token], self.up[expert], self.down[expert])
            total.index_add_(0, token, own * scores[token, slot].double()[:, None])
        return total


def _mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x.double() @ up.double().T).clamp_min(0.0).square() @ down.double().T


def _on_device(one: ExpertWeights) -> ExpertWeights:
    if isinstance(one, QuantizedExperts):
        return QuantizedExperts(one.values.to(DEVICE), one.scale.to(DEVICE), one.products)
    assert isinstance(one, Tensor)
    return one.to(DEVICE)


def run(x: Tensor, ids: Tensor, scores: Tensor, weights: Mixture) -> Tensor:
    on_device = (one.to(DEVICE) for one in (x, ids, scores))
    out = experts(*on_device, *weights.on_device().all)
    assert out.dtype == x.dtype
    return out.cpu()


def choose(tokens: int, top_k: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(tokens)])
    return ids[:, :top_k].contiguous(), normal(tokens, top_k, seed=6)


def assert_right(x: Tensor, ids: Tensor, scores: Tensor, weights: Mixture) -> None:
    got = run(x, ids, scores, weights)
    assert_relative_rms(got, weights.truth(x, ids, scores), LIMITS[x.dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_against_fp64(tokens: int, shared: int, dtype: torch.dtype) -> None:
    assert_right(normal(tokens, HIDDEN).to(dtype), *choose(tokens), Mixture.make(shared, dtype))


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_any_number_of_slots(top_k: int) -> None:
    assert_right(normal(5, HIDDEN), *choose(5, top_k), Mixture.make())


def test_the_tiling_goes_by_tokens() -> None:
    edges = (1, 128, 129, 512, 513, 1024, 1025, 8192)
    rows = [tiling_of(tokens, torch.bfloat16).rows for tokens in edges]
    assert rows == [16, 16, 32, 32, 64, 64, 128, 128]


@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_every_tiling(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of many tokens, filled by a few that take one expert in all slots."""
    tiling = tiling_of(tokens, torch.float16)
    monkeypatch.setattr(experts_triton, "tiling_of", lambda *_: tiling)
    ids = torch.full((32, 6), 4)
    ids[::4] = torch.arange(6)
    assert int((ids == 4).sum()) > tiling.rows
    x, scores = normal(32, HIDDEN).half(), normal(32, 6, seed=6)
    assert_right(x, ids, scores, Mixture.make(dtype=x.dtype))


def test_more_channels_than_a_tile_has() -> None:
    shapes = ((4, 70, 140), (4, 140, 70), (140, 140), (140, 140))
    weights = Mixture(*(normal(*s, seed=i, scale=0.1).half() for i, s in enumerate(shapes)))
    ids = torch.tensor([[0, 3], [3, 1], [1, 3]])
    assert_right(normal(3, 140).half(), ids, normal(3, 2, seed=6), weights)


@pytest.mark.parametrize("dtype", LIMITS)
def test_all_tokens_to_one_expert(dtype: torch.dtype) -> None:
    ids, scores = torch.full((40, 1), 7), normal(40, 1, seed=6)
    assert_right(normal(40, HIDDEN).to(dtype), ids, scores, Mixture.make(dtype=dtype))


@pytest.mark.parametrize("shared", SHARED)
def test_slots_without_an_expert_count_nothing(shared: int) -> None:
    ids, scores = choose(20)
    ids[3, 1] = ids[5] = ids[19, 2] = -1
    scores[ids < 0] = NAN
    assert_right(normal(20, HIDDEN), ids, scores, Mixture.make(shared))


@pytest.mark.parametrize("shared", SHARED)
def test_without_any_expert_the_shared_one_is_left(shared: int) -> None:
    x, weights = normal(4, HIDDEN), Mixture.make(shared)
    got = run(x, torch.full((4, 3), -1), torch.full((4, 3), NAN), weights)
    assert_relative_rms(got, _mlp(x, weights.shared_up, weights.shared_down), 1e-6)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("tokens", [1, 17])
def test_8_bits_are_the_weights_that_they_stand_for(
    tokens: int, shared: int, dtype: torch.dtype
) -> None:
    x, (ids, scores) = normal(tokens, HIDDEN).to(dtype), choose(tokens)
    weights = Mixture.make(shared, dtype).quantized()
    got = run(x, ids, scores, weights)
    assert_relative_rms(got, weights.truth(x, ids, scores), LIMITS[dtype])
    assert_relative_rms(got, moe.experts(x, ids, scores, *weights.all), 2 * LIMITS[dtype])


def assert_as_the_reference(x: Tensor, ids: Tensor, scores: Tensor, weights: Mixture) -> None:
    """For products in 8 bits: near the reference, and farther from products of widened weights."""
    got = run(x, ids, scores, weights)
    assert_relative_rms(got, moe.experts(x, ids, scores, *weights.all), FP8_LIMITS[x.dtype])
    assert isinstance(weights.up, QuantizedExperts)
    assert isinstance(weights.down, QuantizedExperts)
    wide = (replace(one, products="widened") for one in (weights.up, weights.down))
    widened = moe.experts(x, ids, scores, *wide, weights.shared_up, weights.shared_down)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_relative_rms(got, widened, FP8_LIMITS[x.dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("tokens", [1, 9])
def test_products_in_8_bits(tokens: int, shared: int, dtype: torch.dtype) -> None:
    x, (ids, scores) = normal(tokens, HIDDEN).to(dtype), choose(tokens)
    assert_as_the_reference(x, ids, scores, Mixture.make(shared, dtype).quantized("fp8"))


@pytest.mark.parametrize("tokens", [8, 128, 512, 1024, 2048])
def test_every_tiling_of_products_in_8_bits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of many tokens, filled by a few, over lengths that no tile divides."""
    tiling = fp8_tiling_of(tokens, torch.float16)
    monkeypatch.setattr(experts_triton, "fp8_tiling_of", lambda *_: tiling)
    shapes = ((3, 70, 270), (3, 270, 70), (70, 270), (270, 70))
    weights = Mixture(*(normal(*s, seed=i, scale=0.1).half() for i, s in enumerate(shapes)))
    ids = torch.full((24, 3), 2)
    ids[::4] = torch.tensor([0, 2, -1])
    assert int((ids == 2).sum()) > min(tiling.rows, 50)
    x, scores = normal(24, 270).half(), normal(24, 3, seed=6)
    assert_as_the_reference(x, ids, scores, weights.quantized("fp8"))


@pytest.mark.parametrize("shared", SHARED)
def test_products_in_8_bits_of_slots_without_an_expert(shared: int) -> None:
    ids, scores = choose(20)
    ids[3, 1] = ids[5] = ids[19, 2] = -1
    scores[ids < 0] = NAN
    x, weights = normal(20, HIDDEN), Mixture.make(shared).quantized("fp8")
    # The reference multiplies a score that has no expert by 0.
    want = moe.experts(x, ids, scores.nan_to_num(0.0), *weights.all)
    assert_relative_rms(run(x, ids, scores, weights), want, FP8_LIMITS[x.dtype])
    nobody = torch.full_like(ids, -1)
    got = run(x, nobody, scores, weights)
    assert_relative_rms(got, _mlp(x, weights.shared_up, weights.shared_down), 1e-6)


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_token_keeps_its_bits_in_any_batch_of_products_in_8_bits(dtype: torch.dtype) -> None:
    weights = Mixture.make(dtype=dtype).quantized("fp8")
    x, (ids, scores) = normal(24, HIDDEN), choose(24)
    ids[::5, 1] = -1

    def of_tokens(numbers: Tensor) -> Tensor:
        own = numbers.long()
        return run(x[own].to(dtype), ids[own], scores[own], weights)

    # All of one tiling: in fp32 there is one, in fp16 the next begins at 9 tokens.
    least = 1 if dtype == torch.float32 else 9
    assert_rows_are_independent(of_tokens, torch.arange(18.0), sizes=(least,))


@pytest.mark.parametrize("wrong", [NAN, float("inf")])
def test_what_is_not_finite_is_seen_after_products_in_8_bits(wrong: float) -> None:
    x, (ids, scores) = normal(20, HIDDEN), choose(20)
    x[6, 3] = wrong
    # The interpreter warns of infinity in a product of its own: torch multiplies the shared MLP.
    got = run(x, ids, scores, Mixture.make(shared=20).quantized("fp8"))
    assert bool(got[6].isnan().all())
    assert bool(got[torch.arange(20) != 6].isfinite().all())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_square_that_is_not_finite_is_seen_after_products_in_8_bits() -> None:
    """The first product fits into fp16, its square does not. The shared MLP gives zeros."""
    x, (ids, scores) = normal(9, HIDDEN).half(), choose(9)
    x[4] *= 1e3
    weights = Mixture.make(dtype=x.dtype).quantized("fp8")
    weights.shared_up.zero_()
    got = run(x, ids, scores, weights)
    assert bool(got[4].isnan().all())
    assert bool(got[torch.arange(9) != 4].isfinite().all())


def test_experts_that_nobody_chose_are_not_read() -> None:
    weights = Mixture.make()
    assert isinstance(weights.up, Tensor)
    assert isinstance(weights.down, Tensor)
    weights.up[4:], weights.down[4:] = NAN, NAN
    ids, scores = torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2)
    assert bool(run(normal(2, HIDDEN), ids, scores, weights).isfinite().all())


def test_views_with_nan_around_them() -> None:
    def inside(one: Tensor) -> Tensor:
        """The same numbers in the middle of a tensor that is wider on every side."""
        wide = one.new_full([size + 5 for size in one.shape], NAN)
        view = wide[tuple(slice(2, 2 + size) for size in one.shape)]
        view.copy_(one)
        return view

    weights, x, (ids, scores) = Mixture.make(), normal(9, HIDDEN), choose(9)
    views = Mixture(*(inside(one) for one in weights.all if isinstance(one, Tensor)))
    ids_view = torch.cat((ids - 99, ids, ids - 99), dim=1)[:, 3:6]
    want = run(x, ids, scores, weights)
    got = experts(
        inside(x).to(DEVICE), ids_view.to(DEVICE), inside(scores).to(DEVICE), *views.on_device().all
    )
    assert_same_bits(got.cpu(), want)


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_token_keeps_its_bits_in_any_batch(dtype: torch.dtype) -> None:
    weights, x, (ids, scores) = Mixture.make(dtype=dtype), normal(24, HIDDEN), choose(24)

    def of_tokens(numbers: Tensor) -> Tensor:
        own = numbers.long()
        return run(x[own].to(dtype), ids[own], scores[own], weights)

    assert_rows_are_independent(of_tokens, torch.arange(24.0), sizes=(1, 17))


def test_nan_stays_in_its_token_and_is_seen() -> None:
    x = normal(20, HIDDEN)
    x[6, 3] = NAN
    got = run(x, *choose(20), Mixture.make())
    assert bool(got[6].isnan().all())
    assert bool(got[torch.arange(20) != 6].isfinite().all())


def test_the_inputs_are_only_read() -> None:
    x, (ids, scores), weights = normal(5, HIDDEN), choose(5), Mixture.make(20)
    mine = x.to(DEVICE), ids.to(DEVICE), scores.to(DEVICE)
    on_device = weights.on_device()
    before = [one.clone() for one in (*mine, *on_device.all) if isinstance(one, Tensor)]
    experts(*mine, *on_device.all)
    after = [one for one in (*mine, *on_device.all) if isinstance(one, Tensor)]
    for now, then in zip(after, before, strict=True):
        assert_same_bits(now, then)


def test_no_tokens() -> None:
    empty = torch.zeros(0, HIDDEN), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)
    assert run(*empty, Mixture.make()).shape == (0, HIDDEN)


def test_other_forms_of_weights_are_refused() -> None:
    x, (ids, scores), weights = normal(2, HIDDEN), choose(2), Mixture.make()
    assert isinstance(weights.up, Tensor)
    with pytest.raises(ValueError, match=r"up: got list, expected a stacked tensor"):
        experts(x, ids, scores, *replace(weights, up=list(weights.up)).all)
    with pytest.raises(ValueError, match=r"down: got torch.float16, expected .* torch.float32"):
        experts(x, ids, scores, *replace(weights, down=Mixture.make(dtype=torch.half).down).all)
    mixed = replace(weights.quantized(), down=weights.quantized("fp8").down)
    with pytest.raises(ValueError, match=r"products: got 'widened' of up and 'fp8' of down"):
        experts(x, ids, scores, *mixed.all)


# Tokens of the pass for every tiling.
TOKENS = (8, 128, 512, 1024, 2048)


def launch(tiling: Tiling, first: bool, experts_as: str, size: int = 2) -> Launch:
    """One product with the shapes of a model of 30 billion parameters. Experts are as they are
    ("full"), "widened" or multiplied in "fp8"; other values have `size` bytes."""
    narrow, in_fp8 = experts_as != "full", experts_as == "fp8"
    wide = "*bf16" if size == 2 else "*fp32"
    sizes = dict.fromkeys(
        (
            "tokens",
            "channels",
            "source_stride",
            "expert_stride",
            "channel_stride",
            "scale_stride",
            "part_step",
            "shared_stride",
        ),
        "i32:16",
    )
    weights = {
        "values": "*fp8e4nv" if in_fp8 else wide,
        "row_scale": "*fp32" if in_fp8 else wide,
        "routed": "*fp8e4nv" if narrow else wide,
        "scale": "*fp32" if narrow else wide,
        "pairs": "*i32",
        "table": "*i32",
    }
    constants = {
        "length": 2688 if first else 1856,
        "first": first,
        "quantized": narrow,
        "in_fp8": in_fp8,
        "slots": 6,
        "parts": 2,
        "tile_rows": tiling.rows,
        "tile_channels": tiling.channels,
        "tile_inner": tiling.inner,
        "shared_inner": tiling.inner // size if in_fp8 else tiling.inner,
        "narrow_sum": 128,
    }
    return Launch(
        "twotower.kernels.experts_triton:_multiply_kernel",
        {**dict.fromkeys(("source", "target", "shared"), wide), **sizes, **weights},
        constants,
        tiling.num_warps,
        tiling.num_stages,
    )


COMBINE = Launch(
    "twotower.kernels.experts_triton:_combine_kernel",
    {
        **dict.fromkeys(("by_slot", "shared_out", "out"), "*bf16"),
        "ids": "*i64",
        "scores": "*fp32",
        **dict.fromkeys(("ids_stride", "scores_stride"), "i32"),
        "width": "i32:16",
    },
    {"slots": 6, "parts": 2, "has_shared_out": False, "block": 1024},
)
QUANTIZE = Launch(
    "twotower.kernels.quantized_triton:_quantize_kernel",
    {
        "x": "*bf16",
        "values": "*fp8e4nv",
        "scale": "*fp32",
        **dict.fromkeys(("width", "stride"), "i32:16"),
    },
    {"most": FP8_MAX, "least_largest": LEAST_LARGEST, "block": 4096},
)
SHARED_BYTES_OF_AN_SM = 227 * 1024
BYTES_OF_A_PROGRAM = 1024
REGISTERS_OF_AN_SM = 64 * 1024


def assert_fits(asked: Launch, compiled: Compiled, resident: int) -> None:
    """Nothing spills, weights are copied past the registers, and a multiprocessor's shared memory
    holds as many programs as are launched."""
    assert compiled.spills == 0, asked
    assert compiled.instructions["LDGSTS"] > 0, asked
    taken = resident * (compiled.shared_bytes + BYTES_OF_A_PROGRAM)
    assert taken <= SHARED_BYTES_OF_AN_SM, asked


@pytest.mark.parametrize(
    "kinds",
    [
        [(True, "full"), (False, "widened")],
        pytest.param([(True, "widened"), (False, "full")], marks=pytest.mark.slow),
    ],
)
def test_it_compiles_for_hopper(kinds: list[tuple[bool, str]]) -> None:
    """Without spills, in tensor core instructions. `kinds`: first product, how experts are."""
    tilings = [tiling_of(tokens, torch.bfloat16) for tokens in TOKENS for _ in kinds]
    launches = [
        launch(tiling_of(tokens, torch.bfloat16), *kind) for tokens in TOKENS for kind in kinds
    ]
    *products, combine = compile_all([*launches, COMBINE])
    assert combine.spills == 0
    for tiling, asked, compiled in zip(tilings, launches, products, strict=True):
        assert_fits(asked, compiled, tiling.resident)
        assert compiled.instructions["HGMMA"] > 0, asked


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_products_in_8_bits_compile_for_hopper(first: bool) -> None:
    """Both operands go from shared memory into tensor cores as they are, tiles of the shared MLP in
    bf16 beside them; sums of 8-bit products leave the tensor cores every 128 of the length."""
    tilings = [fp8_tiling_of(tokens, torch.bfloat16) for tokens in TOKENS]
    launches = [launch(tiling, first, "fp8") for tiling in tilings]
    *products, tokens = compile_all([*launches, QUANTIZE])
    assert tokens.spills == 0
    for tiling, asked, compiled in zip(tilings, launches, products, strict=True):
        assert_fits(asked, compiled, tiling.resident)
        threads = 32 * tiling.num_warps
        assert tiling.resident * threads * compiled.registers <= REGISTERS_OF_AN_SM, asked
        assert compiled.instructions["QGMMA"] > 0, asked
        assert compiled.instructions["HGMMA"] > 0, asked
        sums = tiling.rows * tiling.channels // threads
        assert compiled.instructions["FADD"] >= sums * tiling.inner // 128, asked


@pytest.mark.slow
def test_products_in_8_bits_beside_fp32_compile_for_hopper() -> None:
    tiling = fp8_tiling_of(1, torch.float32)
    launches = [launch(tiling, first, "fp8", size=4) for first in (True, False)]
    for asked, compiled in zip(launches, compile_all(launches), strict=True):
        assert_fits(asked, compiled, tiling.resident)


def real_mixture() -> Mixture:
    """The shapes of a model of 30 billion parameters."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def make(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return numbers * shape[-1] ** -0.5

    return Mixture(make(128, 1856, 2688), make(128, 2688, 1856), make(3712, 2688), make(2688, 3712))


def real_tokens(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(2)
    x = torch.randn(tokens, 2688, generator=generator, device=DEVICE).bfloat16()
    ranks = torch.rand(tokens, 128, generator=generator, device=DEVICE).argsort(dim=1)
    scores = torch.rand(tokens, 6, generator=generator, device=DEVICE)
    return x, ranks[:, :6].contiguous(), scores


@pytest.mark.gpu
@pytest.mark.parametrize("experts_as", ["full", "widened", "fp8"])
@pytest.mark.parametrize("tokens", [1, 16, 128, 512, 1024, 2048])
def test_real_shapes(tokens: int, experts_as: str) -> None:
    weights = real_mixture()
    if experts_as != "full":
        weights = weights.quantized("fp8" if experts_as == "fp8" else "widened")
    x, ids, scores = real_tokens(tokens)
    got = experts(x, ids, scores, *weights.all)
    # Products in 8 bits round their tokens, each value by 2.6 % in the mean of squares.
    limit = 5e-2 if experts_as == "fp8" else 5e-3
    assert_relative_rms(got, weights.truth(x, ids, scores), limit)
    if experts_as == "fp8":
        assert_relative_rms(got, moe.experts(x, ids, scores, *weights.all), 1.5e-2)
    assert_same_bits(experts(x, ids, scores, *weights.all), got, "a second run")
    few = max(1, tokens * 3 // 4)
    choose_tiling = fp8_tiling_of if experts_as == "fp8" else tiling_of
    if choose_tiling(few, x.dtype) == choose_tiling(tokens, x.dtype):
        alone = experts(x[:few], ids[:few], scores[:few], *weights.all)
        assert_same_bits(alone, got[:few], "fewer tokens")


@pytest.mark.gpu
@pytest.mark.parametrize("experts_as", ["full", "fp8"])
def test_a_graph_follows_the_ids_that_it_finds(experts_as: str) -> None:
    weights, (x, ids, scores) = real_mixture(), real_tokens(16)
    if experts_as == "fp8":
        weights = weights.quantized("fp8")
    experts(x, ids, scores, *weights.all)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, ids, scores, *weights.all)
    for others in (torch.full_like(ids, 5), torch.full_like(ids, -1), ids.roll(1, dims=0)):
        ids.copy_(others)
        graph.replay()
        assert_same_bits(out, experts(x, ids, scores, *weights.all))
