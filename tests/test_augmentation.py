"""Random changes to training images: what they may change, how often, and what they must keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeport.models.augmentation import Augmentation, flip, rotate_and_scale, shift
from spikeport.models.errors import DataError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 200, channels: int = 2, height: int = 5, width: int = 7) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=seeded(99)) + 0.1


def moved(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Plain definition: pixel (y, x) of (..., height, width) goes to (y + down, x + right)."""
    out = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                out[..., y + down, x + right] = image[..., y, x]
    return out


@pytest.mark.oracle
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_each_image_is_moved_as_a_whole(pixels: int, height: int, width: int, seed: int) -> None:
    before = images(4, 2, height, width)
    after = shift(before, pixels, seeded(seed))
    assert after.shape == before.shape
    span = range(-pixels, pixels + 1)
    for old, new in zip(before, after, strict=True):
        assert any(torch.equal(moved(old, down, right), new) for down in span for right in span)


def test_every_shift_up_to_the_largest_comes_equally_often() -> None:
    one = torch.zeros(4500, 1, 9, 9)
    one[:, 0, 4, 4] = 1
    where = shift(one, 1, seeded()).nonzero()
    counts = torch.bincount(where[:, 2] * 9 + where[:, 3], minlength=81).view(9, 9)
    assert (counts > 0).nonzero().tolist() == [[y, x] for y in (3, 4, 5) for x in (3, 4, 5)]
    assert counts[3:6, 3:6].sum() == 4500
    assert (counts[3:6, 3:6] - 500).abs().max() < 110  # five standard deviations


def test_half_of_the_images_are_mirrored_left_to_right() -> None:
    before = images(1000)
    after = flip(before, seeded())
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(after, before, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(after, before, strict=True)])
    assert (mirrored ^ kept).all()
    assert abs(int(mirrored.sum()) - 500) < 80


def test_nothing_turned_and_nothing_scaled_is_nothing_changed() -> None:
    before = images()
    torch.testing.assert_close(rotate_and_scale(before, 0.0, 0.0, seeded()), before)


def moments(image: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mass and covariance of (row, column) of an image (height, width) about its middle."""
    height, width = image.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows - (height - 1) / 2, columns - (width - 1) / 2]).flatten(1).double()
    weight = image.flatten()
    return float(weight.sum()), (place * weight) @ place.T / weight.sum()


def bars(n: int, height: int, width: int) -> torch.Tensor:
    """A smooth horizontal bar in the middle of each image."""
    rows, columns = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    image = torch.exp(-(rows[:, None] ** 2) / 18) * torch.exp(-(columns**2) / 72)
    return image.expand(n, 1, height, width).double()


@pytest.mark.parametrize(("height", "width"), [(61, 61), (61, 81), (80, 61)])
def test_a_turn_keeps_shapes_and_stays_within_its_range(height: int, width: int) -> None:
    angles = []
    before, spread = moments(bars(1, height, width)[0, 0])
    for (turned,) in rotate_and_scale(bars(60, height, width), 30.0, 0.0, seeded()):
        mass, covariance = moments(turned)
        assert mass == pytest.approx(before, rel=0.01)
        lengths, axes = torch.linalg.eigh(covariance)
        torch.testing.assert_close(lengths, torch.linalg.eigvalsh(spread), rtol=0.02, atol=0)
        angles.append(float(torch.rad2deg(torch.atan(axes[0, 1] / axes[1, 1]))))
    assert max(map(abs, angles)) <= 30.5
    assert min(angles) < -20
    assert max(angles) > 20


def test_a_change_of_scale_goes_both_ways_within_its_range() -> None:
    _, spread = moments(bars(1, 61, 61)[0, 0])
    changes = []
    for (scaled,) in rotate_and_scale(bars(60, 61, 61), 0.0, 0.2, seeded()):
        _, covariance = moments(scaled)
        by_rows, by_columns = (covariance.diag() / spread.diag()).sqrt().tolist()
        assert by_rows == pytest.approx(by_columns, rel=0.02)
        changes.append(by_rows)
    assert 0.79 <= min(changes) < 0.87
    assert 1.13 < max(changes) <= 1.21


def test_what_is_turned_in_from_outside_is_zero() -> None:
    after = rotate_and_scale(torch.ones(20, 1, 8, 8), 0.0, 0.5, seeded(1))
    shrunk = after[:, 0, 0, 0] < 1
    assert shrunk.any()
    assert (after[~shrunk] > 0.999).all()


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(shift_pixels=2),
        Augmentation(flip=True),
        Augmentation(rotate_degrees=10),
        Augmentation(scale=0.1),
        Augmentation(2, True, 10, 0.1),
    ],
)
def test_an_augmentation_is_decided_by_its_generator_alone(augmentation: Augmentation) -> None:
    before = images()
    kept, state = before.clone(), torch.get_rng_state()
    after = augmentation(before, seeded(1))
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert torch.equal(before, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(after, before)
    assert torch.equal(augmentation(before, seeded(1)), after)
    assert not torch.equal(augmentation(before, seeded(2)), after)


def test_no_augmentation_changes_nothing_and_draws_nothing() -> None:
    before, generator = images(), seeded()
    state = generator.get_state()
    assert torch.equal(Augmentation()(before, generator), before)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_all_steps_of_a_recording_change_alike_and_stay_whole(dtype: torch.dtype) -> None:
    one_step = torch.randint(0, 9, (50, 1, 2, 6, 7), generator=seeded(3)).to(dtype)
    frames = one_step * torch.arange(1, 5).view(1, 4, 1, 1, 1).to(dtype)
    after = Augmentation(shift_pixels=2, flip=True)(frames, seeded())
    assert after.shape == frames.shape
    assert after.dtype == dtype
    assert torch.equal(after, after.round())
    assert not torch.equal(after, frames)
    for step in range(4):
        assert torch.equal(after[:, step], after[:, 0] * (step + 1))
    assert torch.equal(after[:, 0], Augmentation(shift_pixels=2, flip=True)(frames[:, 0], seeded()))


@pytest.mark.parametrize("augmentation", [Augmentation(rotate_degrees=5), Augmentation(scale=0.1)])
def test_recordings_are_not_turned_or_scaled(augmentation: Augmentation) -> None:
    with pytest.raises(DataError, match="cannot be rotated or scaled"):
        augmentation(torch.zeros(2, 3, 2, 4, 4), seeded())
