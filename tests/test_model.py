"""OPT against transformers' OPT, against itself (cached, padded, packed), and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minopt import OPT, KVCache, OPTConfig, masks
from minopt.config import ACTIVATION_NAMES
from minopt.model import POSITION_OFFSET, _dropout
from tests.conftest import KINDS, SIZE, build_ours, build_reference, error, pad_left

B, T = 3, 12
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
MASKS: dict[str, Tensor | None] = {
    "no mask": None,
    "left padding": torch.arange(T) >= torch.tensor([[4], [0], [9]]),
    "right padding": torch.arange(T) < torch.tensor([[8], [12], [3]]),
    "interior zeros": ~torch.isin(torch.arange(B * T), torch.tensor([3, 4, 7, 14, 26, 30, 31])).view(B, T),
}


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids without the special ones."""
    return torch.randint(3, SIZE["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))


def config_of(kind: str, **changes: Any) -> OPTConfig:
    return OPTConfig(**(SIZE | KINDS[kind] | changes))


def build(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> OPT:
    return build_ours(build_reference(kind, dtype=dtype, **changes))


# --- parity with transformers


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_logits_are_those_of_transformers(kind: str, mask: str, dtype: torch.dtype) -> None:
    reference = build_reference(kind, dtype=dtype)
    assert reference.config._attn_implementation == "sdpa"
    ids, attention_mask = ids_of(B, T), MASKS[mask]
    theirs = reference(ids, attention_mask=None if attention_mask is None else attention_mask.long()).logits
    real = torch.ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask
    for given in (attention_mask, None if attention_mask is None else attention_mask.long()):
        assert error(build_ours(reference)(ids, given)[real], theirs[real]) <= TOLERANCES[dtype]


@torch.no_grad()
def test_given_positions_are_used_as_in_transformers(kind: str) -> None:
    reference, ids = build_reference(kind, dtype=torch.float64), ids_of(2, T)
    positions = torch.stack([torch.arange(T) + 20, torch.arange(T).flip(0)])
    theirs = reference(ids, position_ids=positions).logits
    assert error(build_ours(reference)(ids, position_ids=positions), theirs) <= 1e-10
    shared = build_ours(reference)(ids, position_ids=positions[0])
    assert error(shared[:1], theirs[:1]) <= 1e-10


@pytest.mark.parametrize("kind", ["125m", "galactica"])
@torch.no_grad()
def test_a_model_without_its_final_norm_is_that_of_transformers(kind: str) -> None:
    reference = build_reference(kind, dtype=torch.float64, _remove_final_layer_norm=True)
    ours, ids = build_ours(reference), ids_of(B, T)
    assert ours.final_layer_norm is None
    assert error(ours(ids), reference(ids).logits) <= 1e-10


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
@torch.no_grad()
def test_each_activation_goes_with_each_kind(kind: str, activation: str) -> None:
    reference, ids = build_reference(kind, dtype=torch.float64, activation_function=activation), ids_of(B, T)
    assert error(build_ours(reference)(ids), reference(ids).logits) <= 1e-10


# --- negative controls: each of these mistakes must break the parity that the tests above find


def zero(pattern: str) -> Callable[[OPT], None]:
    """A mistake: the biases whose names match are lost."""

    def apply(model: OPT) -> None:
        found = [p for name, p in model.named_parameters() if re.fullmatch(pattern, name)]
        assert found
        for parameter in found:
            parameter.zero_()

    return apply


def swap_norms(model: OPT) -> None:
    for layer in model.layers:
        norms = layer.self_attn_layer_norm, layer.final_layer_norm
        layer.self_attn_layer_norm, layer.final_layer_norm = reversed(norms)


def swap_activation(model: OPT) -> None:
    for layer in model.layers:
        layer.activation = torch.relu if layer.activation is nn.functional.gelu else nn.functional.gelu


def drop_projection(name: str) -> Callable[[OPT], None]:
    """A mistake: the narrow vectors are laid into the wide ones, or cut out of them, as they are."""

    def apply(model: OPT) -> None:
        nn.init.eye_(model.get_submodule(name).weight)

    return apply


def drop_final_norm(model: OPT) -> None:
    bare = OPT(dataclasses.replace(model.config, _remove_final_layer_norm=True))
    assert bare.final_layer_norm is None
    model.final_layer_norm = bare.final_layer_norm


def norm_on_the_other_side(model: OPT) -> None:
    for layer in model.layers:
        layer.norm_before = not layer.norm_before


def scale_embeddings(model: OPT) -> None:
    """As fairseq can, and OPT does not: only where it enters, not in the head."""
    model.embed_tokens.register_forward_hook(lambda module, args, x: x * model.config.hidden_size**0.5)


LAYER_BIASES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2", "self_attn_layer_norm",
                "final_layer_norm")  # fmt: skip
MISTAKES: list[tuple[str, str, Callable[[OPT], None]]] = [
    *((kind, f"{b} zeroed", zero(rf"layers\.\d+\.{b}\.bias")) for kind in ("125m", "350m") for b in LAYER_BIASES),
    ("125m", "decoder's final_layer_norm.bias zeroed", zero(r"final_layer_norm\.bias")),
    *((kind, "norms swapped", swap_norms) for kind in ("125m", "350m")),
    *((kind, "relu and gelu swapped", swap_activation) for kind in KINDS),
    *((kind, "norm on the other side", norm_on_the_other_side) for kind in KINDS),
    *((kind, "embeddings scaled", scale_embeddings) for kind in KINDS),
    *(("350m", f"{name} dropped", drop_projection(name)) for name in ("project_in", "project_out")),
    *((kind, "final norm dropped", drop_final_norm) for kind in ("125m", "galactica")),
]
VISIBLE = 1e-2  # a thousand times what parity allows


@pytest.mark.parametrize(("kind", "mistake"), [m[::2] for m in MISTAKES], ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
@torch.no_grad()
def test_a_mistake_breaks_parity(kind: str, mistake: Callable[[OPT], None]) -> None:
    reference, ids = build_reference(kind), ids_of(B, T)
    ours, theirs = build_ours(reference), reference(ids).logits
    assert error(ours(ids), theirs) <= TOLERANCES[torch.float32]
    mistake(ours)
    assert error(ours(ids), theirs) > VISIBLE


@pytest.mark.parametrize("offset", [POSITION_OFFSET - 1, POSITION_OFFSET + 1])
@torch.no_grad()
def test_positions_off_by_one_break_parity(kind: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, ids = build_reference(kind), ids_of(B, T)
    ours, theirs = build_ours(reference), reference(ids).logits
    assert error(ours(ids), theirs) <= TOLERANCES[torch.float32]
    monkeypatch.setattr("minopt.model.POSITION_OFFSET", offset)
    assert error(ours(ids), theirs) > VISIBLE


@torch.no_grad()
def test_positions_that_count_padding_break_parity(kind: str) -> None:
    reference, ids, mask = build_reference(kind), ids_of(B, T), MASKS["left padding"]
    assert mask is not None
    theirs = reference(ids, attention_mask=mask.long()).logits
    assert error(build_ours(reference)(ids, mask, position_ids=torch.arange(T))[mask], theirs[mask]) > VISIBLE


# --- structure and initial weights


def test_parameters_carry_the_published_names(kind: str) -> None:
    theirs = {name.removeprefix("model.decoder."): p.shape for name, p in build_reference(kind).named_parameters()}
    assert {name: p.shape for name, p in OPT(config_of(kind), device="meta").named_parameters()} == theirs
    assert not any("lm_head" in name for name in theirs)


@torch.no_grad()
def test_there_is_no_head_but_the_token_table(kind: str) -> None:
    model, ids = build(kind), ids_of(2, 4)
    assert not [name for name in model.state_dict() if "head" in name]
    before = model(ids)
    model.embed_tokens.weight[7] *= 2  # not among the ids
    assert not (ids == 7).any()
    after = model(ids)
    assert error(after[..., 7], 2 * before[..., 7]) <= 1e-12
    assert torch.equal(after[..., 8:], before[..., 8:])


@pytest.mark.parametrize("std", [0.006, 0.02])
def test_initial_weights_are_those_of_the_paper(kind: str, std: float) -> None:
    """Within five standard errors of the sample."""
    assert OPTConfig().init_std == 0.006
    torch.manual_seed(0)
    config = config_of(kind, hidden_size=128, ffn_dim=256, vocab_size=512, num_hidden_layers=4, init_std=std)
    for name, parameter in OPT(config).named_parameters():
        if name.endswith("norm.weight"):
            assert parameter.eq(1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            drawn = torch.cat([parameter[:1], parameter[2:]]) if name == "embed_tokens.weight" else parameter
            assert name != "embed_tokens.weight" or not parameter[1].any()  # the row of padding
            expected = std / math.sqrt(2 * 4) if re.search(r"(out_proj|fc2)\.weight", name) else std
            assert drawn.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * drawn.numel())), name
            assert abs(drawn.mean().item()) < 5 * expected / math.sqrt(drawn.numel()), name


def test_on_meta_nothing_is_allocated_or_drawn() -> None:
    before = torch.get_rng_state()
    model = OPT(OPTConfig.preset("opt-175b"), device="meta", dtype=torch.float16)
    assert all(t.is_meta and t.dtype == torch.float16 for t in itertools.chain(model.parameters(), model.buffers()))
    assert torch.equal(torch.get_rng_state(), before)
    model = OPT(config_of("125m"), dtype=torch.bfloat16, device="cpu")
    assert not torch.equal(torch.get_rng_state(), before)
    assert ({p.dtype for p in model.parameters()}, model.device) == ({torch.bfloat16}, torch.device("cpu"))


# --- parts of a forward pass


@torch.no_grad()
def test_forward_is_head_of_hidden_states_of_all_positions_or_the_last_ones(kind: str) -> None:
    model, ids, mask = build(kind), ids_of(B, T), MASKS["left padding"]
    h = model.hidden_states(ids, mask)
    assert h.shape == (B, T, model.config.embed_dim)
    assert torch.equal(model.head(h), model(ids, mask))
    for keep in (1, 5, T, T + 1):
        assert error(model(ids, mask, logits_to_keep=keep), model.head(h)[:, -keep:]) <= 1e-12


@torch.no_grad()
def test_wanted_positions_alone_are_those_of_all(kind: str) -> None:
    model, ids, mask = build(kind), ids_of(B, T), MASKS["left padding"]
    for wanted in (torch.tensor([T - 1, B * T - 1, T - 2]), torch.tensor([], dtype=torch.long)):
        expected = model.hidden_states(ids, mask).flatten(0, 1)[wanted]
        found = model.hidden_states(ids, mask, wanted=wanted)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    dropped = OPT(dataclasses.replace(model.config, layerdrop=1.0), dtype=torch.float64).train()
    assert dropped.hidden_states(ids, mask, wanted=torch.tensor([3])).shape == (1, model.config.embed_dim)


# --- the cache


def splits(tokens: int) -> list[tuple[int, ...]]:
    """Every way to read so many tokens in one or more chunks."""
    cuts = (c for n in range(tokens) for c in itertools.combinations(range(1, tokens), n))
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, tokens))) for cut in cuts]


def read_in_chunks(
    model: OPT, ids: Tensor, mask: Tensor | None, chunks: tuple[int, ...], cache: KVCache, by_slots: bool
) -> Tensor:
    """Logits of all positions; by slots as a CUDA graph reads them, with a mask of numbers over the whole cache."""
    logits, begin, device = [], 0, model.device
    for chunk in chunks:
        end = begin + chunk
        if by_slots:
            cache.slots = torch.arange(begin, end)
            real = torch.ones(2, cache.capacity, dtype=torch.bool) if mask is None else mask
            seen = masks.causal_mask(real, begin, chunk, cache.capacity, device)
            assert seen is not None
            places = masks.positions(real, begin, chunk, device)
            logits.append(model(ids[:, begin:end], masks.added_mask(seen, model.dtype), places, cache))
        else:
            logits.append(model(ids[:, begin:end], None if mask is None else mask[:, :end], cache=cache))
        begin = end
    assert cache.length == (0 if by_slots else begin)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("dtype", "by_slots", "padded"),
    [*itertools.product([torch.float64], [False, True], [False, True]), (torch.float32, False, True)],
)
@torch.no_grad()
def test_every_split_into_prefill_and_decode_gives_what_one_pass_gives(
    kind: str, dtype: torch.dtype, by_slots: bool, padded: bool
) -> None:
    model, ids, capacity = build(kind, dtype), ids_of(2, 9), 11
    assert len(splits(9)) == 256
    mask = torch.arange(capacity) >= torch.tensor([[4], [0]]) if padded else None
    whole = model(ids, None if mask is None else mask[:, :9])
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask[:, :9]
    for chunks in splits(9):
        logits = read_in_chunks(model, ids, mask, chunks, model.new_cache(2, capacity), by_slots)
        assert error(logits[real], whole[real]) <= TOLERANCES[dtype], chunks


@torch.no_grad()
def test_read_gives_the_logits_that_are_wanted(kind: str) -> None:
    """In the order in which they are asked for; without a mask each token attends to all before it, cached ones too."""
    model, ids = build(kind), ids_of(2, 6)
    cache, whole = model.new_cache(2, 6), model(ids)
    at = torch.arange(6).expand(2, 6)
    for begin, end, wanted in ((0, 3, [5, 0, 2]), (3, 5, None), (5, 6, [1])):
        found = model.read(
            ids[:, begin:end], at[:, begin:end], None, None if wanted is None else torch.tensor(wanted), cache
        )
        expected = whole[:, begin:end].flatten(0, 1)
        assert error(found, expected if wanted is None else expected[wanted]) <= 1e-10
    assert cache.length == 6


# --- rows do not see each other, nor padding, nor other documents


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_a_left_padded_batch_is_each_row_alone(kind: str, dtype: torch.dtype) -> None:
    model = build(kind, dtype)
    rows = [ids_of(1, length, seed=length)[0] for length in (1, 5, 12, 7)]
    ids, mask = pad_left(rows)
    logits = model(ids, mask)
    for row, of_row, real in zip(rows, logits, mask.bool(), strict=True):
        assert error(of_row[real], model(row[None])[0]) <= TOLERANCES[dtype]


@torch.no_grad()
def test_what_stands_under_padding_does_not_matter(kind: str) -> None:
    model, ids, mask = build(kind), ids_of(B, T), MASKS["interior zeros"]
    assert mask is not None
    other = torch.where(mask, ids, ids_of(B, T, seed=1))
    assert not torch.equal(other, ids)
    assert torch.equal(model(ids, mask)[mask], model(other, mask)[mask])


@pytest.mark.parametrize("past", [0, 2], ids=["prompt", "later"])
def test_padding_takes_no_position_and_attends_at_least_to_itself(past: int) -> None:
    """Not every kernel gives finite numbers for a row that attends nowhere."""
    real = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 1]])
    tokens, device = 5 - past, torch.device("cpu")
    places = torch.tensor([[-1, -1, -1, -1, -1], [-1, -1, -1, 0, 1], [0, 1, -1, -1, 2]])
    assert torch.equal(masks.positions(real, past, tokens, device), places[:, -tokens:])
    mask = masks.causal_mask(real, past, tokens, 5, device)
    assert mask is not None
    own, causal = torch.eye(5).bool()[-tokens:], torch.ones(5, 5).tril().bool()[-tokens:]
    assert torch.equal(mask[:, 0], causal & real[:, None].bool() | own)


@pytest.mark.parametrize("shared", [False, True], ids=["a mask a row", "one mask"])
@torch.no_grad()
def test_documents_packed_in_a_row_are_each_alone(kind: str, shared: bool) -> None:
    """A four-dimensional mask and restarted positions, in one pass and in cached chunks."""
    model = build(kind)
    cuts = [5, 5] if shared else [5, 8]
    ids = ids_of(2, T)
    document = torch.stack([torch.arange(T) >= cut for cut in cuts]).long()  # [B, T]
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(T - cut)]) for cut in cuts])
    mask = (document[:, :, None] == document[:, None, :]) & torch.ones(T, T).tril().bool()
    mask = mask[:1, None] if shared else mask[:, None]  # [B or 1, 1, T, T]
    packed = model(ids, mask, positions)
    cache = model.new_cache(2, T)
    first = model(ids[:, :7], mask[:, :, :7, :7], positions[:, :7], cache)
    second = model(ids[:, 7:], mask[:, :, 7:], positions[:, 7:], cache)
    assert error(torch.cat([first, second], dim=1), packed) <= 1e-10
    for row, cut, logits in zip(ids, cuts, packed, strict=True):
        alone = torch.cat([model(row[None, :cut])[0], model(row[None, cut:])[0]])
        assert error(logits, alone) <= 1e-10
    assert error(model(ids), packed) > VISIBLE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
@torch.no_grad()
def test_sixteen_bits_stay_finite_under_padding_and_near_float32(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Rows that are padding altogether, and rows with some: none may divide zero by zero."""
    reference = build_reference(kind)
    ids = ids_of(4, T)
    mask = torch.arange(T) >= torch.tensor([[4], [0], [T], [T - 1]])
    exact, ours = build_ours(reference)(ids, mask), build_ours(reference.to(dtype))
    cache = ours.new_cache(4, T)
    cached = [ours(ids[:, :6], mask[:, :6], cache=cache), ours(ids[:, 6:], mask, cache=cache)]
    for logits in (ours(ids, mask), torch.cat(cached, dim=1)):
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert error(logits.float()[mask], exact[mask]) <= tolerance
    with torch.enable_grad():
        loss_of(ours.train()(ids, mask).float(), ids, mask).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@torch.no_grad()
def test_queries_are_scaled_before_the_product_so_that_it_fits_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of 16 * 80 * 80 = 102,400 does not, a quarter of it does. Some kernels compute it in float16."""
    model = OPT(config_of("125m", hidden_size=16, num_attention_heads=1, num_hidden_layers=1, ffn_dim=16))
    attention = model.half().eval().layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.zero_()
        projection.bias.fill_(80.0)
    attend, products = nn.functional.scaled_dot_product_attention, []

    def spy(query: Tensor, key: Tensor, *rest: Any, scale: float, **options: Any) -> Tensor:
        products.append(scale * (query @ key.transpose(-1, -2)))
        return attend(query, key, *rest, scale=scale, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    assert model(ids_of(2, 5)).isfinite().all()
    assert [product.unique().tolist() for product in products] == [[25600.0]]


# --- gradients and training


def loss_of(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens that follow real ones: what stands on padding has no meaning."""
    labels = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_those_of_transformers(kind: str, mask: str) -> None:
    reference = build_reference(kind, dtype=torch.float64, dropout=0.0, attention_dropout=0.0).train()
    ours, ids, attention_mask = build_ours(reference).train(), ids_of(B, T), MASKS[mask]
    ids[0, 10] = reference.config.pad_token_id  # looking it up gives its row no gradient, the head does
    theirs = reference(ids, attention_mask=attention_mask if attention_mask is None else attention_mask.long()).logits
    losses = loss_of(ours(ids, attention_mask), ids, attention_mask), loss_of(theirs, ids, attention_mask)
    for loss in losses:
        loss.backward()
    assert error(losses[0], losses[1]) <= 1e-10
    wanted = {name.removeprefix("model.decoder."): p.grad for name, p in reference.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert set(found) == set(wanted)
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in found.items():
        # That of k_proj.bias is 0 but for rounding.
        scale = largest if name.endswith("k_proj.bias") else wanted[name].abs().max().item()
        assert scale > 0, name
        assert (gradient - wanted[name]).abs().max().item() <= 1e-10 * scale, name


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "layerdrop"])
@torch.no_grad()
def test_dropout_acts_in_training_and_not_in_evaluation(kind: str, option: str) -> None:
    off: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    reference = build_reference(kind, **off)
    without, ids = build_ours(reference), ids_of(2, T)
    model = OPT(dataclasses.replace(without.config, **{option: 0.5}))
    model.load_state_dict(without.state_dict())
    torch.manual_seed(0)
    drawn = [model.train()(ids) for _ in range(8)]
    assert all(logits.isfinite().all() for logits in drawn)
    assert all(any(error(a, b) > VISIBLE for b in drawn) for a in drawn)
    assert torch.equal(model.eval()(ids), without(ids))
    assert torch.equal(without.train()(ids), without.eval()(ids))


@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 2**-17, 1.0])
def test_dropout_drops_its_share_and_scales_the_rest(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((3, 5, 6667), 2.0, requires_grad=True)
    y = _dropout(x, p, training=True)
    y.sum().backward()
    kept, share = y != 0, 1 - round(p * 2**16) / 2**16
    count = x.numel()
    assert abs(kept.sum().item() - count * share) <= 5 * math.sqrt(count * share * (1 - share))
    if share:
        assert torch.allclose(y[kept], torch.tensor(2.0 / share))
        neighbours = (kept.flatten()[1:] & kept.flatten()[:-1]).sum().item()  # share a drawn word
        assert abs(neighbours - count * share**2) <= 10 * math.sqrt(count * share**2)
    assert x.grad is not None
    assert torch.equal(x.grad * 2, y.detach())
    assert _dropout(x, p, training=False) is x
    torch.manual_seed(0)
    assert torch.equal(_dropout(x, p, training=True), y)


@torch.no_grad()
def test_layerdrop_skips_its_share_of_layers() -> None:
    torch.manual_seed(0)
    model, ran = OPT(config_of("125m", layerdrop=0.25)).train(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    for _ in range(400):
        model(ids_of(1, 2))
    assert abs(len(ran) - 1200 * 0.75) < 5 * math.sqrt(1200 * 0.25 * 0.75)  # five standard deviations of a binomial


# --- what is refused


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("cache capacity", {"input_ids": ids_of(2, 5)}, 4, r"cache: 4 tokens cached \+ 5 new = 9, its capacity is 8"),
    ("mask too short", {"input_ids": ids_of(2, 3), "attention_mask": torch.ones(2, 3)}, 4,
     r"attention_mask: expected \[2, 7\] \(cached and new tokens\), got \[2, 3\]"),
    ("mask of other rows", {"input_ids": ids_of(2, 3), "attention_mask": torch.ones(1, 7)}, 4,
     r"attention_mask: expected \[2, 7\].*got \[1, 7\]"),
    ("mask of three dims", {"input_ids": ids_of(2, 3), "attention_mask": torch.ones(2, 3, 7)}, 4,
     r"attention_mask: expected \[2, 7\].*got \[2, 3, 7\]"),
    ("four-dimensional mask", {"input_ids": ids_of(2, 3), "attention_mask": torch.ones(2, 1, 3, 3).bool()}, 4,
     r"attention_mask: expected \[2, 1, 3, 7\].*got \[2, 1, 3, 3\]"),
    ("mask with heads", {"input_ids": ids_of(2, 3), "attention_mask": torch.ones(2, 4, 3, 3).bool()}, 0,
     r"attention_mask: expected \[2, 1, 3, 3\].*got \[2, 4, 3, 3\]"),
    ("additive mask", {"input_ids": ids_of(2, 3), "attention_mask": torch.zeros(2, 1, 3, 3)}, 0,
     r"attention_mask: expected booleans where it has 4 dims .*got torch\.float32"),
    ("positions of another length", {"input_ids": ids_of(2, 3), "position_ids": ids_of(2, 7)}, 4,
     r"position_ids: expected \[2, 3\] or \[3\], got \[2, 7\]"),
    ("negative logits_to_keep", {"input_ids": ids_of(2, 3), "logits_to_keep": -1}, 4,
     r"logits_to_keep: expected 0 \(all\) or more, got -1"),
    ("batch of another size", {"input_ids": ids_of(3, 2)}, 4, "cache: made for 2 rows, got input_ids of 3"),
    ("ids of one dim", {"input_ids": ids_of(1, 2)[0]}, 4, r"input_ids: expected \[batch, tokens\].*got \[2\]"),
    ("ids of three dims", {"input_ids": ids_of(2, 2)[None]}, 4, r"input_ids: expected .*got \[1, 2, 2\]"),
    ("no rows", {"input_ids": ids_of(0, 2)}, 4, r"input_ids: expected .*at least one of each, got \[0, 2\]"),
    ("no tokens", {"input_ids": ids_of(2, 0)}, 4, r"input_ids: expected .*at least one of each, got \[2, 0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "past", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
@torch.no_grad()
def test_what_does_not_fit_is_refused_and_the_cache_is_as_it_was(
    arguments: dict[str, Any], past: int, message: str
) -> None:
    model = OPT(config_of("125m")).eval()
    cache = model.new_cache(2, 8)
    if past:
        model(ids_of(2, past), cache=cache)
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    with pytest.raises(ValueError, match=message):
        model(**arguments, cache=cache)
    assert cache.length == past
    assert all(torch.equal(a, b) for a, b in zip((*cache.keys, *cache.values), before, strict=True))


@pytest.mark.parametrize(("past", "new"), [(0, 65), (60, 5), (64, 1)])
@torch.no_grad()
def test_more_tokens_than_positions_are_refused_with_the_numbers(past: int, new: int) -> None:
    model = OPT(config_of("125m")).eval()
    cache = model.new_cache(2, 80)
    if past:
        model(ids_of(2, past), cache=cache)
    total = past + new
    message = rf"input_ids: {past} tokens cached \+ {new} new = {total} positions, the model has 64"
    for mask in (None, torch.ones(2, total), torch.arange(total) >= torch.tensor([[3], [0]])):
        with pytest.raises(ValueError, match=message):
            model(ids_of(2, new), mask, cache=cache)
    assert cache.length == past
    assert not any(t[:, :, past:].any() for t in (*cache.keys, *cache.values))


@torch.no_grad()
def test_padding_may_make_a_batch_wider_than_the_positions(kind: str) -> None:
    """Only real tokens take positions, with a cache and without."""
    model, ids = build(kind), ids_of(2, 70)
    mask = torch.arange(70) >= torch.tensor([[6], [60]])  # 64 and 10 real tokens
    cache = model.new_cache(2, 70)
    for logits in (model(ids, mask), read_in_chunks(model, ids, mask, (66, 3, 1), cache, by_slots=False)):
        for row, of_row, real in zip(ids, logits, mask, strict=True):
            assert error(of_row[real], model(row[None, real])[0]) <= 1e-10


def test_linear_layers_are_of_the_plain_type_that_other_programs_look_for(kind: str) -> None:
    model = build_ours(build_reference(kind))
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    projections = 2 if kind == "350m" else 0
    assert len(linear) == 3 * 6 + projections
    assert linear == {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
