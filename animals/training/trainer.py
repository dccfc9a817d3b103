"""TRL's SFTTrainer for long runs: it saves when it is stopped, resumes after a kill, and measures accuracy.

A checkpoint is written in place. Its manifest, written last, makes it complete (animals/checkpoint/steps.py).
Nothing here changes what is learned.
"""

import collections
import contextlib
import copy
import os
import shutil
import time

import torch
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from animals.checkpoint import steps
from animals.checkpoint.card import write_card
from animals.checkpoint.load import zero3_is_on
from animals.checkpoint.save import add_other_files, share_weights
from animals.checkpoint.task import task_of
from animals.command import UserError
from animals.files import write_json
from animals.ranks import barrier, main_process, say
from animals.scoring.metrics import measure
from animals.scoring.report import one_sided_lines
from animals.scoring.scorer import NotFinite, score_pictures
from animals.training.batches import TokenBalancedSampler, add_fillers, shuffle_seed
from animals.training.describe import batch_sizes
from animals.training.parts import RATES, load_trained, parameter_groups, save_trained, save_weights, whole_weights
from animals.training.signals import protect_data_workers


def without_mask(module, args, kwargs):
    """Forward pre-hook of the language model: training needs no attention mask.

    All padding is on the right, where causal attention hides it from every real token. Without a mask SDPA uses a flash
    kernel with grouped heads; with one it would build the mask and repeat keys and values. The positions then come from
    arange, which gives real tokens the same ones. The batch keeps its mask, because TRL counts tokens with it.
    """
    if module.training:
        return args, {**kwargs, "attention_mask": None, "position_ids": None}


def wait_in_forward(layers):
    """In the forward pass the host waits before each layer until the GPU has ended the layer two before it. CUDA only.

    Otherwise it may run ahead, and ZeRO-3's gathered weights of many layers would be in memory at once: they are freed
    when the GPU has used them, but the host does not know when that is (DeepSpeed issue 7217).
    """
    events = collections.deque(maxlen=2)

    def wait(module, args):
        if len(events) == events.maxlen:
            events[0].synchronize()
        events.append(torch.cuda.current_stream().record_event())

    for layer in layers:
        layer.register_forward_pre_hook(wait)


def release_head_early(model, base):
    """ZeRO-3: gather the head's weight with the final norm, and release it after the norm's backward pass.

    TRL reads lm_head.weight without calling the head. DeepSpeed notices this in the first forward pass, registers the
    weight with the outermost module and keeps it gathered through the whole backward pass: this takes the room
    of 131 M elements from the prefetch. The loss follows the final norm, so the weight is registered there.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter, unregister_external_parameter

    head, norm = base.get_output_embeddings().weight, base.model.language_model.norm
    register_external_parameter(norm, head)

    def unregister(module, inputs, output):  # DeepSpeed's own registration
        with contextlib.suppress(RuntimeError):  # the weight is not registered with this module
            unregister_external_parameter(module, head)

    for module in model.modules():
        if module is not norm and any(part is norm for part in module.modules()):
            module.register_forward_hook(unregister)


class AnimalTrainer(SFTTrainer):
    """Adds to SFTTrainer: checkpoints that survive a kill, a checked loss, and evaluate() as closed-set accuracy.

    scorer: animals.scoring.scorer.Scorer, whose config is the run's. eval_dataset: the held-out split; evaluate()
    measures a fixed stratified sample of `eval_pictures` of it (0: all). record: what runs, saved with each checkpoint.
    dtype: "bfloat16" or "float32", the type of the saved weights. wait: see wait_in_forward().
    """

    def __init__(self, *, train_dataset, args, scorer, record, dtype, wait, **kwargs):
        args = copy.copy(args)  # the caller's stay unchanged
        args.assistant_only_loss = False  # the collator does it; SFTTrainer would refuse our chat template
        args.dataloader_persistent_workers = args.dataloader_num_workers > 0
        protect_data_workers()
        # The library deletes old checkpoints before the new one has its manifest; _save_checkpoint() does so after it.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self.sampler = None  # of --train_sampling_strategy batch_rebalance
        train_dataset = add_fillers(train_dataset, args)
        super().__init__(train_dataset=train_dataset, args=args, processing_class=scorer.processor, **kwargs)
        self.scorer, self.record, self.dtype = scorer, record, dtype
        self.rates = {part: getattr(scorer.config, flag) for flag, part in RATES.items()}
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # not peft's wrapper
        base.model.language_model.register_forward_pre_hook(without_mask, with_kwargs=True)
        if wait and not args.use_cpu:
            wait_in_forward(base.model.language_model.layers)
        if zero3_is_on(args):
            release_head_early(self.model, base)

    def create_optimizer(self, model=None):
        """As the library does it, with our groups: each part of the model may have a learning rate of its own."""
        if self.optimizer is None and any(self.rates.values()):
            args, decayed = self.args, set(self.get_decay_parameter_names(self.model))
            groups = parameter_groups(self.model, self.rates, args.learning_rate, decayed, args.weight_decay)
            kind, options = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer_cls_and_kwargs = kind, options | {"params": groups}
            for part, rate in self.rates.items():
                if rate and not any(part in group["parts"] for group in groups):
                    say(f"--{part}_learning_rate {rate:g} has no effect: the {part} does not train in this run")
        return super().create_optimizer(model)

    def log(self, logs, *args, **kwargs):
        if "learning_rate" in logs:  # of the first group, before the scheduler's step: the others have the same share
            groups = self.optimizer.param_groups
            share = logs["learning_rate"] / groups[0]["initial_lr"]
            own = {part: group["initial_lr"] * share for group in groups for part in group.get("parts", ())}
            logs |= {f"learning_rate_{part}": rate for part, rate in own.items() if self.rates.get(part)}
        return super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        args, image_tokens = self.args, self.train_dataset[self.args.length_column_name]
        options = {"rank": args.process_index, "drop_last": args.dataloader_drop_last, "seed": shuffle_seed(args)}
        options["text_tokens"] = self.scorer.text_tokens
        self.sampler = TokenBalancedSampler(image_tokens, *batch_sizes(args), **options)
        return self.sampler

    def _run_epoch(self, **kwargs):
        if not self.args.use_cpu:  # frees the pinned host RAM that loading the weights used
            torch.accelerator.empty_host_cache()
        if self.sampler:  # after a resume the library cannot call it on the wrapped sampler
            self.sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(**kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's, with the log-probabilities of each answer times the weight of its class (--class_weights).

        The sum is divided by the number of learned tokens, as without weights: the gradient is the same however a step
        is cut into micro-batches.
        """
        weights = inputs.pop("weights", None)

        def weighted(**batch):
            outputs = model(**batch)
            outputs.log_probs = outputs.log_probs * weights[:, None]  # [pictures, tokens]
            return outputs

        return super().compute_loss(model if weights is None else weighted, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        pictures = inputs.pop("pictures")
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on {', '.join(pictures)}; checkpoints "
                "are kept; look at these pictures, or start again with a lower --learning_rate"
            )
        return loss

    def evaluate(self, ignore_keys=None):
        """Closed-set accuracy, macro-F1 and the answer's loss on the sample. All ranks."""
        data, step = self.eval_dataset, self.state.global_step
        pictures = [images[0] for images in data["images"]]
        truth = [self.scorer.labels.index(label) for label in data["label"]]
        size, tokens, zero = self.args.per_device_eval_batch_size, list(data["image_tokens"]), self.is_deepspeed_enabled
        model = self.model_wrapped if zero else self.model  # only gradients need DDP's wrapper
        started = time.perf_counter()
        self.model.eval()
        try:
            with self.autocast_smart_context_manager():  # as in training
                log_p = score_pictures(model, self.scorer, pictures, size, tokens, same_passes=zero)
        except NotFinite:
            if not step:  # the weights that the run started from
                raise
            raise UserError(
                f"step {step}: evaluation found log-probabilities that are not finite numbers; expected finite ones; "
                "the run has diverged; checkpoints are kept; start again with a lower --learning_rate"
            ) from None
        seconds = time.perf_counter() - started
        report, n = measure(self.scorer.labels, truth, log_p.argmax(1).tolist()), len(truth)
        for line in one_sided_lines(report):
            say(f"step {step}: {line}")
        learned = sum(len(self.scorer.answers[t]) for t in truth)  # tokens
        metrics = {"eval_accuracy": report["accuracy"], "eval_macro_f1": report["macro_f1"]}
        metrics |= {"eval_loss": -log_p[range(n), truth].sum().item() / learned, "eval_pictures": n}
        metrics |= {"eval_runtime": seconds, "eval_samples_per_second": n / seconds}
        self.log(metrics)  # before model.train(): in evaluation mode TRL omits its training metrics
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        """Write all files of a model: of checkpoint-N and of the final one."""
        if self.args.should_save:
            source, scorer = self.model.config.name_or_path, self.scorer
            save_weights(self.model, output_dir, state_dict, getattr(torch, self.dtype))
            add_other_files(output_dir, source, scorer.processor, task_of(scorer.config), self.dtype)

    def parts_in_float32(self):
        """Whether the model's own trained weights are float32 parameters, as without ZeRO-3 (parts.py)."""
        return not self.is_deepspeed_enabled and bool(whole_weights(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.parts_in_float32():
            load_trained(self.model, resume_from_checkpoint)  # the frozen weights are still those of the base model
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _determine_best_metric(self, metrics, trial):
        """Whether the library saves, under --save_strategy best: a better checkpoint; here also where a run ends."""
        return super()._determine_best_metric(metrics, trial) or self.control.should_training_stop

    def _load_best_model(self):
        """Nothing: save_final() copies the best checkpoint. The library would load no weight without ZeRO-3 or LoRA."""

    def create_model_card(self, *args, **kwargs):
        """Write README.md of output_dir: ours in place of the library's."""
        if main_process():
            write_card(self.args.output_dir, self.scorer, self.state, self.record)

    def _save_checkpoint(self, model, trial):
        """Write checkpoint-N, then its manifest, and only then delete the oldest checkpoints. All ranks."""
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if main_process():
            steps.delete_incomplete(self.args.output_dir)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that went further before this one was resumed
        barrier()
        with self.explain_failure():
            super()._save_checkpoint(model, trial)
            barrier()
            if main_process():
                if self.parts_in_float32():
                    save_trained(self.model, folder)
                    share_weights(folder)
                write_json(os.path.join(folder, "run.json"), self.record)
                steps.write_manifest(folder)
                rotate_checkpoints(self.args.output_dir, self.save_total_limit, self.state.best_model_checkpoint)
        barrier()

    def save_checkpoint(self):
        """Write the checkpoint of this step now. All ranks."""
        self._save_checkpoint(self.model, None)

    def save_final(self):
        """Write the model into output_dir, first into .saving: new shards would overwrite old ones. All ranks."""
        saving, best = os.path.join(self.args.output_dir, steps.SAVING), self.state.best_global_step
        if main_process():
            shutil.rmtree(saving, ignore_errors=True)
        barrier()
        with self.explain_failure():
            if not (chosen := self.args.load_best_model_at_end and best):
                self.save_model(saving)  # on all ranks: ZeRO-3 gathers the weights
            elif main_process():
                steps.copy_model_to_output(saving, self.args, vars(self.state), list(self.eval_dataset["sha256"]))
        barrier()
        if main_process():
            if not chosen:
                steps.move_model(saving, self.args.output_dir)
            self.create_model_card()  # peft has written one of its own
        barrier()

    @contextlib.contextmanager
    def explain_failure(self):
        """A failed save becomes a UserError; for a full disk torch and safetensors raise RuntimeError."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            folder, step = self.args.output_dir, self.state.global_step
            last, free = steps.newest_complete(folder)[0] or "none", shutil.disk_usage(folder).free / 2**30
            raise UserError(
                f"step {step}: could not save ({error}); found {free:.1f} GiB free in {folder}; the last complete "
                f"checkpoint is {last}; make room and start again"
            ) from error
