"""What a user would run instead: TRL's own recipe (examples/scripts/sft_vlm.py) on the same pictures, without our code.

    accelerate launch --config_file zero3.yaml benchmarks/stock.py --data train.json --template template.jinja ...

Takes every flag of trl.SFTConfig and trl.ModelConfig. benchmarks/training.py runs it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Image, List, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser


@dataclass
class Data:
    data: str = "train.json"
    template: str = "template.jinja"  # assistant_only_loss needs {% generation %}, which the hub's template lacks


def main():
    data, args, model_args = TrlParser((Data, SFTConfig, ModelConfig)).parse_args_and_config()
    args.max_length = None  # TRL's default of 1,024 would cut every picture of LLaVA-NeXT, an error
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path, dtype=getattr(torch, model_args.dtype)
    )
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    processor.chat_template = Path(data.template).read_text()
    pictures = load_dataset("json", data_files=data.data, split="train").select_columns(["images", "messages"])
    pictures = pictures.cast_column("images", List(Image()))
    trainer = SFTTrainer(model=model, args=args, train_dataset=pictures, processing_class=processor)
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
