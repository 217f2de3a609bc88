"""scikit-learn's digits: 1797 images of 8x8 pixels in 17 grey levels; ships with scikit-learn."""

import numpy as np

from spikeport.models.datasets.base import Dataset, Split
from spikeport.models.errors import DataError


def load_digits(validation: int, test: int, seed: int) -> Dataset:
    """Digits in a stratified split by seed. Raises DataError where the split cannot be made."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    if validation + test >= len(labels):
        raise DataError(f"digits has {len(labels)} samples; {validation} + {test} held out leave none to train on.")
    try:
        rest, held_out = train_test_split(np.arange(len(labels)), test_size=test, stratify=labels, random_state=seed)
        kept, chosen = train_test_split(rest, test_size=validation, stratify=labels[rest], random_state=seed)
    except ValueError:
        raise DataError(
            f"digits cannot be split into {test} test and {validation} validation samples; each part needs at least "
            "one sample of each of the 10 classes."
        ) from None
    train, chosen_split, test_split = (Split(images[index], labels[index]) for index in (kept, chosen, held_out))
    return Dataset(
        "digits",
        tuple("0123456789"),
        train,
        chosen_split,
        test_split,
        note="scikit-learn digits, stratified split by seed",
    )
