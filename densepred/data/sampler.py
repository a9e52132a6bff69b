"""An endless training sampler that can start anywhere at no cost."""

from collections.abc import Iterator, Sized

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from densepred.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class SeekableSampler(Sampler):
    """Endless shuffled indices, a pure function of (seed, position): a resumed run seeks instead of reading and discarding.

    Position p of the endless stream belongs to pass ``p // N`` over the data set, whose order is a permutation drawn from
    (seed, pass). It yields ``pass * N + image``: `SegDataset` reads from that number both the image and the visit that
    seeds its augmentation. Process r of W takes the positions r, r + W, r + 2W, ...

    Args:
        dataset: anything with a length.
        shuffle: whether each pass is permuted; else each pass goes in order.
        seed: of the permutations; ``None`` takes one drawn by MMEngine and shared by all processes.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None) -> None:
        self.rank, self.world_size = get_dist_info()
        self.length = len(dataset)
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.start = 0

    def seek(self, samples: int) -> None:
        """Start the next iteration after ``samples`` samples of this process."""
        self.start = samples

    def order(self, visit: int) -> list[int]:
        """Return the order of the images in one pass over the data set."""
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + visit) % 2**63)
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        position, current, order = self.rank + self.start * self.world_size, -1, []
        while True:
            visit, slot = divmod(position, self.length)
            if visit != current:
                current, order = visit, self.order(visit)
            yield visit * self.length + order[slot]
            position += self.world_size

    def __len__(self) -> int:
        """Return the length of one pass of one process."""
        return -(-self.length // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: MMEngine calls this at each epoch, and position alone decides here."""
