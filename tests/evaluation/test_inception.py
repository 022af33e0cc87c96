"""What FID's network is shown, against PIL, and the network itself, against torch-fidelity's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import center_crop

from distill.evaluation.inception import Inception, crops, load_inception, patch, resized, squares, to_bytes, whole


def pictures(H: int, W: int, n: int = 2) -> Tensor:
    """Noise in whole 1/255, which shows a filter best."""
    return torch.randint(0, 256, (n, 3, H, W), generator=torch.Generator().manual_seed(H)).float() / 255


def by_pil(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Each channel [H, W] resized in floating point by PIL's bicubic filter, as clean-fid does."""
    channels = [Image.fromarray(c.numpy()).resize(size, Image.Resampling.BICUBIC) for c in image]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 1)


@pytest.mark.parametrize(("H", "W"), [(512, 512), (1024, 1024), (300, 300), (24, 24), (480, 640)])
def test_resizing_is_pils_antialiased_bicubic(H: int, W: int) -> None:
    images = pictures(H, W, n=1)
    expected = by_pil(images[0], (299, 299))  # whose filter is computed in float64: ours is not
    torch.testing.assert_close(resized(images)[0], expected, rtol=0, atol=1e-4)


def test_without_antialiasing_it_would_be_another_picture() -> None:
    images = pictures(1024, 1024, n=1)
    plain = torch.nn.functional.interpolate(images, (299, 299), mode="bicubic").clamp(0, 1)
    assert (resized(images) - plain).abs().mean() > 0.1


@pytest.mark.parametrize(("H", "W"), [(300, 300), (480, 641), (401, 300)])
def test_a_patch_is_the_middle_at_native_resolution(H: int, W: int) -> None:
    images = pictures(H, W)
    assert torch.equal(patch(images), center_crop(images, [299, 299]))
    assert torch.equal(squares(images), center_crop(images, [min(H, W)] * 2))


def test_a_picture_without_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="^pictures of 400 x 298 pixels have no patch of 299 x 299$"):
        patch(pictures(298, 400))


def test_a_protocol_may_shrink_pictures_first_by_lanczos() -> None:
    images = pictures(480, 640, n=1)
    square = to_bytes(crops(images, 480))[0].permute(1, 2, 0).numpy()
    small = np.array(Image.fromarray(square).resize((256, 256), Image.Resampling.LANCZOS))
    expected = resized(torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255)
    torch.testing.assert_close(whole(images, shown_at=256), expected)
    assert (whole(images) - expected).abs().mean() > 0.01


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file as the published ones, of random weights under which no layer dies."""
    torch.manual_seed(0)
    state = Inception().network.state_dict()
    for name, x in state.items():
        if name.endswith("running_var"):
            x.fill_(0.05)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    yield path


def test_features_are_those_of_torch_fidelity(weights: Path) -> None:
    """Its network reads whole numbers at 299 px, where its own resizing does nothing."""
    images = pictures(299, 299)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], str(weights))
    with torch.no_grad():
        (expected,) = theirs(to_bytes(images))
        found = load_inception(str(weights))(images)
    assert found.shape == (2, 2048) and expected.std() > 1e-2 and (expected[0] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_another_network_is_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save({name: x for name, x in state.items() if "Mixed_6c" not in name}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="does not fit Inception3: Mixed_6c.*is missing"):
        load_inception(str(tmp_path / "less.pth"))
