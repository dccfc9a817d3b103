"""What a micro-batch holds: which pictures share one, and how they become tensors.

--train_sampling_strategy batch_rebalance, levelled: micro-batches of like numbers of tokens, padding included. Each
step's pictures are sorted by length and cut into accumulation x ranks groups: long pictures travel in small
micro-batches, short ones in large, hardly anything is padded, and all ranks work as long as each other. The library's
sampler evens out time, with a quadratic term that lets micro-batches of short pictures grow; here it evens out tokens,
which is what memory follows. largest_micro_batch() says beforehand what a run on these very pictures will need.

Whatever the sampler: where an epoch's last step has fewer pictures than the ranks need, the libraries repeat some. Here
those repetitions are fillers: they take part in the forward pass and teach nothing.
"""

import itertools

import config as settings

TEXT_TOKENS = 60  # prompt, answer and </s> around the picture, where nobody has counted them


class PictureCollator:
    """TRL's vision collator on pictures opened by load_picture, with our template: BOS once, answers marked.

    Adds `pictures`, the paths, so that a bad loss can name them. A row whose label is None is a filler: no token of it
    is learned. Pickles, for a data worker may be spawned.
    """

    def __init__(self, processor, assistant_only_loss, chat_template=settings.CHAT_TEMPLATE):
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        self.processor = processor
        self.collate = DataCollatorForVisionLanguageModeling(
            processor, assistant_only_loss=assistant_only_loss, chat_template=chat_template, max_length=None
        )

    def __call__(self, examples):
        from animals.pictures.read import load_picture  # Pillow: the launcher comes by here before `pip install`

        batch = self.collate([{**row, "images": [load_picture(path) for path in row["images"]]} for row in examples])
        for labels, row in zip(batch["labels"], examples, strict=True):
            if row.get("label", "") is None:
                labels[:] = -100
        return {**batch, "pictures": [row["images"][0] for row in examples]}


def fillers(lengths, micro_batch, accumulation, ranks, balanced):
    """Indices of the shortest pictures, as many as are missing for an epoch that no library has to fill up.

    batch_rebalance wants a picture for every rank and micro-batch of the last step; the other samplers as many
    micro-batches on each rank, all full.
    """
    if balanced:
        least, rest = accumulation * ranks, len(lengths) % (micro_batch * accumulation * ranks)
        missing = max(0, least - rest) if rest else 0
    else:
        missing = -len(lengths) % (micro_batch * ranks)
    shortest = sorted(range(len(lengths)), key=lengths.__getitem__)
    return list(itertools.islice(itertools.cycle(shortest), missing))


def fill_up(dataset, args):
    """The training pictures, and their fillers as rows with the label None."""
    from datasets import concatenate_datasets

    sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    balanced = args.train_sampling_strategy == "batch_rebalance"
    chosen = fillers(list(dataset[args.length_column_name]), *sizes, balanced)
    if args.dataloader_drop_last or not chosen:
        return dataset
    blank = dataset.select(chosen).map(lambda row: {"label": None}, features=dataset.features, keep_in_memory=True)
    return concatenate_datasets([dataset, blank])


def shuffle_seed(args):
    """The seed by which transformers shuffles: --data_seed, else --seed."""
    return args.seed if args.data_seed is None else args.data_seed


def level(sampler, seed, text_tokens=TEXT_TOKENS):
    """The library's BatchRebalanceSampler, made to even out tokens and to follow --seed, which it does not."""
    sampler.QUADRATIC_COST_COEF = 0
    sampler.lengths = [tokens + text_tokens for tokens in sampler.lengths]
    sampler.seed = seed
    return sampler


def heaviest_micro_batch(
    image_tokens, micro_batch, accumulation, ranks, seed=42, epochs=1, text_tokens=TEXT_TOKENS
) -> tuple[list[int], list[int]]:
    """(indices, image tokens) of the pictures in the micro-batch with the most tokens that so many epochs form."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    extra = fillers(image_tokens, micro_batch, accumulation, ranks, balanced=True)
    lengths = [*image_tokens, *(image_tokens[i] for i in extra)]
    effective, worst, most = micro_batch * accumulation * ranks, [], 0
    sampler = BatchRebalanceSampler(lengths, effective, ranks, accumulation, drop_last=False)
    level(sampler, seed, text_tokens)
    for epoch, sampler.rank in itertools.product(range(epochs), range(ranks)):
        sampler.set_epoch(epoch)
        for batch in sampler:
            tokens = len(batch) * (max(lengths[i] for i in batch) + text_tokens)
            if tokens > most:
                worst, most = batch, tokens
    return worst, [lengths[i] for i in worst]


def largest_micro_batch(*run, **more) -> tuple[int, int]:
    """(pictures, image tokens of the longest) of heaviest_micro_batch()."""
    tokens = heaviest_micro_batch(*run, **more)[1]
    return len(tokens), max(tokens)
