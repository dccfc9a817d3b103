"""What a micro-batch holds: which pictures are in it, and how they become tensors.

--train_sampling_strategy batch_rebalance sorts each step's pictures by length and cuts them into accumulation x ranks
micro-batches with nearly equal numbers of tokens, padding included: few long pictures in one, many short ones in
another. Hardly anything is padded, and all ranks work for the same time.

Where the last step of an epoch has too few pictures for all ranks, the libraries repeat some. Here these repetitions
are fillers: they take part in the forward pass, and no token of them is learned.
"""

import copy
import hashlib
import itertools

import datasets
import numpy as np
import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler

import config as settings
from animals.pictures.read import load_picture
from animals.training.describe import batch_sizes

TEXT_TOKENS = 60  # of prompt, answer and </s>, until the Scorer has counted them


class PictureCollator:
    """TRL's vision collator on pictures opened by load_picture, with our template: one BOS, and the answer marked.

    Adds `pictures`, the paths, so that an error can name them; with class_weights {label: weight} also `weights`, one
    per picture. A row whose label is None is a filler. The collator can be pickled, because a data worker may be a new
    process.
    """

    def __init__(self, processor, assistant_only_loss, chat_template=settings.CHAT_TEMPLATE, class_weights=None):
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # takes seconds to import

        self.processor, self.class_weights = processor, class_weights
        self.collate = DataCollatorForVisionLanguageModeling(
            processor, assistant_only_loss=assistant_only_loss, chat_template=chat_template, max_length=None
        )

    def __call__(self, examples):
        batch = self.collate([{**row, "images": [load_picture(path) for path in row["images"]]} for row in examples])
        for labels, row in zip(batch["labels"], examples, strict=True):
            if row.get("label", "") is None:
                labels[:] = -100
        if self.class_weights:
            batch["weights"] = torch.tensor([self.class_weights.get(row["label"], 0.0) for row in examples])
        return {**batch, "pictures": [row["images"][0] for row in examples]}


def balanced_weights(labels) -> dict[str, float]:
    """{label: weight of its pictures' losses}: scikit-learn's "balanced", n / (classes x pictures of the class).

    Then each class has the same share of the loss. The mean over the pictures is 1.
    """
    from sklearn.utils.class_weight import compute_class_weight

    names = np.unique(labels)
    return dict(zip(names.tolist(), compute_class_weight("balanced", classes=names, y=labels).tolist(), strict=True))


def choose_examples(data, per_class, seed):
    """The rows that --examples_per_class trains on: so many of each class, all of a smaller class; None: all rows.

    The order within a class comes from the seed and each picture's content. So a larger number only adds pictures to
    those of a smaller one, and pictures that are put into the folders later leave the order of the others as it was.
    """
    places = [hashlib.sha256(f"{seed} {sha256}".encode()).digest() for sha256 in data["sha256"]]
    rows = sorted(zip(data["label"], places, itertools.count()))
    classes = itertools.groupby(rows, key=lambda row: row[0])
    return data.select(sorted(i for _, members in classes for *_, i in itertools.islice(members, per_class)))


def fillers(lengths, micro_batch, accumulation, ranks, balanced) -> list[int]:
    """The indices of the shortest pictures, as many as an epoch lacks for its last step.

    batch_rebalance needs one picture for each rank and micro-batch of that step; the other samplers need full
    micro-batches, equally many on each rank.
    """
    missing = -len(lengths) % (micro_batch * ranks)
    if balanced:
        rest = len(lengths) % (micro_batch * accumulation * ranks)
        missing = max(0, accumulation * ranks - rest) if rest else 0
    shortest = sorted(range(len(lengths)), key=lengths.__getitem__)
    return list(itertools.islice(itertools.cycle(shortest), missing))


def add_fillers(dataset, args):
    """The training pictures, and after them the fillers: rows with the label None."""
    balanced = args.train_sampling_strategy == "batch_rebalance"
    chosen = fillers(list(dataset[args.length_column_name]), *batch_sizes(args), balanced)
    if args.dataloader_drop_last or not chosen:
        return dataset
    blank = dataset.select(chosen).map(lambda row: {"label": None}, features=dataset.features, keep_in_memory=True)
    return datasets.concatenate_datasets([dataset, blank])


def shuffle_seed(args):
    """The seed by which transformers shuffles: --data_seed, else --seed."""
    return args.seed if args.data_seed is None else args.data_seed


class TokenBalancedSampler(BatchRebalanceSampler):
    """The library's sampler, which here makes equal numbers of tokens, and takes the first epoch's heaviest step early.

    The library balances the estimated time, with a quadratic cost of the length. Then micro-batches of short pictures
    get more tokens, and with them more memory.

    In the first epoch the step with the heaviest micro-batch and the second step change places: if the memory of a GPU
    is too small for the epoch, the run ends in its first minutes. It is not the first step, because 8-bit AdamW makes
    its states in that one. Ranks and accumulation of the same product have the same heaviest step; with other sizes of
    micro-batches it may be another one, and then the steps of the epoch are the same in another order.
    """

    QUADRATIC_COST_COEF = 0

    def __init__(self, image_tokens, micro_batch, accumulation, ranks, *, text_tokens=TEXT_TOKENS, **options):
        lengths = [tokens + text_tokens for tokens in image_tokens]
        super().__init__(lengths, micro_batch * accumulation * ranks, ranks, accumulation, **options)

    def steps(self, rank):
        """The steps of the epoch in the library's order, each as the list of this rank's micro-batches (of indices)."""
        other = copy.copy(self)
        other.rank = rank
        found = list(super(TokenBalancedSampler, other).__iter__())
        return [found[i : i + self.grad_accum] for i in range(0, len(found), self.grad_accum)]

    def __iter__(self):
        mine = self.steps(self.rank)
        if self.epoch == 0 and len(mine) > 2:
            heaviest = np.argmax([self.tokens(heavy) for heavy, *_ in self.steps(rank=0)])  # the library puts it first
            mine[1], mine[heaviest] = mine[heaviest], mine[1]
        yield from itertools.chain.from_iterable(mine)

    def tokens(self, batch) -> int:
        """How many tokens a micro-batch has, with its padding."""
        return len(batch) * max(self.lengths[i] for i in batch)


def heaviest_micro_batch(image_tokens, micro_batch, accumulation, ranks, seed=42, epochs=1, text_tokens=TEXT_TOKENS):
    """The micro-batch with the most tokens that batch_rebalance forms in so many epochs, as indices."""
    sizes, formed = (micro_batch, accumulation, ranks), []
    sampler = TokenBalancedSampler(image_tokens, *sizes, seed=seed, drop_last=False, text_tokens=text_tokens)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        formed += sampler  # of rank 0, which has the heaviest of each step
    return max(formed, key=sampler.tokens)
