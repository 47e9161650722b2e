"""Augmentation: what each label means, against transforms written out by hand."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy import ndimage
from torch import Tensor

from train.augment import GROUPS, AugmentConfig, Parameters, apply, draw, label_dim
from train.warp import SYM6

GEOMETRIC = ("scale", "rotate_frac", "aniso", "translate_frac")
RGB = ("lumaflip", "hue", "saturation")
ALL = dict.fromkeys(GROUPS, 1.0)
FLOATS = [torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=generator(1), dtype=dtype) * 2 - 1


def smooth(height: int, width: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of pixels from the centre that varies slowly against them."""
    return lambda x, y: np.sin(2.2 * x / width + 0.3) * np.cos(1.7 * y / height - 0.4) + 0.3 * x / width


def on_pixels(function: Callable[[np.ndarray, np.ndarray], np.ndarray], height: int, width: int) -> Tensor:
    y, x = np.meshgrid(
        np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
    )
    return torch.as_tensor(function(x, y))[None, None]


def given(count: int = 1, options: AugmentConfig | None = None, **values: Any) -> Parameters:
    """Parameters by hand; groups that are not named are off, unless options are given."""
    on = {name: 1.0 for name in values if name in GROUPS}
    nothing = draw(count, AugmentConfig(p=0), generator())
    tensors = {
        name: torch.as_tensor(value).expand_as(getattr(nothing, name)) for name, value in values.items()
    }
    return replace(nothing, options=options or AugmentConfig(p=1, **on), **tensors)


# Labels and probabilities


def test_number_of_labels() -> None:
    assert label_dim(AugmentConfig()) == 0
    assert label_dim(AugmentConfig.default_set()) == 9
    assert label_dim(AugmentConfig(**ALL)) == 19
    for options in (AugmentConfig(), AugmentConfig.default_set(), AugmentConfig(**ALL)):
        images, labels = apply(noise(5, 3, 6, 6), draw(5, options, generator()))
        assert images.shape == (5, 3, 6, 6)
        assert labels.shape == (5, label_dim(options))
        assert labels.dtype == torch.float32
    for group, count in GROUPS.items():
        assert label_dim(AugmentConfig(**{group: 0.5})) == count


def test_default_set_is_edms() -> None:
    options = AugmentConfig.default_set()
    assert options.on() == ["xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac"]
    assert (options.p, AugmentConfig.default_set(0.15).p) == (0.12, 0.15)
    stds = (options.scale_std, options.rotate_frac_max, options.aniso_std, options.aniso_rotate_prob)
    assert (*stds, options.translate_frac_std) == (0.2, 1, 0.2, 0.5, 0.125)
    colours = (options.brightness_std, options.contrast_std, options.hue_max, options.saturation_std)
    assert (*colours, options.translate_int_max) == (0.2, 0.5, 1, 1, 0.125)


# Of the draws of a group, the share that is not 0 although the group was chosen.
CHANGED = {"xflip": 1 / 2, "yflip": 1 / 2, "rotate_int": 3 / 4, "lumaflip": 1 / 2}


@pytest.mark.parametrize(("p", "strength"), [(0.12, 1.0), (0.15, 2.0), (0.12, 1e8)])
def test_probabilities(p: float, strength: float) -> None:
    count = 20_000
    strengths = {group: strength * (1 + index / 2) for index, group in enumerate(GROUPS)}
    parameters = draw(count, AugmentConfig(p=p, **strengths), generator())
    for group in GROUPS:
        hit = (getattr(parameters, group).reshape(count, -1) != 0).all(1)
        expected = min(p * strengths[group], 1) * CHANGED.get(group, 1)
        error = 5 * math.sqrt(expected * (1 - expected) / count)
        assert hit.double().mean().item() == pytest.approx(expected, abs=error + 1e-9), group
    turned = (parameters.aniso_angle != 0).double().mean().item()
    assert turned == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / count)), "aniso_angle"


def test_distributions() -> None:
    count, error = 20_000, 5 / math.sqrt(20_000)
    options = AugmentConfig(p=1, **ALL, aniso_rotate_prob=1, rotate_frac_max=0.5, hue_max=0.25)
    parameters = draw(count, options, generator())
    for name in ("scale", "aniso", "translate_frac", "brightness", "contrast", "saturation"):
        values = getattr(parameters, name)
        assert values.mean(0).abs().max() < error, name
        assert (values.std(0) - 1).abs().max() < error, name
        assert values.abs().max() > 3, name
    tops = {"rotate_frac": 0.5 * math.pi, "hue": 0.25 * math.pi, "aniso_angle": math.pi, "translate_int": 1}
    for name, top in tops.items():
        values = getattr(parameters, name) / top
        assert values.mean(0).abs().max() < error, name
        assert (values.square().mean(0) - 1 / 3).abs().max() < error, name
        assert 0.999 < values.abs().max() <= 1, name
    turns = parameters.rotate_int.bincount(minlength=4) / count
    assert len(turns) == 4
    assert (turns - 1 / 4).abs().max() < error
    assert torch.corrcoef(parameters.translate_frac.T)[0, 1].abs() < error


def test_draw_is_a_function_of_the_generator() -> None:
    options = AugmentConfig.default_set()
    state = torch.get_rng_state()
    first, again, other = (draw(64, options, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.translate_frac, again.translate_frac)
    assert not torch.equal(first.translate_frac, other.translate_frac)
    more = draw(64, replace(options, hue=1, translate_int=1), generator(3))
    for group in options.on():
        assert torch.equal(getattr(first, group), getattr(more, group)), f"{group} depends on other groups"


# Identity and slices


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("options", "shape"), [
    (AugmentConfig.default_set(), (3, 9, 12)),
    (AugmentConfig(p=0.03, **ALL), (3, 8, 8)),
    (replace(AugmentConfig.default_set(), brightness=1, contrast=1, translate_int=1), (1, 8, 11)),
])  # fmt: skip
def test_labels_of_zeros_are_the_identity(
    options: AugmentConfig, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    images = noise(200, *shape, dtype=dtype)
    before = images.clone()
    augmented, labels = apply(images, draw(200, options, generator()))
    assert torch.equal(images, before), "the input was written to"
    assert augmented.dtype == dtype
    still = (labels == 0).all(1)
    assert 40 < still.sum() < 160
    assert torch.equal(augmented[still], images[still])
    assert (augmented[~still] != images[~still]).flatten(1).any(1).all()
    augmented, labels = apply(images, draw(200, replace(options, p=0), generator()))
    assert torch.equal(augmented, images)
    assert not labels.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [10, 15])
def test_slices_of_a_batch_are_augmented_as_the_whole(width: int, dtype: torch.dtype) -> None:
    images = noise(37, 3, 10, width, dtype=dtype)
    options = AugmentConfig(p=0.4, **(ALL | {"rotate_int": float(width == 10)}))
    parameters = draw(37, options, generator())
    whole, labels = apply(images, parameters)
    parts = [slice(0, 1), slice(1, 18), slice(18, 37)]
    assert [len(parameters[part]) for part in parts] == [1, 17, 19]
    sliced = [apply(images[part], parameters[part]) for part in parts]
    assert torch.equal(torch.cat([part for part, _ in sliced]), whole)
    assert torch.equal(torch.cat([part for _, part in sliced]), labels)
    empty, none = apply(images[:0], parameters[:0])
    assert (len(empty), len(none)) == (0, 0)


# Pixel blitting


@pytest.mark.parametrize(("group", "dim"), [("xflip", 3), ("yflip", 2)])
def test_flips(group: str, dim: int) -> None:
    values: dict[str, Any] = {group: [0, 1]}
    images, parameters = noise(2, 3, 5, 8), given(2, **values)
    flipped, labels = apply(images, parameters)
    assert torch.equal(flipped, torch.stack([images[0], images[1].flip(dim - 1)]))
    assert labels.tolist() == [[0], [1]]
    assert torch.equal(apply(flipped, parameters)[0], images)


def test_quarter_turns() -> None:
    images = noise(4, 1, 5, 5)
    turned, labels = apply(images, given(4, rotate_int=[0, 1, 2, 3]))
    for turns in range(4):
        assert torch.equal(turned[turns], images[turns].rot90(turns, (1, 2))), turns
    assert labels.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("top", [0.125, 0.5, 1.5])
def test_shifts_by_whole_pixels(top: float) -> None:
    height, width = 16, 24
    images, draws = noise(6, 2, height, width), noise(6, 2).float()
    options = AugmentConfig(p=1, translate_int=1, translate_int_max=top)
    moved, labels = apply(images, given(6, options, translate_int=draws))
    for image, (u, v), result, label in zip(images, draws.tolist(), moved, labels, strict=True):
        right, up = round(u * top * width), round(v * top * height)
        wide = np.pad(image.numpy(), ((0, 0), (40, 40), (40, 40)), mode="reflect")
        expected = wide[:, 40 + up :, 40 - right :][:, :height, :width]
        np.testing.assert_array_equal(result.numpy(), expected)
        assert label.tolist() == pytest.approx([right / (top * width), up / (top * height)], abs=1e-6)
    assert labels.abs().max() > 0.5


# Geometric transforms


def test_sym6_is_the_orthogonal_filter_with_six_vanishing_moments() -> None:
    taps, k = np.array(SYM6), np.arange(12)
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-9)
    for shift in range(6):
        assert taps[2 * shift :] @ taps[: 12 - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-9), shift
    for moment in range(6):
        assert (-1.0) ** k @ (taps * (k - 5.5) ** moment) == pytest.approx(0, abs=1e-9), moment
    assert taps.argmax() == 5, "another phase moves the image"


def matrices(parameters: Parameters, row: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """source = A (position - t): what the four groups do to x to the right and y downwards."""
    p, o = parameters, parameters.options

    def turn(angle: float) -> np.ndarray:
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    long, angle = 2 ** (p.aniso[row].item() * o.aniso_std), p.aniso_angle[row].item()
    # R(-angle) is anticlockwise on the screen, where y points downwards.
    stretch = turn(-angle) @ np.diag([1 / long, long]) @ turn(angle)
    scale = 2 ** (p.scale[row].item() * o.scale_std)
    shift = p.translate_frac[row].double().numpy() * o.translate_frac_std * [width, height]
    return turn(p.rotate_frac[row].item()) / scale @ stretch, shift


def brute_force(image: np.ndarray, matrix: np.ndarray, shift: np.ndarray, margin: int = 120) -> np.ndarray:
    """Reflect far out, double by zeros and a filter, interpolate, halve by the filter: one channel."""
    height, width = image.shape
    fine, taps = np.pad(image, margin, mode="reflect"), np.array(SYM6)
    for axis in (0, 1):
        zeros = np.zeros([2 * n if d == axis else n for d, n in enumerate(fine.shape)])
        zeros[(slice(None, None, 2), slice(None)) if axis == 0 else (slice(None), slice(None, None, 2))] = (
            fine
        )
        fine = ndimage.convolve1d(zeros, taps, axis=axis, mode="constant", origin=-1)
    y, x = np.meshgrid(np.arange(-8, 2 * height + 8) / 2, np.arange(-8, 2 * width + 8) / 2, indexing="ij")
    centre = (np.array([width, height]) - 1) / 2
    source = (np.stack([x, y], -1) - centre - shift) @ matrix.T + centre
    assert source.min() > 12 - margin, "the margin is too small"
    assert (source.max((0, 1)) < np.array([width, height]) + margin - 12).all(), "the margin is too small"
    moved = ndimage.map_coordinates(
        fine, [2 * (source[..., 1] + margin), 2 * (source[..., 0] + margin)], order=1
    )
    for axis in (0, 1):
        moved = ndimage.correlate1d(moved, taps, axis=axis, mode="constant", origin=-1)
    return moved[8:-8:2, 8:-8:2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 16)])
@pytest.mark.parametrize("groups", [(group,) for group in GEOMETRIC] + [GEOMETRIC])
def test_resampling_is_the_brute_force(
    groups: tuple[str, ...], height: int, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    options = AugmentConfig(
        p=1, scale_std=0.5, aniso_std=0.6, translate_frac_std=0.4, **dict.fromkeys(groups, 1.0)
    )
    parameters = draw(6, options, generator())
    images = noise(6, 2, height, width)
    result, _ = apply(images.to(dtype), parameters)
    off = draw(6, AugmentConfig(p=0), generator())
    named = replace(off, options=options, aniso_angle=parameters.aniso_angle)
    named = replace(named, **{group: getattr(parameters, group) for group in groups})
    for row in range(6):
        matrix, shift = matrices(named, row, height, width)
        expected = np.stack([brute_force(channel, matrix, shift) for channel in images[row].numpy()])
        np.testing.assert_allclose(result[row].numpy(), expected, atol=tolerance, err_msg=f"image {row}")


def test_geometric_labels() -> None:
    images, options = noise(50, 1, 6, 7), AugmentConfig(p=0.7, **dict.fromkeys(GEOMETRIC, 1.0))
    parameters = draw(50, options, generator())
    _, labels = apply(images, parameters)
    p = parameters
    expected = [p.scale, p.rotate_frac.cos() - 1, p.rotate_frac.sin()]
    expected += [p.aniso * p.aniso_angle.cos(), p.aniso * p.aniso_angle.sin(), *p.translate_frac.T]
    torch.testing.assert_close(labels, torch.stack(expected, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_by_quarter_turns_is_rot90(turns: int) -> None:
    image = on_pixels(smooth(64, 64), 64, 64)
    turned, _ = apply(image, given(rotate_frac=turns * math.pi / 2))
    torch.testing.assert_close(turned, image.rot90(turns, (2, 3)), atol=6e-3, rtol=0)
    # sym6 is not quite symmetric: its centre lies 0.05 pixel off, and turns with the image.


def test_translation_by_whole_pixels_moves_every_pixel_right_and_down() -> None:
    image = noise(1, 3, 9, 14)
    options = AugmentConfig(p=1, translate_frac=1, translate_frac_std=1)
    moved, _ = apply(image, given(options=options, translate_frac=[5 / 14, -2 / 9]))
    wide = np.pad(image[0].numpy(), ((0, 0), (8, 8), (8, 8)), mode="reflect")
    np.testing.assert_allclose(moved[0].numpy(), wide[:, 8 + 2 : 17 + 2, 8 - 5 : 22 - 5], atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (48, 36)])
@pytest.mark.parametrize("values", [
    {"scale": 1.3}, {"scale": -1.3}, {"rotate_frac": 0.6}, {"aniso": 1.0}, {"aniso": 1.0, "aniso_angle": 0.6},
    {"translate_frac": (0.3, -0.5)},
    {"scale": 0.5, "rotate_frac": -0.4, "aniso": 0.8, "translate_frac": (0.2, 0.3)},
], ids=str)  # fmt: skip
def test_smooth_functions_are_transformed_where_the_image_has_them(
    values: dict[str, Any], height: int, width: int
) -> None:
    function, parameters = smooth(height, width), given(**values)
    matrix, shift = matrices(parameters, 0, height, width)

    def transformed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        source = (np.stack([x, y], -1) - shift) @ matrix.T
        inside = (np.abs(source) < np.array([width, height]) / 2 - 4).all(-1)
        return np.where(inside, function(source[..., 0], source[..., 1]), np.nan)

    expected = on_pixels(transformed, height, width)
    result, _ = apply(on_pixels(function, height, width), parameters)
    known = ~expected.isnan()
    assert known.double().mean() > 0.3
    torch.testing.assert_close(result[known], expected[known], atol=5e-3, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 64)])
@pytest.mark.parametrize("values", [
    [{"scale": 1.2}], [{"scale": -1.2}], [{"rotate_frac": 0.7}], [{"aniso": 1.0, "aniso_angle": 0.5}],
    [{"translate_frac": (0.31, -0.47)}],
    [{"translate_frac": (0.2, 0.3)}, {"aniso": 0.7, "aniso_angle": -1}, {"rotate_frac": -0.5}, {"scale": -1}],
], ids=str)  # fmt: skip
def test_the_inverse_transform_gives_the_image_back(
    values: list[dict[str, Any]], height: int, width: int
) -> None:
    def negated(name: str, value: Any) -> Any:
        return value if name == "aniso_angle" else -torch.as_tensor(value)

    image = on_pixels(smooth(height, width), height, width)
    moved = image
    for step in values:
        moved, _ = apply(moved, given(**step))
    assert (moved - image).abs().max() > 0.05
    for step in reversed(values):
        moved, _ = apply(moved, given(**{name: negated(name, value) for name, value in step.items()}))
    inner = (..., slice(height // 4, -height // 4), slice(width // 4, -width // 4))
    torch.testing.assert_close(moved[inner], image[inner], atol=1e-2, rtol=0)


def test_shrinking_does_not_alias() -> None:
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32)
    options = AugmentConfig(p=1, scale=1, scale_std=1)
    smaller, _ = apply(stripes, given(options=options, scale=-1.0))
    assert smaller[..., 8:24, 8:24].abs().max() < 0.05


# Colours


def colour_matrices(group: str, value: float, o: AugmentConfig) -> np.ndarray:
    """The affine map of RGB, (4, 4)."""
    grey, eye = np.zeros((4, 4)), np.eye(4)
    grey[:3, :3] = 1 / 3  # v v' for the grey axis v = (1, 1, 1) / sqrt 3
    if group == "brightness":
        eye[:3, 3] = value * o.brightness_std
        return eye
    if group == "contrast":
        return np.diag([2 ** (value * o.contrast_std)] * 3 + [1])
    if group == "lumaflip":
        return eye - 2 * grey * value
    if group == "saturation":
        return (
            grey
            + (eye - grey) * 2 ** (value * o.saturation_std)
            + np.diag([0, 0, 0, 1 - 2 ** (value * o.saturation_std)])
        )
    v = np.ones(3) / math.sqrt(3)
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    eye[:3, :3] += math.sin(value) * cross + (1 - math.cos(value)) * cross @ cross  # Rodrigues
    return eye


COLOURS = {"brightness": -0.7, "contrast": 1.1, "lumaflip": 1, "hue": 2.0, "saturation": -0.6}


@pytest.mark.parametrize("groups", [(group,) for group in COLOURS] + [tuple(COLOURS)])
def test_colours_are_the_matrices(groups: tuple[str, ...]) -> None:
    images, parameters = noise(2, 3, 4, 5), given(2, **{group: COLOURS[group] for group in groups})
    result, labels = apply(images, parameters)
    total = np.eye(4)
    for group in groups:
        total = colour_matrices(group, getattr(parameters, group)[0].item(), parameters.options) @ total
    rgb1 = np.concatenate([images.numpy(), np.ones((2, 1, 4, 5))], axis=1)
    np.testing.assert_allclose(result.numpy(), np.einsum("ij,bjhw->bihw", total, rgb1)[:, :3], atol=1e-12)
    columns = {group: [value] for group, value in COLOURS.items()} | {"hue": [math.cos(2) - 1, math.sin(2)]}
    assert labels[1].tolist() == pytest.approx(
        [label for group in groups for label in columns[group]], abs=1e-6
    )


def test_luma_and_chroma() -> None:
    images = noise(1, 3, 6, 6)
    luma = images.mean(1, keepdim=True)
    for group in ("hue", "saturation"):
        result, _ = apply(images, given(**{group: COLOURS[group]}))
        torch.testing.assert_close(result.mean(1, keepdim=True), luma, msg=f"{group} changes the luma")
    flipped, _ = apply(images, given(lumaflip=1))
    torch.testing.assert_close(flipped - flipped.mean(1, keepdim=True), images - luma)
    torch.testing.assert_close(flipped.mean(1, keepdim=True), -luma)
    torch.testing.assert_close(apply(flipped, given(lumaflip=1))[0], images)
    third, _ = apply(images, given(hue=2 * math.pi / 3))
    torch.testing.assert_close(third, images.roll(1, 1), atol=1e-6, rtol=0)  # red to green to blue


def test_one_channel_has_brightness_and_contrast() -> None:
    images = noise(1, 1, 4, 4)
    result, labels = apply(images, given(brightness=0.5, contrast=-2.0))
    torch.testing.assert_close(result, (images + 0.5 * 0.2) * 2 ** (-2.0 * 0.5))
    assert labels.tolist() == [[0.5, -2.0]]


# Compatibility


def test_values_of_edm() -> None:
    """Labels and pixels that NVlabs/edm's AugmentPipe gives, all groups on, for these parameters."""
    parameters = given(
        xflip=1, yflip=1, rotate_int=3, translate_int=[0.08835470676422119, 0.7019110918045044],
        scale=1.1691718101501465, rotate_frac=-0.7603582739830017,
        aniso=-0.5103679895401001, aniso_angle=-1.4151118993759155,
        translate_frac=[-2.1143763065338135, -1.731374979019165],
        brightness=-1.947869062423706, contrast=1.2570531368255615, lumaflip=1,
        hue=1.925598382949829, saturation=-0.2377854436635971,
    )  # fmt: skip
    c, i, j = torch.meshgrid(torch.arange(3.0), torch.arange(8.0), torch.arange(8.0), indexing="ij")
    result, labels = apply(0.9 * torch.cos(0.7 * i + 0.4 * j * (c + 1) + c)[None], parameters)
    expected = [
        1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.169172, -0.275411, -0.689181, -0.079136, 0.504195,
        -2.114376, -1.731375, -1.947869, 1.257053, 1.0, -1.347405, 0.937715, -0.237785,
    ]  # fmt: skip
    torch.testing.assert_close(labels, torch.tensor([expected]), atol=1e-6, rtol=0)
    pixels = torch.tensor([
        [1.6321, 1.06226, -0.37542, 0.53491, 0.82553],
        [-0.3079, 0.76301, 1.4621, -0.71659, -0.65603],
        [0.46211, -1.29086, 0.79654, 0.52917, 1.28583],
    ])  # fmt: skip
    rows, columns = [0, 0, 3, 7, 7], [0, 7, 4, 0, 7]
    torch.testing.assert_close(result[0][:, rows, columns], pixels, atol=1e-4, rtol=0)


# Input


def test_options_come_from_yaml() -> None:
    text = "{p: 0.15, xflip: 1.0e+8, yflip: 1, scale: 1, rotate_frac: 1, aniso: 1, translate_frac: 1}"
    options = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(AugmentConfig), OmegaConf.create(text))
    )
    assert options == AugmentConfig.default_set(0.15)


@pytest.mark.parametrize("name", [field.name for field in fields(AugmentConfig)])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_impossible_options(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"augment\.{name}: expected .* got {value}"):
        AugmentConfig(**{name: value})


def test_options_at_their_limits() -> None:
    with pytest.raises(ValueError, match=r"aniso_rotate_prob: expected <= 1, got 1\.5"):
        AugmentConfig(aniso_rotate_prob=1.5)
    with pytest.raises(ValueError, match="translate_int_max: expected > 0, got 0"):
        AugmentConfig(translate_int_max=0)


def test_bad_images() -> None:
    parameters = draw(2, AugmentConfig(p=0, **ALL), generator())
    with pytest.raises(TypeError, match=r"float32 or float64 images .* got torch\.uint8"):
        apply(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), parameters)
    with pytest.raises(ValueError, match=r"shape \(2, C, H, W\).* got \(3, 3, 4, 4\)"):
        apply(torch.zeros(3, 3, 4, 4), parameters)
    with pytest.raises(ValueError, match=r"shape \(2, C, H, W\).* got \(2, 4, 4\)"):
        apply(torch.zeros(2, 4, 4), parameters)
    with pytest.raises(ValueError, match="rotate_int: expected square images, got 4x6"):
        apply(torch.zeros(2, 3, 4, 6), parameters)
    for group in RGB:
        with pytest.raises(ValueError, match=f"{group}: expected images of 3 channels, got 1"):
            apply(torch.zeros(2, 1, 4, 4), draw(2, AugmentConfig(**{group: 1.0}), generator()))
    with pytest.raises(TypeError, match="slice of the batch, got int"):
        parameters[0]  # type: ignore[index]
