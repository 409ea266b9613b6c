"""What tests of going block by block need."""

import torch

from w8a8.calibration.data import Calibration


def data(**options):
    ids = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))
    return Calibration.of(ids, samples=6, batch_size=2, **options)


def saved(model, directory, dtype=torch.float32, *, split=False):
    model.to(dtype).save_pretrained(directory, max_shard_size="40KB", save_original_format=split)
    return directory
