"""FIT: layer strings, codes and masks as published, what may depend on what, published layouts, images in groups."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lissom.errors import LissomError
from lissom.models.factory import create_model, from_published
from lissom.models.fit_transformer import (
    FIT,
    FITAR,
    FITDenoiser,
    chunk_causal,
    group_images,
    parse_layers,
    position_code,
    ungroup_images,
)
from tests.models.families import PARITY, check_trains, count, images, needs_parity, small


def cases() -> dict[str, Any]:
    assert PARITY is not None
    return json.loads((PARITY / "fit" / "cases.json").read_text())


@needs_parity
def test_published_rules() -> None:
    known = cases()
    for text, stages in known["layer_strings"].items():
        assert parse_layers(text) == [tuple(stage) for stage in stages]
    assert chunk_causal(4, 2).int().tolist() == known["chunk_causal_mask_keep_4groups_x2"]
    want = torch.tensor(known["position_code_1d_len5_dim8_max1000"])
    torch.testing.assert_close(position_code(5, 8), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "local ones in brackets"), ("2(4)", "brackets"), ("(2)(1)", "only the last"), ("(2)4x", "brackets")],
)
def test_layer_strings_that_cannot_be(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_layers(text)


def test_a_single_position_stands_at_zero() -> None:
    assert torch.equal(position_code(1, 4), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert torch.allclose(position_code(3, 2, None)[:, 0], torch.arange(3.0).sin())


def test_published_sizes() -> None:
    assert [count(name) for name in ("fit_encoder", "fit_denoiser", "fit_ar")] == [313_280, 216_652, 100_506]


def encoder(**sizes: Any) -> FIT:
    torch.manual_seed(0)
    return FIT(**{"layers": "(1)1(1)1(1)", "dim": 8, "latent_dim": 12, "heads": 2, "latent_heads": 3, "in_dim": 5,
                  "groups": 3, "group_size": 4, "latents": 2, **sizes}).eval()  # fmt: skip


@pytest.mark.parametrize("layers", ["(1)1(1)", "(0)2", "(2)", "(1)1(1)1"])
@pytest.mark.parametrize("positions", ["learned", "sin_cos", "sin_cos2d"])
def test_shapes_and_gradients(layers: str, positions: str) -> None:
    model = encoder(
        layers=layers, position=positions, latent_position="learned" if positions == "learned" else "sin_cos"
    )
    tokens, latents = model(images(2, 3, 4, 5))
    assert (tokens.shape, latents.shape) == ((2, 3, 4, 8), (2, 3, 2, 12))
    check_trains(model, images(2, 3, 4, 5))


def test_groups_meet_through_latents_only() -> None:
    x = images(1, 3, 4, 5)
    changed = x.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        for layers, meet in (("(1)1(1)", True), ("(2)", False)):
            model = encoder(layers=layers)
            own, other = model(x)[0], model(changed)[0]
            assert torch.allclose(own[:, 0], other[:, 0], atol=1e-6) is not meet
            assert not torch.allclose(own[:, 2], other[:, 2], atol=1e-3)


def test_groups_permuted_with_their_latents_permute_the_answer() -> None:
    model, order = encoder(), torch.tensor([2, 0, 1])
    x = images(2, 3, 4, 5)
    with torch.no_grad():
        want = [part[:, order] for part in model(x)]
        model.latent_position.copy_(model.latent_position.unflatten(0, (3, 2))[order].flatten(0, 1))
        for got, expected in zip(model(x[:, order]), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_causal_latents_do_not_see_later_groups() -> None:
    model = encoder(mask="causal")
    x = images(1, 3, 4, 5)
    changed = x.clone()
    changed[:, 1] += 1
    with torch.no_grad():
        own, other = model(x)[1], model(changed)[1]
    assert torch.allclose(own[:, 0], other[:, 0], atol=1e-6)
    assert not torch.allclose(own[:, 2], other[:, 2], atol=1e-3)


def test_further_tokens_come_first() -> None:
    model = encoder(second_dim=7)
    with torch.no_grad():
        tokens, latents = model(images(2, 3, 4, 5), images(2, 3, 6, 7, seed=1))
    assert (tokens.shape, latents.shape) == ((2, 3, 10, 8), (2, 3, 2, 12))


def ar(**sizes: Any) -> FITAR:
    torch.manual_seed(0)
    return FITAR(**{"vocabulary": 11, "layers": "(1)1(1)1(1)", "groups": 4, "group_size": 8, "latents": 2, "dim": 12,
                    "latent_dim": 16, **sizes}).eval()  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
def test_a_token_changes_nothing_before_it(shared: bool) -> None:
    model = ar(shared=shared)
    tokens = torch.randint(11, (1, 4, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 2, 5] = (changed[0, 2, 5] + 1) % 11
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(-1).flatten()
    assert (difference[: 2 * 8 + 5] < 1e-6).all()
    assert difference[2 * 8 + 5] > 1e-4
    assert (difference[3 * 8 :] > 1e-7).all()


def test_next_tokens_train() -> None:
    model = ar(bias=False).train()
    tokens = torch.randint(11, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 2), tokens.flatten()).backward()
    assert all(p.grad is not None for p in model.parameters())


def denoiser(**sizes: Any) -> FITDenoiser:
    torch.manual_seed(0)
    return FITDenoiser(**{"layers": "(1)1(1)1(1)", "groups": 3, "group_size": 4, "latents": 2, "dim": 8,
                          "latent_dim": 16, "in_dim": 5, "out_dim": 6, "cond_dim": 7, **sizes}).eval()  # fmt: skip


@pytest.mark.parametrize("sizes", [{}, {"local_attention": False}, {"cross_mlp": True}, {"mask": "causal"}])
def test_denoiser(sizes: dict[str, Any]) -> None:
    model = denoiser(**sizes)
    x, time, condition = images(2, 3, 4, 5), torch.tensor([0.1, 0.7]), images(2, 7, seed=1)
    with torch.no_grad():
        answer, latents = model(x, time, condition)
        assert (answer.shape, latents.shape) == ((2, 3, 4, 6), (2, 3, 2, 16))
        zeros = torch.zeros_like(latents)
        assert torch.equal(model(x, time, condition, zeros)[0], answer)
        assert torch.equal(model(x, time, condition, latents)[0], answer)  # its norm's weight starts at 0
        model.previous_norm.weight.fill_(1)
        assert not torch.allclose(model(x, time, condition, latents)[0], model(x, time, condition, zeros)[0])
        assert not torch.allclose(model(x, time + 0.1, condition)[0], model(x, time, condition)[0])
        assert not torch.allclose(model(x, time, condition + 1)[0], model(x, time, condition)[0])
        several = model(x, time, condition[:, None].expand(-1, 3, -1))[0]
        assert several.shape == answer.shape


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 4, \.\.\.\) are wanted"):
        encoder()(images(1, 4, 3, 5))
    for wrong, reason in (
        ({"mask": "all"}, "'causal'"),
        ({"position": "rope"}, "'rope'"),
        ({"position": "sin_cos2d", "group_size": 6}, "square"),
        ({"heads": 3}, "do not divide"),
        ({"latents": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            encoder(**wrong)
    with pytest.raises(ValueError, match="'causal'"):
        denoiser(mask="all")
    with pytest.raises(LissomError, match="'rope'"):
        create_model("fit_encoder", position="rope")


@pytest.mark.parametrize(
    ("groups", "patch", "shape"), [(2, 3, (2, 3, 12, 18)), (1, 4, (1, 1, 8, 4)), (3, 1, (1, 2, 6, 9))]
)
def test_images_in_groups_and_back(groups: int, patch: int, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    tokens = group_images(x, groups, patch)
    assert tokens.shape == (shape[0], groups**2, shape[2] * shape[3] // (groups * patch) ** 2, shape[1] * patch**2)
    first = x[:, :, :patch, :patch].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(tokens[:, 0, 0], first)
    assert torch.equal(ungroup_images(tokens, groups, patch, *shape[2:]), x)
    with pytest.raises(ValueError, match="not divisible"):
        group_images(images(1, 1, 7, 8), 2, 2)


def test_checkpoints_that_do_not_fit() -> None:
    state = dict(small("fit_encoder").state_dict())
    state["odd.weight"] = torch.zeros(2, 2)
    del state["stem.weight"]
    with pytest.raises(LissomError, match=r"1 missing: stem\.weight; 1 unknown: odd\.weight"):
        from_published("fit_encoder", state)


def test_it_is_captured_whole() -> None:
    program = torch.export.export(encoder(), (images(1, 3, 4, 5),))
    with torch.no_grad():
        for got, want in zip(program.module()(images(1, 3, 4, 5)), encoder()(images(1, 3, 4, 5)), strict=True):
            torch.testing.assert_close(got, want)
