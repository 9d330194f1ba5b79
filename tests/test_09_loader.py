"""The loader of one text: every window once an epoch, x and y one apart."""
import numpy as np
import pytest
import torch

from common import loader_of
from train_gpt2 import UserError

T = 8


def starts(loader, batches):
    """Where the windows of so many batches begin; the ids are their own positions."""
    return torch.cat([loader.next_batch()[0][:, 0] for _ in range(batches)]).tolist()


@pytest.mark.parametrize("seed", [None, 7])
def test_x_and_y_are_one_apart(seed):
    x, y = loader_of(np.arange(100), 3, T, seed=seed).next_batch()
    assert x.shape == y.shape == (3, T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and (x.diff() == 1).all()


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("n, windows", [(12 * T + 1, 12), (12 * T + T, 12), (12 * T, 11)])  # the last y needs a token
def test_an_epoch_has_every_window_once(n, windows, seed):
    loader = loader_of(np.arange(n), 1, T, seed=seed)
    for _ in range(3):
        assert sorted(starts(loader, windows)) == list(range(0, windows * T, T))


def test_without_a_seed_the_order_is_that_of_the_text():
    assert starts(loader_of(np.arange(12 * T + 1), 4, T), 3) == list(range(0, 12 * T, T))


def test_each_epoch_has_its_own_order_and_the_seed_repeats_it_all():
    one, again, other = (loader_of(np.arange(40 * T + 1), 4, T, seed=seed) for seed in (7, 7, 8))
    first, second = starts(one, 10), starts(one, 10)
    assert first != second and first != sorted(first)
    assert starts(again, 20) == first + second
    assert starts(other, 10) != first


def test_a_batch_over_the_end_of_an_epoch_loses_nothing():
    one_by_one, by_five = (loader_of(np.arange(12 * T + 1), B, T, seed=7) for B in (1, 5))  # 5 does not divide 12
    assert starts(by_five, 12) == starts(one_by_one, 60)


def test_too_few_tokens_for_a_batch_is_an_error_and_just_enough_is_not():
    loader_of(np.arange(3 * T + 1), 3, T).next_batch()
    for n, windows in ((0, 0), (1, 0), (3 * T, 2)):
        says = rf"^the data: {windows} windows .*\b3\b.*--seq_len or --batch_size"
        with pytest.raises(UserError, match=says):
            loader_of(np.arange(n), 3, T)


def test_what_is_written_into_y_does_not_change_x():
    for B in (1, 2):
        x, y = loader_of(range(100), B=B, T=8).next_batch()
        expected = x.clone()
        y[:] = -100  # as evaluate() does with what is not to be counted
        assert torch.equal(x, expected)


def test_the_position_is_all_that_has_to_be_known():
    """Over the end of an epoch, too. It counts what all processes together have taken."""
    loader = loader_of(np.arange(12 * T + 1), 5, T, seed=7)
    batches = [loader.next_batch() for _ in range(6)]
    assert loader.position == 30
    for nth in (0, 2, 5, 1):  # also back
        again = loader_of(np.arange(12 * T + 1), 5, T, seed=7)
        again.position = 5 * nth
        for got in (again.next_batch(), loader.batch(5 * nth, 5)):
            assert all(map(torch.equal, got, batches[nth]))
    pair = [loader_of(np.arange(12 * T + 1), 2, T, seed=7, rank=rank, world_size=2)
            for rank in (0, 1)]
    shares = [torch.cat([loader.next_batch()[0] for loader in pair]) for _ in range(5)]
    one_by_one = loader_of(np.arange(12 * T + 1), 1, T, seed=7)
    expected = [one_by_one.next_batch()[0] for _ in range(20)]
    assert torch.equal(torch.cat(shares), torch.cat(expected))
    assert [loader.position for loader in pair] == [20, 20]
