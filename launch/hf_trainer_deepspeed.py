"""Train a small Llama with Hugging Face's Trainer, DeepSpeed and distributed Muon.

    torchrun --standalone --nproc_per_node 2 -m launch.hf_trainer_deepspeed --output-dir runs/hf

Needs transformers and accelerate. The three lines that matter are MuonTrainer's.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when transformers imports deepspeed

from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from distributed_muon.integrations.deepspeed import optimizer_from_config
from launch.data import load_data
from launch.world import leave

CONFIG = Path(__file__).parent / "configs" / "deepspeed_hf.json"


class MuonTrainer(Trainer):
    """Trainer whose optimizer is described by the block "distributed_muon" of the DeepSpeed config."""

    def create_optimizer(self, *args: object, **kwargs: object) -> torch.optim.Optimizer:
        self.optimizer = optimizer_from_config(self.model, self.args)
        return self.optimizer


class Windows(Dataset):
    """The trainer's own data as the samples that Hugging Face models take."""

    def __init__(self, paths: list[str], length: int, samples: int) -> None:
        data = load_data(paths, length)
        self.vocab_size = data.vocab_size
        self._tokens, _ = data.batch(0, 0, 0, 1, size=samples, accumulation=1)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


def main() -> None:
    """Train, and print the last losses as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--data", nargs="*", default=[], help="text files; empty: Python's standard library")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--deepspeed-config", default=str(CONFIG))
    args = parser.parse_args()
    windows = Windows(args.data, length=64, samples=2048)
    training = TrainingArguments(
        output_dir=args.output_dir,
        deepspeed=args.deepspeed_config,
        per_device_train_batch_size=8,
        max_steps=args.steps,
        warmup_steps=args.steps // 10,
        lr_scheduler_type="cosine",  # from the lr of the config's block
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=windows.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )
    trainer = MuonTrainer(model=model, args=training, train_dataset=windows)
    trainer.train()
    if trainer.is_world_process_zero():
        print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]), flush=True)
    leave()


if __name__ == "__main__":
    main()
