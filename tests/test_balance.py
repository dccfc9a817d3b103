"""batches.py: every picture once, nearly equal numbers of tokens, the seed's order, and the heaviest micro-batch."""

import random

import pytest

from animals.training.batches import TEXT_TOKENS, TokenBalancedSampler, heaviest_micro_batch


@pytest.fixture(scope="module")
def tokens():
    draw = random.Random(0)
    return [draw.choice([1368] * 8 + [1464] * 3 + [1032] * 3 + [1176] * 3 + [2340] * 2 + [1944]) for _ in range(2000)]


def weight(batch, tokens):
    return len(batch) * (max(tokens[i] for i in batch) + TEXT_TOKENS)


def batches(tokens, ranks=4, accumulation=4, seed=1, epoch=0, micro_batch=4):
    """The micro-batches of one epoch, as indices: [ranks][micro-batches]."""
    found = []
    for rank in range(ranks):
        options = {"rank": rank, "seed": seed, "drop_last": False}
        sampler = TokenBalancedSampler(tokens, micro_batch, accumulation, ranks, **options)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_every_picture_once_an_epoch_and_as_many_micro_batches_on_every_rank(tokens):
    found = batches(tokens)
    assert sorted(i for rank in found for batch in rank for i in batch) == list(range(len(tokens)))
    assert len({len(rank) for rank in found}) == 1


def test_the_seed_and_the_epoch_decide_the_order(tokens):
    assert batches(tokens, seed=1) == batches(tokens, seed=1)
    assert batches(tokens, seed=1) != batches(tokens, seed=2)
    assert batches(tokens, epoch=0) != batches(tokens, epoch=1)


def test_hardly_any_padding_and_no_micro_batch_near_four_of_the_largest(tokens):
    found = [[tokens[i] + TEXT_TOKENS for i in batch] for rank in batches(tokens) for batch in rank]
    padded = sum(len(b) * max(b) for b in found)
    assert sum(map(sum, found)) / padded > 0.94
    draw = random.Random(0)
    order = [t + TEXT_TOKENS for t in draw.sample(tokens, len(tokens))]
    chance = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert sum(map(sum, chance)) / sum(len(b) * max(b) for b in chance) < 0.86, "a random order pads much more"
    assert max(len(b) * max(b) for b in found) < 0.8 * 4 * (2340 + TEXT_TOKENS)


def test_the_heaviest_micro_batch_is_known_before_the_run(tokens):
    chosen = heaviest_micro_batch(tokens, 4, 4, 4, seed=1, epochs=3)
    every = [b for epoch in range(3) for rank in batches(tokens, epoch=epoch) for b in rank]
    assert chosen in every and weight(chosen, tokens) == max(weight(b, tokens) for b in every)


def test_the_second_step_of_a_run_is_the_heaviest_of_its_first_epoch(tokens):
    """And the epoch has the library's own steps, two of them in exchanged places, the same on every rank."""
    found = batches(tokens)
    second, every = ([weight(b, tokens) for rank in found for b in rank[part]] for part in (slice(4, 8), slice(None)))
    assert max(second) == max(every)
    sampler = TokenBalancedSampler(tokens, 4, 4, 4, rank=0, seed=1, drop_last=False)
    for rank, mine in enumerate(found):
        library, moved = sampler.steps(rank), [mine[i : i + 4] for i in range(0, len(mine), 4)]
        places = [i for i, (a, b) in enumerate(zip(library, moved, strict=True)) if a != b]
        assert len(places) == 2 and 1 in places and [library[i] for i in places] == [moved[i] for i in places[::-1]]
    sampler.set_epoch(1)
    assert list(sampler) == [batch for step in sampler.steps(0) for batch in step]
