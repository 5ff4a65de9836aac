"""Weight files: the wrappings of training programs, and files that are damaged or hostile."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lissom.errors import LissomError
from lissom.models.factory import create_model, load_model, read_weights


@pytest.fixture(scope="module")
def state():
    return create_model("digits_vit", depth=1, embed_dim=12).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_safetensors(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda s: {"model": {k: v * 0 for k, v in s.items()}, "model_ema": s},
        lambda s: {"model_state": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"ema": {"module": s, "updates": 7}},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    ],
)
def test_wrappings(state, tmp_path, wrap, suffix):
    path = tmp_path / f"w.{suffix}"
    torch.save(wrap(state), path)
    assert same(read_weights(path), state)


def test_a_weight_file_with_its_network(tmp_path):
    source = create_model("digits_vit", num_classes=7)
    path = tmp_path / "w.pth"
    torch.save({"model": source.state_dict()}, path)
    loaded = load_model(path, arch="digits_vit", num_classes=10)
    assert loaded.trained
    assert same(loaded.model.state_dict(), source.state_dict())  # it keeps the outputs it was trained with
    assert same(load_model("digits_vit", weights=path).model.state_dict(), source.state_dict())
    with pytest.raises(LissomError, match=r"holds weights and no network; name the network .* --arch"):
        load_model(path)
    with pytest.raises(LissomError, match="two weight files"):
        load_model(path, arch="digits_vit", weights=path)
    with pytest.raises(LissomError, match=r"the weights of resnet18 do not fit ResNet: 1\d\d missing: .* unknown"):
        load_model(path, arch="resnet18")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(state, tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(LissomError, match=r"w\.safetensors is damaged or truncated") as error:
        load_model(path, arch="digits_vit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -8])
def test_truncated_pickles(state, tmp_path, keep, zipped):
    path = tmp_path / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(LissomError, match=r"w\.pth is damaged") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


class Payload:
    """A pickle that creates a file when it is read by a reader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "raw 0", "raw 2", "raw 4", "nested"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(state, tmp_path, form):
    mark, path = tmp_path / "mark", tmp_path / "w.pth"
    payload = Payload(mark)
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps(payload, protocol=int(form[-1])))
    else:
        held = {"state_dict": state, "hook": payload} if form == "nested" else payload
        torch.save(held, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(LissomError) as error:
        load_model(path, arch="digits_vit")
    assert not mark.exists()
    text = str(error.value)
    assert "refused" in text or "was not read" in text
    assert "weights_only" not in text  # torch's advice on how to run it all the same
    assert "\n" not in text


def test_the_payload_works_where_code_is_run(tmp_path):
    """The test above proves something only if its payload would act."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(LissomError, match=r"holds Python objects besides weights.*torch\.save\(model\.state_dict\(\)"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("held", [{}, {"epoch": 3, "lr": 0.1}, [1, 2], 3, {"state_dict": {"a": 1}}])
def test_files_without_weights(tmp_path, held):
    torch.save(held, tmp_path / "w.pth")
    with pytest.raises(LissomError, match="holds no state dict"):
        read_weights(tmp_path / "w.pth")


def test_endless_nesting(tmp_path):
    held: dict = {"a": torch.zeros(1)}
    for _ in range(50):
        held = {"model": held}
    torch.save(held, tmp_path / "w.pth")
    with pytest.raises(LissomError, match="holds no state dict; it holds model"):
        read_weights(tmp_path / "w.pth")


def test_other_files(tmp_path):
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(LissomError, match=r"no weight file that lissom reads; known endings: \.safetensors, \.pth"):
        load_model(tmp_path / "w.onnx", arch="digits_vit")
    with pytest.raises(LissomError, match=r"there is no file .*absent"):
        load_model(tmp_path / "absent.pth", arch="digits_vit")
