"""The training sampler is a pure function of (seed, position)."""

from itertools import islice

import pytest

from densepred.data.sampler import SeekableSampler


def take(sampler: SeekableSampler, count: int) -> list[int]:
    return list(islice(iter(sampler), count))


def test_each_pass_visits_every_image_once_in_another_order():
    indices = take(SeekableSampler(range(7), seed=3), 21)
    passes = [indices[i : i + 7] for i in (0, 7, 14)]
    for visit, visited in enumerate(passes):
        assert sorted(i - 7 * visit for i in visited) == list(range(7))
    assert len({tuple(i % 7 for i in visited) for visited in passes}) > 1


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 30])
def test_seeking_equals_reading_on(start):
    whole = take(SeekableSampler(range(7), seed=3), start + 10)
    resumed = SeekableSampler(range(7), seed=3)
    resumed.seek(start)
    assert take(resumed, 10) == whole[start:]


def test_processes_share_the_stream_without_overlap():
    whole = take(SeekableSampler(range(5), seed=1), 12)
    parts = []
    for rank in range(2):
        sampler = SeekableSampler(range(5), seed=1)
        sampler.rank, sampler.world_size = rank, 2
        sampler.seek(1)
        parts.append(take(sampler, 5))
    assert parts == [whole[2::2], whole[3::2]]


def test_unshuffled_goes_in_order():
    assert take(SeekableSampler(range(3), shuffle=False, seed=0), 5) == [0, 1, 2, 3, 4]
