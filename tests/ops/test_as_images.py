"""Sound, video and series as images: the published figures, the formulas, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.ops.as_images import audio_to_image, fbank, map_to_series, series_to_image, video_to_image
from tests.models.families import fixture, images, needs_parity, parity


def test_a_tone_stands_in_its_bin() -> None:
    t = torch.arange(8000) / 16000
    energies = fbank(torch.stack([torch.sin(2 * torch.pi * f * t) for f in (500.0, 3000.0)]), mel_bins=40)
    assert energies.shape == (2, 48, 40)
    mel = [1127 * np.log1p(f / 700) for f in (20, 8000, 500, 3000)]
    step = (mel[1] - mel[0]) / 41
    for found, place in zip(energies.argmax(-1), mel[2:], strict=True):
        assert (found - ((place - mel[0]) / step - 1)).abs().max() <= 1
    assert fbank(torch.zeros(400)).max() == pytest.approx(np.log(1.1920929e-07))


def test_sounds_are_padded_and_cut() -> None:
    sound = images(2, 4000)
    whole = audio_to_image(sound, 23, None)
    assert whole.shape == (2, 1, 128, 23)
    assert torch.equal(audio_to_image(sound, 9, None), whole[..., :9])
    padded = audio_to_image(sound, 30, (2.0, 3.0))
    assert torch.allclose(padded[..., :23], (whole - 2) / 6)
    assert torch.allclose(padded[..., 23:], torch.tensor(-1 / 3))
    with pytest.raises(ValueError, match="less than one frame of 400"):
        fbank(sound[:, :399])
    empty = fbank(sound).amax((0, 1)) <= np.log(1.2e-07)
    assert empty.sum() == 1
    assert torch.autograd.gradcheck(lambda w: fbank(w, 2000, 8), images(2, 75).double().requires_grad_())


def test_video() -> None:
    video = torch.arange(2 * 4 * 2 * 3.0).reshape(1, 2, 4, 2, 3)
    plain, mosaic = video_to_image(video), video_to_image(video, mosaic=True)
    assert plain.shape == mosaic.shape == (1, 2, 4, 6)
    assert torch.equal(plain.flatten(), video.flatten())
    assert torch.equal(mosaic[:, :, 2:, :3], video[:, :, 2])
    with pytest.raises(ValueError, match="no square"):
        video_to_image(video[:, :, :3])


def test_series() -> None:
    series = images(2, 3, 12)
    assert torch.equal(series_to_image(series).flatten(1), series.flatten(1))
    with pytest.raises(ValueError, match="no square"):
        series_to_image(series[:, :2])
    features = images(2, 4, 2, 3)
    tokens = map_to_series(features)
    assert torch.equal(tokens[:, 4], features[:, :, 1, 1])
    scrambled = map_to_series(features, published=True)
    assert scrambled.shape == tokens.shape
    assert torch.equal(scrambled.flatten(), features.flatten())


@needs_parity
def test_published_figures() -> None:
    own, cases = parity(), fixture("unireplknet", "cases")
    for case in cases["audio"]["cases"]:
        n = np.arange(case["samples"]) / case["rate"]
        noise = np.random.RandomState(case["seed"]).standard_normal(case["samples"])
        sound = 0.4 * np.sin(2 * np.pi * 440 * n) + 0.2 * np.sin(2 * np.pi * 1234.5 * n) + 0.05 * noise
        waveform = torch.from_numpy(sound.astype(np.float32))
        found = fbank(waveform - waveform.mean())
        assert found.shape[0] == case["frames"]
        assert own.close(own.digest(found), case["fbank"])
        image = audio_to_image(waveform[None], case["target_length"], (case["mean"], case["std"]))
        assert own.close(own.digest(image[0]), case["network_input"])
    for case in cases["video"]["cases"]:
        video = torch.arange(float(np.prod(case["input"]))).reshape(case["input"])
        image = video_to_image(video)
        assert list(image.shape) == case["output_shape"]
        assert image[0, 0, 0].tolist() == case["row0"]
    series = cases["time_series"]
    assert own.close(own.digest(series_to_image(own.make_input((3, 48, 12), "emb"))), series["image"])
