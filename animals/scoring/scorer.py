"""Log-probabilities of all labels for pictures, in one forward pass per batch. Nothing is generated."""

import contextlib
import random
import sys
from collections import Counter

import config as settings
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.task import check_template
from animals.command import UserError
from animals.pictures.read import PictureError, load_picture
from animals.ranks import main_process, say

LONG_PROMPT = 200  # tokens; a longer one is reported; the ten animals make 53
LOW_MASS = 0.5  # of labels_mass: below it the model would rather answer something else than a label


class NotFinite(UserError):
    """Log-probabilities that are not finite numbers: the weights hold NaN or Inf, or their type is too small."""


class Scorer:
    """All answers follow the prompt in one sequence per picture.

    Each answer sees the prompt and itself only (4-D attention mask), and its positions start again at the prompt's end.
    So a label gets what teacher forcing gives it alone: the sum of log p over its answer tokens and </s>, tokenised
    within the complete conversation. Prompts are padded on the left, so that the answers are in the same columns of
    every row of a batch.
    """

    def __init__(self, processor, config, end=True):
        """Tokenises the prompt and all answers. Raises UserError if two have the same tokens or one has none.

        end=False leaves </s> out of the sums, for a model that nobody trained on these answers: it may expect another
        token before </s>. Raises UserError if one answer begins another, because only </s> tells these apart.
        """
        import torch

        self.processor, self.config, self.labels = processor, config, config.labels
        check_template(config, self._text)
        prompt, self.answers = self._token_ids(), []  # answers: each label's token ids, </s> last
        for label in self.labels:
            tokens = self._token_ids(label)
            if tokens[: len(prompt)] != prompt or len(tokens) < len(prompt) + 2:
                raise UserError(f"label {label!r}: its tokens do not follow the prompt's; change --answer or --prompt")
            self.answers.append(tokens[len(prompt) :])
        if len(set(map(tuple, self.answers))) < len(self.answers):
            raise UserError(f"labels {self.labels}: two of them have the same answer tokens; change --answer")
        said = [answer[:-1] for answer in self.answers]
        if not end and any(a == b[: len(a)] for a in said for b in said if a is not b):
            raise UserError(f"--without_end: found answers that begin another one ({self.labels}); expected none")
        self.text_tokens = len(prompt) - 1 + max(map(len, self.answers))  # of the longest example, without its picture
        if len(prompt) > LONG_PROMPT:
            say(f"the question takes {len(prompt) - 1} tokens per picture; --prompt without {{labels}} makes it short")
        # The model predicts </s> but never reads it. For each token that it reads: id, label, place in the answer.
        fed = [(t, k, i) for k, answer in enumerate(self.answers) for i, t in enumerate(answer[:-1])]
        self.fed_ids, self.fed_label, self.fed_place = torch.tensor(fed).T  # each [fed]
        # For each predicted token: id, label, and which of the kept logits predicts it (0: the prompt's last token's).
        predicted, row = [], 0
        for k, answer in enumerate(self.answers):
            learned = answer if end else answer[:-1]
            predicted += [(token, k, row + i if i else 0) for i, token in enumerate(learned)]
            row += len(answer) - 1
        self.target_ids, self.target_label, self.target_row = torch.tensor(predicted).T  # each [predicted]

    def _text(self, label=None):
        """The conversation as the model reads it, with BOS; without a label it ends where the answer begins."""
        template = self.config.chat_template
        return self.processor.apply_chat_template(self.config.conversation(label), template, tokenize=False)

    def _token_ids(self, label=None):
        return self.processor.tokenizer(self._text(label), add_special_tokens=False)["input_ids"]

    def prompts(self, pictures):
        """RGB pictures -> the processor's batch for the prompt alone, padded on the left."""
        return self.processor(
            images=pictures, text=[self._text()] * len(pictures), return_tensors="pt",
            padding=True, padding_side="left", add_special_tokens=False,  # the template has BOS
        )  # fmt: skip

    def collate(self, pictures):
        """RGB pictures -> the model's inputs on the CPU: prompts padded on the left, answers, mask and positions.

        The mask for the answers " cat" and " spi der" after a prompt of three tokens and one of padding. There is one
        line per token; x marks the tokens that it sees:
                        pad [INST] … [/INST] | cat | spi der
            [/INST]          x     x    x    |     |           its logits say "cat" and "spi"
            cat              x     x    x    |  x  |           …  "</s>" of cat
            spi              x     x    x    |     |  x        …  "der"
            der              x     x    x    |     |  x   x    …  "</s>" of spider
        """
        import torch

        batch = self.prompts(pictures)
        seen = batch.pop("attention_mask").bool()  # [batch, prompt]
        (size, prompt), fed = seen.shape, len(self.fed_ids)
        batch["input_ids"] = torch.cat([batch["input_ids"], self.fed_ids.expand(size, fed)], dim=1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        batch["position_ids"] = torch.cat([positions, seen.sum(1, keepdim=True) + self.fed_place], dim=1)
        mask = torch.ones(prompt + fed, prompt + fed, dtype=torch.bool).tril()  # causal
        mask[prompt:, prompt:] &= self.fed_label[:, None] == self.fed_label[None, :]  # no answer sees another
        mask = mask.repeat(size, 1, 1)
        mask[:, :, :prompt] &= seen[:, None, :]
        mask |= torch.eye(prompt + fed, dtype=torch.bool)  # padding sees itself: the softmax of nothing is NaN
        batch["attention_mask"] = mask[:, None]  # [batch, 1, tokens, tokens]
        return batch

    def score(self, model, batch):
        """Log-probabilities of the labels, float32 [batch, labels] on the CPU, not normalised over the labels.

        Raises NotFinite if one of them is NaN or infinite.
        """
        import torch

        plain = getattr(model, "module", model)  # DeepSpeed's engine has no dtype
        inputs = {key: value.to(plain.device) for key, value in batch.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(plain.dtype)
        with torch.no_grad(), float32_head(plain):  # what ZeRO-3 gathers in inference_mode cannot be trained later
            logits = model(**inputs, logits_to_keep=len(self.fed_ids) + 1, use_cache=False).logits
        log_p = logits.float().log_softmax(-1).cpu()[:, self.target_row, self.target_ids]  # [batch, predicted]
        if not log_p.isfinite().all():
            name = f"{plain.config.name_or_path}{' with its adapter' if hasattr(plain, 'peft_config') else ''}"
            small = ", or float16 is too small for them: --dtype bfloat16" if plain.dtype == torch.float16 else ""
            found = f"{name}: found log-probabilities that are not finite numbers; expected finite ones"
            way = f"fetch them again or take another checkpoint{small}"
            raise NotFinite(f"{found}; the weights are damaged (NaN or Inf): {way}")
        return torch.zeros(len(log_p), len(self.labels)).index_add_(1, self.target_label, log_p)


@contextlib.contextmanager
def float32_head(model):
    """In this context the head computes its logits in float32, whatever the types of its weights and of autocast.

    bfloat16 numbers near 16 are multiples of 0.125: labels that differ by less would tie, and the first one win.
    """
    import torch

    def in_float32(linear, inputs, output):
        """Forward hook: the same product again, a part of the weight at a time; a copy of all takes 0.5 GB for 7B."""
        if output.dtype == torch.float32:
            return output
        with torch.autocast(output.device.type, enabled=False):
            shares = [torch.nn.functional.linear(inputs[0].float(), w.float()) for w in linear.weight.split(4096)]
        return torch.cat(shares, -1) + (0 if linear.bias is None else linear.bias)

    with contextlib.ExitStack() as hooks:
        for module in model.get_output_embeddings().modules():  # several if an adapter is in the head
            if isinstance(module, torch.nn.Linear):  # prepend: ZeRO-3's own hook then releases the weight
                hooks.enter_context(module.register_forward_hook(in_float32, prepend=True))
        yield


def score_in_parts(scorer, model, batch, most, halve=True):
    """Scorer.score() of a batch in parts of at most `most` pictures. Returns (log_p, the number that fits from now on).

    A part that does not fit into the GPU's memory is halved, with a message on stderr. Raises UserError if one picture
    does not fit, or with halve=False: under ZeRO-3 all ranks must run the same forward passes.
    """
    import torch

    size, start, scored = len(batch["input_ids"]), 0, []
    while start < size:
        tried = min(most, size - start)
        try:
            scored.append(scorer.score(model, {key: value[start : start + tried] for key, value in batch.items()}))
            start += tried
        except torch.OutOfMemoryError:
            if tried == 1 or not halve:
                tokens, several = f"{batch['input_ids'].shape[1]:,}", tried > 1
                raise UserError(
                    f"out of memory in evaluation with {tried} picture{'s' * several} of {tokens} tokens; expected "
                    f"enough memory; {'lower --per_device_eval_batch_size, ' * several}end what else runs on the GPU, "
                    "take one with more memory, or the CPU: --use_cpu"
                ) from None
            most = (tried + 1) // 2
            print(f"out of memory with {tried} pictures at once: going on with {most}", file=sys.stderr)
    return torch.cat(scored), most


def probabilities(log_p) -> tuple[list[float], list[list[float]]]:
    """Scorer.score()'s log-probabilities [pictures, labels] -> (labels_mass, probabilities that add up to 1).

    labels_mass [pictures]: the probability that the answer is any of the labels, before this is made to be 1.
    """
    log_p = log_p.double()
    return log_p.logsumexp(1).exp().clamp(max=1).tolist(), log_p.softmax(1).tolist()


def score_batches(model, scorer, pictures, batches, num_workers=0, same_passes=False):
    """Yields (indices, log_p, errors) for each list of indices in `batches`. It runs on this rank alone.

    pictures are paths. log_p is float32 [indices, labels], NaN in the row of a picture that cannot be read; errors maps
    the index of such a picture to the reason. same_passes: exactly one forward pass per batch, as ZeRO-3 needs it. The
    main process shows a progress bar on a terminal.
    """
    import torch
    from PIL import Image
    from tqdm import tqdm

    def collate(indices):
        opened, errors = {}, {}
        for i in indices:
            try:
                opened[i] = load_picture(pictures[i])
            except PictureError as error:
                errors[i] = str(error)
        shown = list(opened.values()) or [Image.new("RGB", (8, 8))] * same_passes
        return indices, list(opened), errors, scorer.collate(shown) if shown else None

    most = sys.maxsize  # pictures that fit into the GPU's memory at once, as far as is known
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=num_workers)
    with tqdm(total=sum(map(len, batches)), unit="image", disable=not main_process() or None) as bar:
        for indices, readable, errors, batch in loader:
            log_p = torch.full((len(indices), len(scorer.labels)), float("nan"))
            if batch is not None:
                found, most = score_in_parts(scorer, model, batch, most, halve=not same_passes)
                log_p[[indices.index(i) for i in readable]] = found[: len(readable)]
            yield indices, log_p, errors
            bar.update(len(indices))


def score_pictures(model, scorer, pictures, batch_size, lengths, num_workers=0, same_passes=False):
    """Log-probabilities of all pictures, float32 [pictures, labels], computed by all ranks and returned on every rank.

    Each picture is scored once. lengths: image tokens per picture; pictures of similar length share a batch, so that
    little is padded. same_passes: each rank runs the same number of forward passes, as ZeRO-3 needs it (a rank
    with one batch fewer scores one again). Raises UserError for a picture that can no longer be read.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    order = sorted(range(len(pictures)), key=lambda i: -lengths[i])  # longest first: out of memory comes at the start
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    share = batches[state.process_index :: state.num_processes]
    if same_passes and len(share) < -(-len(batches) // state.num_processes):
        share.append(batches[-1])
    done = list(score_batches(model, scorer, pictures, share, num_workers, same_passes))
    result, lost = torch.full((len(pictures), len(scorer.labels)), float("nan")), {}
    for indices, log_p, errors in gather_object(done):
        result[indices] = log_p
        lost |= errors
    if lost:
        found, one = f"{len(lost)} pictures became unreadable after they were checked", min(lost)
        way = "put them back or run again, and the check will leave them out"
        raise UserError(f"{found}, {pictures[one]} ({lost[one]}) among them; {way}")
    assert result.isfinite().all(), "a picture was not scored"  # a fault of this program: no accuracy is made of it
    return result


def stratified_sample(labels, n):
    """Indices of n pictures, each class in proportion; always the same ones for the same list. n = 0: all pictures."""
    shuffled = list(range(len(labels)))
    random.Random(0).shuffle(shuffled)
    size, seen, place = Counter(labels), Counter(), {}
    for i in shuffled:
        place[i] = (seen[labels[i]] + 0.5) / size[labels[i]]  # its position within its class, 0 to 1
        seen[labels[i]] += 1
    return sorted(sorted(shuffled, key=place.__getitem__)[: n or len(labels)])


def load_scorer(path, config, dtype, end=True):
    """(scorer, model) of the checkpoint in `path`; config is already resolved (checkpoint.task.settings_for).

    All ranks call it. If one of them cannot read the checkpoint, every rank raises UserError.
    """
    from accelerate.utils import gather_object

    problem = scorer = model = None
    try:
        scorer, model = Scorer(load_processor(path), config, end), load_model(path, dtype)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # transformers, tokenizers and safetensors raise nearly anything on damaged files
        said = (str(error).splitlines() or [""])[0]
        problem = f"{path}: found {type(error).__name__} ({said}); expected a complete checkpoint; fetch it again"
    if problems := [text for text in gather_object([problem]) if text]:
        raise UserError(problems[0])
    return scorer, model


def add_inference_flags(parser, batches=True):
    """The flags of the commands that score pictures. batches: also those about pictures that are scored together."""
    add, types = parser.add_argument, ["bfloat16", "float16", "float32"]
    add("--model_name_or_path", default=settings.TRAINING_DEFAULTS["output_dir"], help="folder of the checkpoint")
    add("--dtype", default=types[0], choices=types, help="number type of the weights on a GPU")
    add("--use_cpu", action="store_true", help="compute on the CPU although there is a GPU")
    if batches:
        add("--per_device_eval_batch_size", type=int, default=8, help="pictures per forward pass and rank")
        add("--dataloader_num_workers", type=int, default=0, help="processes per rank that decode pictures")
