"""BranchyLeNet: counts, its exit, and the light network that is cut out of it."""

from __future__ import annotations

import pytest
import torch

from lissom.layers.exits import attach_own_exits, own_exits
from lissom.meters.costs import total
from lissom.models.branchy_lenet import BranchyLeNet, LightLeNet
from tests.models.families import check_classifier, check_export, check_trains, count, images, small


def test_counts() -> None:
    assert (count("branchy_lenet"), count("light_lenet")) == (525_280, 5_500)
    shape = (1, 28, 28)
    light, whole = total(LightLeNet(), shape)[1], total(BranchyLeNet().eval(), shape)[1]
    stem = 28 * 28 * 25 * 5
    assert light == stem + 14 * 14 * 9 * 50 + 4900 == 191_100
    assert whole == stem + 14 * 14 * 25 * 100 + 7 * 7 * 25 * 1000 + 2450 * 200 + 2000
    with_exit = total(attach_own_exits(BranchyLeNet().eval()), shape)[1]
    assert with_exit - whole == light - stem


@pytest.mark.parametrize("name", ["branchy_lenet", "light_lenet"])
def test_a_network_like_any_other(name: str) -> None:
    x = images(2, 1, 28, 28)
    check_trains(small(name), x)
    check_classifier(small(name), x)
    model = small(name).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))
    check_export(model, images(1, 1, 28, 28))


def test_the_exit_answers_as_the_light_network() -> None:
    torch.manual_seed(0)
    model = BranchyLeNet(num_classes=7, in_chans=2, img_size=(17, 12), stem=3, branch=4, rest=(5, 6, 8)).eval()
    light = LightLeNet(7, 2, (17, 12), 3, 4)
    light.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(("stem.", "branch."))})
    x = images(3, 2, 17, 12)
    with torch.no_grad():
        alone = model(x)
        (exit,) = own_exits(model)
        early, late = attach_own_exits(model)(x)
        assert (exit.at, exit.carries) == ("branch", ("stem",))
        torch.testing.assert_close(early, light(x))
        torch.testing.assert_close(late, alone)
        torch.testing.assert_close(late, model.head(model.rest(model.stem(x))))
    model.train()
    early, late = model(x)
    assert early.shape == late.shape == (3, 7)


def test_images_that_are_too_small_are_told() -> None:
    with pytest.raises(ValueError, match="4 x 4 is the smallest"):
        BranchyLeNet(img_size=3)
