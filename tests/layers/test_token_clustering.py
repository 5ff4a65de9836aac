"""Token clustering and reconstruction against published figures and their own definition; both attached to models."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from lissom.export.capture import capture, module_paths
from lissom.layers.token_clustering import (
    CLUSTERING_FACTOR,
    RECONSTRUCTION_FACTOR,
    TokenClustering,
    TokenReconstruction,
    attach_token_clusters,
    find_token_blocks,
    remove_token_clusters,
    token_clusters_of,
    token_grid,
)

GRIDS = [((24, 24), (16, 16)), ((24, 24), (12, 12)), ((12, 7), (5, 4)), ((11, 13), (6, 5)), ((8, 9), (8, 3)),
         ((6, 6), (1, 1)), ((5, 4), (5, 4))]  # fmt: skip


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def home(grid_in: tuple[int, int], grid_out: tuple[int, int]) -> torch.Tensor:
    """int64 (N, 2): row and column of every token's home."""
    index = torch.arange(grid_out[0] * grid_out[1]).float().view(1, 1, *grid_out)
    index = functional.interpolate(index, size=grid_in, mode="nearest").long().flatten()
    return torch.stack((index // grid_out[1], index % grid_out[1]), 1)


def reachable(grid_in: tuple[int, int], grid_out: tuple[int, int], window: int) -> torch.Tensor:
    """bool (N, M): whether a token may use a centre."""
    homes = home(grid_in, grid_out)
    centres = torch.stack(torch.meshgrid(*map(torch.arange, grid_out), indexing="ij"), -1).view(-1, 2)
    return ((homes[:, None] - centres).abs() <= window // 2).all(-1)


def definition(x, grid_in, grid_out, iterations, temperature, window):
    """The published operator, written down: every token with every centre."""
    maps = x.transpose(1, 2).unflatten(2, grid_in)
    centres = functional.adaptive_avg_pool2d(maps, grid_out).flatten(2).transpose(1, 2)
    far = ~reachable(grid_in, grid_out, window)
    for _ in range(iterations):
        distance = (x[:, :, None] - centres[:, None]).square().sum(-1) + 1e16 * far
        affinity = (-temperature * distance).softmax(-1).detach()
        centres = affinity.transpose(1, 2) @ x / affinity.sum(1).clamp_min(1e-16)[..., None]
    return centres


# Against published figures


@pytest.fixture(scope="module")
def published() -> tuple[Any, list[dict[str, Any]]]:
    where = os.environ.get("LISSOM_PARITY")
    if not where:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    spec = importlib.util.spec_from_file_location("published_figures", Path(where) / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, json.loads((Path(where) / "expedit" / "cases.json").read_text())["cases"]


@pytest.mark.parametrize("number", range(4))
def test_same_operators_as_published(number: int, published: tuple[Any, list[dict[str, Any]]]) -> None:
    parity, cases = published
    case = cases[number]
    assert len(cases) == 4
    maps = parity.make_input(tuple(case["input"]), case["input_name"])
    x, grid_out = maps.flatten(2).transpose(1, 2), tuple(case["grid_out"])
    clustering = TokenClustering(maps.shape[2:], grid_out, case["n_iters"], case["temperature"], case["window"])
    centres = clustering(x)
    assert parity.close(parity.digest(centres), case["clustered"], rtol=1e-5)
    labels = clustering.labels(x, centres)[0].tolist()
    assert labels[: len(case["hard_labels_first_image"])] == case["hard_labels_first_image"]
    refined = parity.make_input(tuple(centres.shape), case["refined_name"])
    rebuilt = TokenReconstruction(case["reconstruction_k"], case["reconstruction_temperature"])(refined, x, centres)
    assert parity.close(parity.digest(rebuilt), case["reconstructed"], rtol=1e-5)


# Against the definition


@pytest.mark.parametrize(("grid_in", "grid_out"), GRIDS)
@pytest.mark.parametrize("window", [1, 3, 5])
def test_bands_compute_what_the_definition_says(grid_in, grid_out, window):
    x = features(2, grid_in[0] * grid_in[1], 8)
    got = TokenClustering(grid_in, grid_out, 3, 0.3, window)(x)
    torch.testing.assert_close(got, definition(x, grid_in, grid_out, 3, 0.3, window), rtol=1e-4, atol=1e-5)


def test_a_token_is_compared_with_a_part_of_the_centres_only():
    large = TokenClustering((24, 24), (16, 16))
    assert large.bands * large.band_rows < 24 * 16 / 2
    assert large.bias.numel() < 24 * 24 * 16 * 16 / 2


def test_no_iteration_is_average_pooling_and_the_same_grid_the_tokens():
    x = features(2, 11 * 13, 5)
    pooled = functional.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (11, 13)), (4, 6))
    got = TokenClustering((11, 13), (4, 6), 0)(x)
    torch.testing.assert_close(got, pooled.flatten(2).transpose(1, 2))
    same = TokenClustering((11, 13), (11, 13), 0)(x)
    torch.testing.assert_close(same, x)
    for temperature in (0.5, "auto"):
        torch.testing.assert_close(TokenReconstruction(1, temperature)(same, x, same), x)


@pytest.mark.parametrize("temperature", [0.02, 10.0, "auto"])
def test_equal_tokens_have_equal_centres(temperature):
    x = features(2, 1, 32).mul(30).expand(2, 12 * 12, 32)
    centres = TokenClustering((12, 12), (5, 7), temperature=temperature)(x)
    torch.testing.assert_close(centres, x[:, :35], rtol=1e-4, atol=1e-4)


def test_at_no_temperature_a_centre_is_the_mean_of_all_that_reach_it():
    x, grids = features(1, 10 * 15, 6), ((10, 15), (4, 5))
    reach = reachable(*grids, 3).float()
    # Softmax gives a token's weight in equal parts to the centres it reaches.
    weights = reach / reach.sum(1, keepdim=True)
    want = weights.T @ x[0] / weights.sum(0)[:, None]
    torch.testing.assert_close(TokenClustering(*grids, 1, 1e-9, 3)(x)[0], want, rtol=1e-4, atol=1e-5)


def test_hot_and_well_separated_is_a_hard_assignment():
    # Left and right halves far apart; the middle of three columns of centres starts between them.
    side = (torch.arange(12) >= 6).float().repeat(4)[None, :, None]
    x = 20 * side + 0.1 * features(1, 48, 3)
    clustering = TokenClustering((4, 12), (2, 3), 20, 50.0)
    centres = clustering(x)
    assert (centres - centres.round(decimals=-1)).abs().max() < 0.3  # each at 0 or at 20
    labels = clustering.labels(x, centres)[0]
    assert torch.equal(centres[0, labels].mean(-1) > 10, side[0, :, 0] > 0.5)


def test_gradients_pass_through_the_last_mean_only():
    x = features(1, 8 * 8, 4).requires_grad_()
    up = features(1, 9, 4, seed=1)
    (got,) = torch.autograd.grad((TokenClustering((8, 8), (3, 3), 4, 0.3)(x) * up).sum(), x)
    (want,) = torch.autograd.grad((definition(x, (8, 8), (3, 3), 4, 0.3, 5) * up).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    (pooled,) = torch.autograd.grad(TokenClustering((8, 8), (2, 2), 0)(x).sum(), x)
    torch.testing.assert_close(pooled, torch.full_like(pooled, 1 / 16))
    centres = TokenClustering((8, 8), (3, 3))(x)
    TokenReconstruction(4, "auto")(centres, x, centres).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


# Reconstruction


def test_rows_of_weights():
    tokens, centres = features(2, 30, 6), features(2, 12, 6, seed=1)
    for normalize, power in (("l2", 2), ("l1", 1)):
        weights = TokenReconstruction(5, 0.3, normalize).weights(tokens, centres)
        assert ((weights > 0).sum(-1) == 5).all()
        torch.testing.assert_close(weights.pow(power).sum(-1), torch.ones(2, 30))
        same = features(2, 1, 4, seed=2).expand(2, 12, 4)
        want = same[:, :1] * weights.sum(-1, keepdim=True)
        torch.testing.assert_close(TokenReconstruction(5, 0.3, normalize)(same, tokens, centres), want)
    distance = torch.cdist(tokens, centres).square()
    plain = functional.normalize((-0.3 * distance).exp(), dim=-1)
    for k in (0, 12, 99):
        got = TokenReconstruction(k, 0.3).weights(tokens, centres)
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


def test_ties_keep_more_than_k():
    centres = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]])
    weights = TokenReconstruction(1, 0.5, "l1").weights(torch.zeros(1, 1, 2), centres)
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.5, 0.0]]]))


def test_large_features_do_not_underflow():
    tokens, centres = 200 * features(1, 20, 16), 200 * features(1, 9, 16, seed=1)
    distance = torch.cdist(tokens.double(), centres.double()).square()
    assert (0.02 * distance.amin(-1) > 104).all()  # exp of less is 0 in float32
    logits = -0.02 * distance
    want = functional.normalize((logits - logits.amax(-1, keepdim=True)).exp(), dim=-1).float()
    torch.testing.assert_close(TokenReconstruction(9).weights(tokens, centres), want, rtol=1e-2, atol=1e-2)


# Temperature from the image


def test_auto_is_a_factor_over_mean_squared_distances():
    x = features(2, 12 * 10, 7) * torch.tensor([1.0, 6.0]).view(2, 1, 1)
    first = TokenClustering((12, 10), (5, 4), 0)(x)
    rows, columns = home((12, 10), (5, 4)).T
    spread = (x - first[:, rows * 4 + columns]).square().sum(-1).mean(1)
    got = TokenClustering((12, 10), (5, 4), temperature="auto")(x)
    for image in range(2):
        one = TokenClustering((12, 10), (5, 4), temperature=CLUSTERING_FACTOR / float(spread[image]))
        torch.testing.assert_close(got[image : image + 1], one(x[image : image + 1]), rtol=1e-4, atol=1e-4)
    nearest = torch.cdist(x, got).square().amin(-1).mean(1)
    weights = TokenReconstruction(6, "auto").weights(x, got)
    for image in range(2):
        one = TokenReconstruction(6, RECONSTRUCTION_FACTOR / float(nearest[image]))
        want = one.weights(x[image : image + 1], got[image : image + 1])
        torch.testing.assert_close(weights[image : image + 1], want, rtol=1e-3, atol=1e-4)


def test_auto_does_not_depend_on_the_features_scale():
    x = features(1, 100, 6)
    clustering = TokenClustering((10, 10), (6, 6), temperature="auto")
    torch.testing.assert_close(clustering(40 * x), 40 * clustering(x), rtol=1e-4, atol=1e-3)
    weights = TokenReconstruction(temperature="auto").weights
    s = clustering(x)
    torch.testing.assert_close(weights(40 * x, 40 * s), weights(x, s), rtol=1e-4, atol=1e-5)


# What makes no sense


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((8, 8), (9, 4)), "8 x 8 tokens has no 9 x 4"),
        (((8, 8), (0, 4)), "has no 0 x 4"),
        (((8, 8), 4), r"\(rows, columns\)"),
        (((8, 8), (4, 4), -1), "average pooling"),
        (((8, 8), (4, 4), 5, 0.0), "above 0 or 'auto'"),
        (((8, 8), (4, 4), 5, "warm"), "above 0 or 'auto'"),
        (((8, 8), (4, 4), 5, 0.1, 4), "give an odd one"),
    ],
)
def test_clusterings_that_make_no_sense(arguments, says):
    with pytest.raises(ValueError, match=says):
        TokenClustering(*arguments)


def test_reconstructions_and_inputs_that_make_no_sense():
    with pytest.raises(ValueError, match="k is -1"):
        TokenReconstruction(-1)
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        TokenReconstruction(normalize="max")
    with pytest.raises(ValueError, match=r"\(B, 64, C\) of a 8 x 8 grid"):
        TokenClustering((8, 8), (4, 4))(torch.zeros(1, 65, 3))
    with pytest.raises(ValueError, match=r"\(B, 64, C\)"):
        TokenClustering((8, 8), (4, 4))(torch.zeros(64, 3))


# On a transformer


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**arguments, **options}).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return features(2, 3, 32, 32)


def test_the_hooks_do_what_a_loop_would(images):
    model = vit(reg_tokens=2)
    x = model._pos_embed(model.patch_embed(images))
    for block in model.blocks[:2]:
        x = block(x)
    front, tokens = x[:, :3], x[:, 3:]
    clustering, reconstruction = TokenClustering((8, 8), (5, 6), 4, 0.1), TokenReconstruction(7, 0.1, "l1")
    centres = clustering(tokens)
    x = torch.cat((front, centres), 1)
    for block in model.blocks[2:]:
        x = block(x)
    short = model.forward_head(model.norm(x))
    normed = model.norm(x)
    of_blocks, of_norm = (
        torch.cat((y[:, :3], reconstruction(y[:, 3:], tokens, centres)), 1) for y in (x, normed)
    )  # fmt: skip
    settings: dict[str, Any] = {"iterations": 4, "temperature": 0.1, "k": 7}
    before = list(model.state_dict())
    attach_token_clusters(model, 2, (5, 6), **settings)
    torch.testing.assert_close(model(images), short)
    assert list(model.state_dict()) == before
    attach_token_clusters(model, 2, (5, 6), reconstruct=True, **settings)  # takes the place of the first
    torch.testing.assert_close(model.forward_features(images), model.norm(of_blocks))
    attach_token_clusters(model, 2, (5, 6), reconstruct="norm", **settings)
    torch.testing.assert_close(model.forward_features(images), of_norm)


def test_taken_off_again_the_model_is_as_it_was(images):
    model = vit()
    want, paths = model(images), [path for path, _ in model.named_modules()]
    attach_token_clusters(model, 1, (4, 4), reconstruct=True)
    clustered = [path for path, _ in model.named_modules() if not path.startswith("token_clusters")]
    assert clustered == paths
    assert not torch.equal(model(images), want)
    remove_token_clusters(model)
    assert torch.equal(model(images), want)
    assert [path for path, _ in model.named_modules()] == paths
    assert remove_token_clusters(model) is model


def test_a_copy_has_hooks_of_its_own(images):
    model = attach_token_clusters(vit(), 1, (4, 4), reconstruct=True)
    # A pass that stops early leaves tokens with a gradient behind.
    model.forward_intermediates(images, indices=[1], stop_early=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    remove_token_clusters(twin)
    assert token_clusters_of(model) is not None
    assert not torch.equal(twin(images), model(images))
    twin = copy.deepcopy(model)
    twin.token_clusters.clustering.bias.fill_(0)
    assert not torch.equal(twin(images), model(images))


def test_a_record_of_the_tokens_geometry(images):
    model = attach_token_clusters(vit(), 2, (5, 6))
    record = token_clusters_of(model)
    assert (record.after, record.grid_in, record.grid_out, record.prefix) == (2, (8, 8), (5, 6), 1)
    seen = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, inputs, output, i=i: seen.update({i: output.shape[1]}))
    model(images)
    for i, count in seen.items():
        rows, columns = token_grid(model, f"blocks.{i}")
        assert count == 1 + rows * columns
    assert token_grid(model, "blocks.1.mlp") == (8, 8)
    assert token_grid(model, "blocks.2.mlp.fc1") == (5, 6)
    assert token_grid(model, "token_clusters.clustering") == (5, 6)
    assert token_grid(model, "norm") is None
    attach_token_clusters(model, 2, (5, 6), reconstruct=True)
    assert [token_grid(model, f"blocks.{i}") for i in range(4)] == [(8, 8), (8, 8), (5, 6), (8, 8)]
    assert token_grid(vit(), "blocks.3") == (8, 8)
    assert token_grid(nn.Sequential(nn.Linear(3, 3)), "0") is None


class Layer(nn.Module):
    """A block of transformers' form: it answers with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, hidden_states: torch.Tensor, head_mask: None = None) -> tuple[torch.Tensor]:
        return (self.inner(hidden_states),)


class Theirs(nn.Module):
    """The public structure of transformers' Dinov2Model with registers."""

    def __init__(self, size: Any = (24, 32)) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.embeddings.register_tokens = nn.Parameter(torch.randn(1, 3, 16))
        self.embeddings.mask_token = nn.Parameter(torch.randn(1, 16))
        self.embeddings.patch_embeddings = nn.Module()
        self.embeddings.patch_embeddings.projection = nn.Conv2d(3, 16, 4, 4)
        self.embeddings.patch_embeddings.image_size, self.embeddings.patch_embeddings.patch_size = size, (4, 4)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embeddings.patch_embeddings.projection(images).flatten(2).transpose(1, 2)
        front = torch.cat((self.embeddings.cls_token, self.embeddings.register_tokens), 1).expand(len(x), -1, -1)
        x = torch.cat((front, x), 1)
        for layer in self.encoder.layer:
            x = layer(x, None)[0]
        return x


def test_structures_of_other_libraries(images):
    from torchvision.models import VisionTransformer as Torchvisions

    model = nn.Sequential()
    model.add_module("backbone", Theirs().eval())
    found = find_token_blocks(model)
    assert (found.path, found.owner, found.count, found.grid, found.patch, found.prefix) == (
        "backbone.encoder.layer", "backbone", 3, (6, 8), (4, 4), 4,
    )  # fmt: skip
    wide = images[:, :, :24]
    # nn.Sequential calls what is registered on it, the clustering's record too.
    assert attach_token_clusters(model, 1, (3, 4))(wide).shape == (2, 4 + 12, 16)
    assert attach_token_clusters(model, 1, (3, 4), reconstruct=True)(wide).shape == (2, 4 + 48, 16)
    theirs = Torchvisions(32, 8, 3, 2, 16, 32, num_classes=4).eval()
    found = find_token_blocks(theirs)
    assert (found.path, found.grid, found.prefix) == ("encoder.layers", (4, 4), 1)
    assert attach_token_clusters(theirs, 1, (2, 3))(images).shape == (2, 4)
    assert token_grid(theirs, "encoder.layers.encoder_layer_2") == (2, 3)
    assert find_token_blocks(Theirs(None)) is None
    assert find_token_blocks(nn.Conv2d(3, 3, 3)) is None


def test_attached_where_it_does_not_fit(images):
    with pytest.raises(ValueError, match="no list of transformer blocks"):
        attach_token_clusters(nn.Conv2d(3, 3, 3), 1, (2, 2))
    with pytest.raises(ValueError, match="after 4 of 4 blocks"):
        attach_token_clusters(vit(), 4, (2, 2))
    with pytest.raises(ValueError, match="no module 'heads'"):
        attach_token_clusters(vit(), 1, (2, 2), reconstruct="heads")
    grown = attach_token_clusters(vit(dynamic_img_size=True), 1, (4, 4))
    with pytest.raises(ValueError, match="another size"):
        grown(features(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"rebuilt from \(B, 16, K\)"):
        attach_token_clusters(vit(), 1, (4, 4), reconstruct="head")(images)
    with pytest.raises(ValueError, match="not clustered before"):
        attach_token_clusters(vit(), 1, (4, 4), reconstruct="patch_embed.proj")(images)


def test_training_through_it_reaches_all_weights(images):
    model = attach_token_clusters(vit(), 2, (5, 5), reconstruct=True).train()
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.patch_embed.proj.weight.grad.abs().max() > 0


def test_an_exported_graph_knows_both_layers(images):
    model = attach_token_clusters(vit(), 2, (5, 5), reconstruct=True)
    program = capture(model, (3, 32, 32), batch=2)
    torch.testing.assert_close(program.module()(images), model(images).detach())
    assert {"token_clusters.clustering", "token_clusters.reconstruction"} <= set(module_paths(program).values())
    assert token_clusters_of(model).seen == {}
