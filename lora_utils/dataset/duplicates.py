"""Images that look the same: copies in another size or quality, which count as often as they stand in a dataset."""

from collections.abc import Sequence

import numpy as np

# Of a hash's 256: what an image and its copy, scaled to two thirds and stored as JPEG at 60, differ in at most.
NEAR_DUPLICATE_BITS = 6
_LEAST_APART, _MOST_APART = 1.5, 16.0  # levels of 255 by which an area of an image and of its copy may differ
_COMPARED_AT_ONCE = 1024  # images with all others: 10 000 take a second and 80 MB


def near_duplicates(hashes: Sequence[bytes], thumbnails: Sequence[bytes]) -> list[list[int]]:
    """Return the indices of images in groups of two and more that look like their first.

    Their hashes are `NEAR_DUPLICATE_BITS` apart at most. Flat drawings have hashes alike, so their colours are compared
    too, within a quarter of the first one's contrast.
    """
    bits = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4)  # [images, 4]
    colours = [np.frombuffer(each, np.uint8).astype(np.int16) for each in thumbnails]
    grouped, groups = np.zeros(len(hashes), bool), []
    for start in range(0, len(hashes), _COMPARED_AT_ONCE):
        compared = bits[start : start + _COMPARED_AT_ONCE]
        apart = sum(np.bitwise_count(compared[:, None, part] ^ bits[None, :, part]) for part in range(bits.shape[1]))
        near = np.asarray(apart) <= NEAR_DUPLICATE_BITS  # [compared, images]
        for index in np.flatnonzero(near.sum(axis=1) > 1):
            first = start + int(index)
            if grouped[first]:
                continue
            alike = [int(other) for other in np.flatnonzero(near[index] & ~grouped)]
            group = [other for other in alike if _same_colours(colours[first], colours[other])]
            if len(group) > 1:
                grouped[group] = True
                groups.append(group)
    return groups


def _same_colours(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two thumbnails are equal but for what scaling and JPEG change: see `_LEAST_APART`."""
    allowed = np.clip(0.25 * float(one.max() - one.min()), _LEAST_APART, _MOST_APART)
    return bool(np.abs(one - other).max() <= allowed)
