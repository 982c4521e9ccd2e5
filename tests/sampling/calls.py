"""What the tests of the Predictor ask it for."""

import numpy as np
from PIL import Image

from examples.demo import call

SMALL = {"steps": 2, "width": 64, "height": 64, "output_format": "png", "seed": 5}
TOKEN_PROMPT = "a photo of <zwx> on a pink background"
PLAIN_PROMPT = "a red circle on a gray background"


def draw(predictor, prompt=PLAIN_PROMPT, **given):
    paths = call(predictor.predict, prompt=prompt, **{**SMALL, **given})
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(np.array(image))
    return images


def one(predictor, prompt=PLAIN_PROMPT, **given):
    (image,) = draw(predictor, prompt, **given)
    return image


def same(a, b):
    return np.array_equal(a, b)
