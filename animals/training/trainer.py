"""TRL's SFTTrainer, made to survive: checkpoints complete or absent, stops that save, loss that is checked, accuracy.

train.py reads like the recipe because what goes wrong at hour two is dealt with here. Nothing here changes what is
learned.
"""

import contextlib
import json
import os
import shutil
import signal
import time

import torch
import torch.distributed
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from animals.checkpoint.save import complete
from animals.checkpoint.steps import SAVING, move_in, newest_complete, write_manifest
from animals.checkpoint.task import how_to_ask, task_of
from animals.command import UserError
from animals.files import write_json
from animals.ranks import barrier, main_process
from animals.scoring.metrics import measure
from animals.scoring.scorer import score_pictures, stratified_sample
from animals.training.batches import fill_up, level, shuffle_seed
from animals.training.parts import in_type, load_trained, save_trained


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGHUP or Ctrl-C: all ranks finish the step, save a checkpoint and end. A second Ctrl-C ends at once."""

    def __init__(self):
        self.received = 0  # on this rank
        self.agreed = 0  # on all ranks
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if self.received == signal.SIGINT == number:
            os._exit(128 + number)
        self.received = number
        if main_process():
            name = signal.Signals(number).name
            print(f"\n{name}: saving a checkpoint at the end of this step (Ctrl-C twice ends at once)", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        number = torch.tensor(self.received, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)  # all ranks stop at the same step
        self.agreed = int(number)
        if self.agreed and not control.should_training_stop:
            control.should_save = control.should_training_stop = True


class FreePinned(TrainerCallback):
    """Hands back the pinned host RAM that loading and partitioning went through, once the engine stands."""

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():  # on CPU ranks it raises
            torch.accelerator.empty_host_cache()


def without_mask(module, args, kwargs):
    """Pre-hook of the language model: no attention mask in training.

    Right padding stands behind every real token, so causal attention alone keeps it out of sight. Without a mask SDPA
    takes a flash kernel with grouped heads; a mask would be materialised, and keys and values repeated. Positions then
    come from arange, as they are for real tokens. The batch keeps its mask: TRL counts tokens by it.
    """
    if module.training:
        return args, {**kwargs, "attention_mask": None, "position_ids": None}


def release_head_early(model, base):
    """ZeRO-3: gather the head's weight with the norm before it, and let it go after that norm's backward.

    TRL reads lm_head.weight without calling the head. DeepSpeed notices, makes it an external parameter of the
    outermost module and keeps it gathered through the whole backward: 131 M elements in the way of the prefetch. Its
    users are next to the final norm in forward and in backward, so it is registered there (as DeepSpeed documents), and
    what DeepSpeed notices by itself in the first forward is taken back.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter, unregister_external_parameter

    head, norm = base.get_output_embeddings().weight, base.model.language_model.norm
    register_external_parameter(norm, head)

    def take_back(module, inputs, output):
        with contextlib.suppress(RuntimeError):  # it is not registered here
            unregister_external_parameter(module, head)

    for module in model.modules():
        if module is not norm and any(part is norm for part in module.modules()):
            module.register_forward_hook(take_back)


class AnimalTrainer(SFTTrainer):
    """Adds to SFTTrainer: atomic checkpoints, a checked loss, and evaluate() as closed-set accuracy.

    scorer: scoring.scorer.Scorer. eval_dataset: the held-out split; evaluate() measures a fixed stratified sample of
    `eval_pictures` of it (0: all). record: the run's settings, saved with each checkpoint.
    """

    def __init__(self, *, train_dataset, args, scorer, eval_pictures, record, **kwargs):
        args.dataloader_persistent_workers = args.dataloader_num_workers > 0
        self.balanced = None  # the sampler of --train_sampling_strategy batch_rebalance
        super().__init__(train_dataset=fill_up(train_dataset, args), args=args, **kwargs)
        self.scorer, self.eval_pictures, self.record = scorer, eval_pictures, record
        self.run_dir = self.args.output_dir
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # peft's wrapper
        base.model.language_model.register_forward_pre_hook(without_mask, with_kwargs=True)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            release_head_early(self.model, base)
        self.add_callback(FreePinned())

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint:
            self.args.eval_on_start = False  # measured when the run began
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):
            self.balanced = level(sampler, shuffle_seed(self.args), self.scorer.text_tokens)
        return sampler

    def _run_epoch(self, **kwargs):
        if self.balanced:  # after a resume the library does not reach it through its wrappers
            self.balanced.set_epoch(kwargs["epoch"])
        return super()._run_epoch(**kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        pictures = inputs.pop("pictures")
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()} on {', '.join(pictures)}; checkpoints "
                "are kept; look at these pictures, or start again with a lower --learning_rate"
            )
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Closed-set accuracy, macro-F1 and the answer's loss on the sample. All ranks."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        data = data.select(stratified_sample(data["label"], self.eval_pictures))
        pictures = [images[0] for images in data["images"]]
        truth = [self.scorer.labels.index(label) for label in data["label"]]
        started = time.perf_counter()
        self.model.eval()
        with self.autocast_smart_context_manager():  # as in training
            log_p = score_pictures(
                self.model_wrapped if self.is_deepspeed_enabled else self.model,  # DDP's wrapper is for gradients
                self.scorer,
                pictures,
                self.args.per_device_eval_batch_size,
                list(data["image_tokens"]),
                in_step=self.is_deepspeed_enabled,
            )
        seconds = time.perf_counter() - started
        report = measure(self.scorer.labels, truth, log_p.argmax(1).tolist())
        tokens = sum(len(self.scorer.answers[t]) for t in truth)
        metrics = {
            "accuracy": report["accuracy"],
            "macro_f1": report["macro_f1"],
            "loss": -log_p[range(len(truth)), truth].sum().item() / tokens,
            "pictures": len(truth),
            "runtime": seconds,
            "samples_per_second": len(truth) / seconds,
        }
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(metrics)  # in evaluation mode: what TRL has gathered of the training stays out of this record
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        """The weights, and what makes them a checkpoint like the one that was trained. Of checkpoint-N and the end."""
        if self.args.should_save:
            folder, processor = output_dir or self.args.output_dir, self.scorer.processor
            dtype = self.record["model"]["dtype"]
            if self.parts_in_float32():
                state_dict = in_type(self.model, dtype)
            self.model.save_pretrained(folder, state_dict=state_dict)
            complete(folder, self.model.config.name_or_path, processor, task_of(self.scorer.config), dtype)

    def parts_in_float32(self):
        """Whether the weights are their own masters: no ZeRO-3, no LoRA (parts.py)."""
        return not self.is_deepspeed_enabled and not hasattr(self.model, "peft_config")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.parts_in_float32():
            load_trained(self.model, resume_from_checkpoint)  # the others are as the model was loaded
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_output_dir(self, trial):
        return self.run_dir

    def create_model_card(self, *args, **kwargs):
        """README.md of output_dir: how to ask the model, what it was trained with, how good it was last."""
        if not main_process():
            return
        measured = [log for log in self.state.log_history if "eval_accuracy" in log]
        accuracy = "not measured while training; `sh validation.sh` does"
        if measured:
            log = measured[-1]
            accuracy = f"{log['eval_accuracy']:.4f} on {log['eval_pictures']} held-out pictures at step {log['step']}"
            if measured[0]["step"] == 0:
                accuracy += f"; untuned: {measured[0]['eval_accuracy']:.4f}"
        record = json.dumps(self.record, indent=1, ensure_ascii=False)
        longest = max(map(len, self.scorer.answers))  # in tokens
        with open(os.path.join(self.args.output_dir, "README.md"), "w", encoding="utf-8") as file:
            file.write(
                f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
                f"# {os.path.basename(os.path.normpath(self.args.output_dir))}\n\n"
                f"LLaVA-NeXT fine-tuned to answer with one of: {', '.join(self.scorer.labels)}.\n\n"
                f"- asked: {self.record['question']}\n- closed-set accuracy: {accuracy}\n"
                f"- step {self.state.global_step} of {self.state.max_steps}\n\n"
                f"Ask it:\n\n{how_to_ask(self.args.output_dir, self.scorer.config, longest)}\n\n"
                f"What ran (run.json):\n\n```json\n{record}\n```\n"
            )

    def _save_checkpoint(self, model, trial):
        """The library's, into .saving; listed, synced, then renamed to checkpoint-N. All ranks."""
        name = f"checkpoint-{self.state.global_step}"
        saving, final = os.path.join(self.args.output_dir, SAVING), os.path.join(self.args.output_dir, name)
        self._start_saving(saving)
        self.run_dir = saving
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's and safetensors' word for a full disk
            raise self._not_saved(error) from error
        finally:
            self.run_dir = self.args.output_dir
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = final
        barrier()
        if main_process():
            if self.parts_in_float32():
                save_trained(self.model, os.path.join(saving, name))
            self.state.save_to_json(os.path.join(saving, name, "trainer_state.json"))  # without .saving in its paths
            write_json(os.path.join(saving, name, "run.json"), self.record)
            write_manifest(os.path.join(saving, name))
            shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same step
            os.rename(os.path.join(saving, name), final)
            os.rmdir(saving)
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        barrier()

    def save_final(self):
        """The model into output_dir, by way of .saving: no reader ever meets half a file. All ranks."""
        saving = os.path.join(self.args.output_dir, SAVING)
        self._start_saving(saving)
        try:
            self.save_model(saving)  # all ranks: ZeRO-3 gathers the weights
        except (OSError, RuntimeError) as error:
            raise self._not_saved(error) from error
        barrier()
        if main_process():
            move_in(saving, self.args.output_dir)
            self.create_model_card()  # peft has left one of its own
        barrier()

    def _start_saving(self, saving):
        if main_process():
            shutil.rmtree(saving, ignore_errors=True)
            os.makedirs(saving)
        barrier()

    def _not_saved(self, error):
        last, _ = newest_complete(self.args.output_dir)
        free = shutil.disk_usage(self.args.output_dir).free / 2**30
        return UserError(
            f"step {self.state.global_step}: could not save ({error}); {free:.1f} GiB free in {self.args.output_dir}; "
            f"the last good checkpoint is {last or 'none'}; make room and start again"
        )
