"""--train_sampling_strategy batch_rebalance, levelled: micro-batches of like numbers of tokens, padding included.

Each step's pictures are sorted by length and cut into accumulation x ranks groups: long pictures travel in small
micro-batches, short ones in large, hardly anything is padded, and all ranks work as long as each other. The library's
sampler evens out time, with a quadratic term that lets micro-batches of short pictures grow; here it evens out tokens,
which is what memory follows. largest_micro_batch() says beforehand what a run on these very pictures will need.
"""

import itertools

TEXT_TOKENS = 60  # prompt, answer and </s> around the picture


def shuffle_seed(args):
    """The seed by which transformers shuffles: --data_seed, else --seed."""
    return args.seed if args.data_seed is None else args.data_seed


def level(sampler, seed):
    """The library's BatchRebalanceSampler, made to even out tokens and to follow --seed, which it does not."""
    sampler.QUADRATIC_COST_COEF = 0
    sampler.lengths = [tokens + TEXT_TOKENS for tokens in sampler.lengths]
    sampler.seed = seed
    return sampler


def largest_micro_batch(image_tokens, micro_batch, accumulation, ranks, seed=42, epochs=1) -> tuple[int, int]:
    """(pictures, image tokens of the longest) of the micro-batch with the most tokens that so many epochs form."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    effective, worst = micro_batch * accumulation * ranks, (0, 0)
    sampler = level(BatchRebalanceSampler(image_tokens, effective, ranks, accumulation, drop_last=False), seed)
    for epoch, sampler.rank in itertools.product(range(epochs), range(ranks)):
        sampler.set_epoch(epoch)
        for batch in sampler:
            found = len(batch), max(image_tokens[i] for i in batch)
            worst = max(worst, found, key=lambda b: b[0] * (b[1] + TEXT_TOKENS))
    return worst
