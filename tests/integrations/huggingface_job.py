"""transformers' Trainer and Accelerate on a small Llama under torchrun; rank 0 prints losses and a digest per case.

torchrun --nproc_per_node 2 -m tests.integrations.huggingface_job --steps 6 trainer reference trainer+bf16+lora

A case is who trains ("trainer", "accelerate", or torch's optimizers: "trainer-reference", "accelerate-reference"), then
what the model has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerCallback

from distributed_muon import muon_param_groups
from distributed_muon.integrations.huggingface import MuonTrainer, ddp_optimizer, save_with

VOCABULARY, LENGTH = 64, 16


class TorchMuon(torch.optim.Optimizer):
    """torch.optim.Muon and AdamW as one optimizer: what every rank of DDP would run without this project."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        by_algorithm: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": []}
        for group in muon_param_groups(model):
            by_algorithm[group["algorithm"]] += [param for _, param in group["params"]]
        muon, adamw = by_algorithm["muon"], by_algorithm["adamw"]
        self.parts = [torch.optim.Muon(muon, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
        if adamw:  # LoRA trains matrices only
            self.parts += [torch.optim.AdamW(adamw, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.999))]
        super().__init__([p for group in by_algorithm.values() for p in group], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: Any) -> None:
        pass


class Tokens(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = torch.randint(0, VOCABULARY, (256, LENGTH), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            self.seen.append(logs["loss"])


class ReferenceTrainer(MuonTrainer):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = TorchMuon(self.model, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        Trainer.save_model(self, output_dir, _internal_call)


def by_trainer(args: argparse.Namespace, words: list[str], model: nn.Module) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(Path(args.folder, "+".join(words))),
        per_device_train_batch_size=8 // int(os.environ["WORLD_SIZE"]),
        gradient_accumulation_steps=4,
        max_steps=args.steps,
        learning_rate=0.02,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="steps" if args.save else "no",
        save_steps=args.save or 500,
        lr_scheduler_type="constant",
        bf16="bf16" in words,
        gradient_checkpointing="checkpointing" in words,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        ddp_find_unused_parameters=False,
    )
    losses = Losses()
    kind = ReferenceTrainer if words[0] == "trainer-reference" else MuonTrainer
    trainer = kind(
        model=model, args=arguments, train_dataset=Tokens(), callbacks=[losses], muon={"ns_form": "standard"}
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    return losses.seen


def by_accelerate(args: argparse.Namespace, words: list[str], model: nn.Module) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=8 // accelerator.num_processes)
    if words[0] == "accelerate-reference":
        optimizer = TorchMuon(model, 0.02, 0.1)
    else:
        optimizer = ddp_optimizer(model, lr=0.02, weight_decay=0.1, betas=(0.9, 0.999), ns_form="standard")
        save_with(accelerator, optimizer)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    folder = str(Path(args.folder, "+".join(words)))
    done = 0
    if args.resume:
        accelerator.load_state(folder)
        done = args.save
    losses: list[float] = []
    for number, batch in enumerate(chain.from_iterable(repeat(loader))):
        if number < 4 * done:
            continue
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            wrapped.step()
            wrapped.zero_grad()
        if accelerator.sync_gradients:
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if done + len(losses) == args.save and not args.resume:
                accelerator.save_state(folder, safe_serialization=True)
        if done + len(losses) == args.steps:
            break
    return losses


def llama(tied: bool, lora: bool) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"num_key_value_heads": 1, "max_position_embeddings": LENGTH, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **rest))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])) if lora else model


def run_case(args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    set_seed(0)
    model = llama("tied" in words, "lora" in words)
    losses = (by_accelerate if "accelerate" in words[0] else by_trainer)(args, words, model)
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    return {"losses": losses, "digest": digest, "same": len(set(digests)) == 1}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--folder", default="runs/huggingface")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    results = {case: run_case(args, case.split("+")) for case in args.cases}
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
