"""Networks by name, models as users bring them, and what they say of their input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import lissom
from lissom.data.sources import read
from lissom.errors import LissomError
from lissom.models.factory import Loaded, create_model, from_published, is_model, load_model, num_outputs, with_head
from lissom.tasks.classification import make_task

TINY = "test_resnet"  # timm's own smallest, 160 x 160

USER = """
import torch
from torch import nn

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 2, 1)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def net(): return Net()
def hundred(): return Net(100)
def nothing(): return 3
def failing(): raise ValueError("not today")
"""


@pytest.fixture
def user(tmp_path):
    file = tmp_path / "nets.py"
    file.write_text(USER)
    return file


def test_names():
    assert is_model("digits_vit")
    assert is_model("resnet18")
    assert is_model("resnet18.a1_in1k")
    assert not is_model("resnet1888")
    assert not is_model("hf-hub:timm/resnet18.a1_in1k")
    assert timm.is_model("digits_vit")  # registered by the import
    assert lissom.is_model("digits_vit")


def test_digits_vit():
    model = create_model("digits_vit").eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 192)
    assert create_model("digits_vit", num_classes=7, depth=2).get_classifier().out_features == 7
    loaded = load_model("digits_vit")
    p = loaded.preprocessing((99, 99))
    assert (p.height, p.width, p.mean, p.std, p.crop) == (32, 32, (0.5,) * 3, (0.5,) * 3, 1.0)
    assert not loaded.trained
    assert not loaded.model.training


def test_unknown_names_and_arguments():
    with pytest.raises(LissomError, match=r"no network is called 'resnet1888'; similar names: resnet18"):
        create_model("resnet1888")
    with pytest.raises(LissomError, match=r"the network resnet18 cannot be built with .*colour"):
        create_model("resnet18", colour="red")
    with pytest.raises(LissomError, match=r"no published weights for digits_vit; give a weight file"):
        load_model("digits_vit", weights="pretrained")


def test_an_unreachable_hub_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LissomError, match=r"published weights of resnet18\.a1_in1k could not be fetched \(\w+: .*\)$"):
        load_model("resnet18.a1_in1k", weights="pretrained")


def test_random_weights_are_drawn_from_the_seed_and_leave_the_callers_stream():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    a, b, c = (load_model("digits_vit", seed=seed).model.head.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


def test_from_published_takes_classes_and_channels_from_the_checkpoint():
    source = create_model(TINY, num_classes=7, in_chans=1).eval()
    model = from_published(TINY, source.state_dict()).eval()
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(model(x), source(x))


def test_from_published_translates_the_publishers_names():
    # ConvNeXt's own names differ from timm's; its file's filter turns one into the other.
    source = create_model("test_convnext", num_classes=5).eval()
    theirs = {}
    for key, value in source.state_dict().items():
        new = key.replace("stages.", "stages.").replace("head.fc.", "head.").replace("head.norm.", "norm.")
        new = new.replace("stem.", "downsample_layers.0.")
        if ".downsample." in new:
            new = "downsample_layers." + new.removeprefix("stages.").replace("downsample.", "")
        new = new.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1")
        theirs[new.replace("mlp.fc2", "pwconv2")] = value
    assert theirs.keys() != source.state_dict().keys()
    model = from_published("test_convnext", theirs).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x))


def test_from_published_names_what_does_not_fit():
    state = create_model("digits_vit").state_dict()
    del state["fc_norm.weight"], state["fc_norm.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(10, 5)
    with pytest.raises(LissomError) as error:
        from_published("digits_vit", state)
    text = str(error.value)
    assert "2 missing: fc_norm.weight, fc_norm.bias" in text
    assert "1 unknown: extra.weight" in text
    assert "1 of another shape: head.weight is (10, 5), wanted (10, 192)" in text
    assert "\n" not in text
    with pytest.raises(LissomError, match=r"42 missing: .*(, .*){7} and \d+ more"):
        from_published("digits_vit", {"pos_embed": torch.zeros(1, 64, 192)})


def test_integer_tables_may_be_missing_and_weights_may_not():
    source = create_model(TINY)
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    from_published(TINY, state)
    with pytest.raises(LissomError, match=r"1 missing: .*running_mean"):
        from_published(TINY, {k: v for k, v in state.items() if k != "bn1.running_mean"})


def test_a_users_module_file(user, tmp_path):
    loaded = load_model(f"{user}:net")
    assert (loaded.name, loaded.trained, loaded.mean, loaded.std) == ("net", True, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.input_size is None
    p = loaded.preprocessing((24, 28))
    assert (p.height, p.width, p.channels, p.mean) == (24, 28, 3, (0.1, 0.2, 0.3))
    with pytest.raises(LissomError, match="the input size of net is not known and the images are of several sizes"):
        loaded.preprocessing(None)
    state = {k: torch.full_like(v, 0.5) for k, v in loaded.model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_model(f"{user}:net", weights=tmp_path / "w.safetensors")
    assert all(bool((v == 0.5).all()) for v in loaded.model.state_dict().values())
    with pytest.raises(
        LissomError, match=r"w\.safetensors do not fit Net: 2 of another shape: .*head\.weight is \(10, 4\)"
    ):
        load_model(f"{user}:hundred", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":nothing", "returned int; a torch.nn.Module is wanted"),
        (":failing", "failing failed: ValueError: not today"),
        (":absent", "has no function 'absent'"),
        ("", "is a Python file; name the function"),
    ],
)
def test_faults_in_a_users_module_file(user, name, message):
    with pytest.raises(LissomError, match=message):
        load_model(f"{user}{name}")


def test_a_wrong_mean_in_a_users_module_file(user):
    user.write_text(USER.replace("(0.1, 0.2, 0.3)", "'grey'"))
    with pytest.raises(LissomError, match=r"MEAN in .*nets\.py is 'grey'; one number a colour"):
        load_model(f"{user}:net")


def test_a_hundred_outputs_on_ten_classes(user):
    pictures = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 10
    loaded, data = load_model(f"{user}:hundred"), read({"val": pictures})
    task = make_task(data, preprocessing=loaded.preprocessing(data.image_size), trained_here=False)
    with pytest.raises(
        LissomError, match="the model has 100 outputs and the data have 10 classes; give a model with 10"
    ):
        task.check_outputs(num_outputs(loaded.model, task.shape))
    with_head(loaded.model, 10)
    task.check_outputs(num_outputs(loaded.model, task.shape))


def test_a_module_is_taken_as_it_is():
    class Grey(nn.Sequential):
        default_cfg = {"input_size": (1, 28, 28), "mean": (0.1,), "std": (0.3,), "crop_pct": 0.9}  # noqa: RUF012

    model = Grey(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)).train()
    loaded = load_model(model)
    assert loaded.model is model
    assert loaded.trained
    p = loaded.preprocessing()
    assert (p.channels, p.height, p.width, p.mean, p.std, p.crop) == (1, 28, 28, (0.1,), (0.3,), 0.9)
    assert num_outputs(model, (1, 28, 28)) == 4


def test_a_transformer_built_for_another_size_says_that_size():
    model = create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    assert load_model(model).input_size == (3, 64, 64)


def test_grey_models_average_the_colours():
    p = Loaded(nn.Conv2d(1, 1, 1), "grey", True).preprocessing((5, 6))
    assert p.channels == 1
    np.testing.assert_allclose(p.mean, [np.mean([0.485, 0.456, 0.406])])


def test_num_outputs_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = model[1].running_mean.clone()
    assert num_outputs(model, (3, 8, 8)) == 2
    assert model.training
    assert torch.equal(model[1].running_mean, before)
    with pytest.raises(LissomError, match=r"cannot run on an input of shape \(1, 8, 8\) \(RuntimeError: "):
        num_outputs(model, (1, 8, 8))
    assert model.training
    with pytest.raises(LissomError, match=r"returns shape \(1, 2, 6, 6\); for classification"):
        num_outputs(model[0], (3, 8, 8))


def test_a_new_head():
    model = with_head(create_model("digits_vit"), 4)
    assert num_outputs(model, (3, 32, 32)) == 4
    with pytest.raises(LissomError, match="no linear layer"):
        with_head(nn.Sequential(nn.ReLU()), 4)


def test_importing_lissom_needs_neither_torch_nor_timm():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['timm'] = None\n"
        "import lissom, lissom.errors, lissom.registry\n"
        "print(lissom.LissomError.__name__, [p.name for p in lissom.registry.parts('network')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("LissomError"), done.stderr
    assert "digits_vit" in done.stdout


@pytest.mark.skipif("LISSOM_DATA" not in os.environ, reason="LISSOM_DATA names no folder with cifar10")
def test_a_real_user_model():
    models = Path(os.environ["LISSOM_DATA"]).parent / "models"
    if not models.is_dir():
        pytest.skip(f"there is no folder {models}")
    loaded = load_model(f"{models}/models.py:cnn", weights=models / "cnn_cifar10.safetensors")
    data = read(Path(os.environ["LISSOM_DATA"]) / "cifar10")
    task = make_task(data, preprocessing=loaded.preprocessing(data.image_size), trained_here=False)
    sample = task.report.sample(500, 0)
    with torch.inference_mode():
        outputs = loaded.model(torch.from_numpy(sample.inputs(slice(None)))).numpy()
    assert abs(task.quality(outputs, sample.labels).value - 86.67) < 4.5  # 3 standard deviations of 500 rows
