"""Buckets follow the images' own aspect ratios: little is cropped, areas are as asked, and sizes are few enough."""

import pytest

from lora_utils.dataset.buckets import MOST_CROPPED, MOST_SIZES, assign_buckets, buckets, choose_buckets, cropped_share


def aspects(most):
    return [1 + (most - 1) * index / 500 for index in range(501)]


@pytest.mark.parametrize(("resolution_px", "most"), [(256, 2), (512, 8), (768, 8), (1024, 8), (1328, 8), (1536, 12)])
def test_at_most_three_percent_of_an_image_are_cropped_either_way(resolution_px, most):
    for aspect in aspects(most):
        for width, height in ((int(4000 * aspect), 4000), (4000, int(4000 * aspect))):
            (size,) = choose_buckets(width, height, (resolution_px,))
            assert cropped_share(width, height, size) <= MOST_CROPPED, (width, height, size)
            assert size.width_px * size.height_px == pytest.approx(resolution_px**2, rel=0.1)


@pytest.mark.parametrize("resolution_px", [512, 1024])
def test_landscapes_and_portraits_are_treated_alike(resolution_px):
    assert {(s.height_px, s.width_px) for s in buckets(resolution_px)} == {s.pixels for s in buckets(resolution_px)}


def test_common_ratios_lose_next_to_nothing():
    for width, height in ((1500, 1000), (1600, 1200), (1920, 1080), (1000, 1000), (1080, 1920)):
        assert cropped_share(width, height, choose_buckets(width, height, (512,))[0]) < 0.02


def test_images_of_like_shape_share_a_size_so_that_batches_fill():
    sizes = assign_buckets({i: (1000 + 3 * i, 1000) for i in range(20)}, (512,))  # 1:1 to 1.06:1
    assert len({size for own in sizes.values() for size in own}) <= 3


def test_there_are_no_more_sizes_than_a_run_takes_and_the_rarest_give_way():
    images = {index: (int(1000 * 1.07**index), 1000) for index in range(-25, 26)}
    images |= {f"square {index}": (1000, 1000) for index in range(10)}
    chosen = assign_buckets(images, (512, 768))
    for resolution_px in (512, 768):
        row = set(buckets(resolution_px))
        used = {size for own in chosen.values() for size in own if size in row}
        assert len(used) == MOST_SIZES
    assert chosen["square 0"][0].pixels == (512, 512)
    few = {index: images[index] for index in range(-10, 11)}
    assert assign_buckets(few, (512, 768)) == {key: choose_buckets(*size, (512, 768)) for key, size in few.items()}
