"""Trains a LoRA adapter of a small model on a few texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LEARNING_RATE = 5e-3
BATCH_SIZE = 16


def train_adapter(directory: Path, base_dir: Path, texts: Sequence[str], *, steps: int, rank: int) -> Path:
    """Directory with an adapter of `base_dir` on q_proj and v_proj, after `steps` steps of cross-entropy on `texts`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32),
            LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            ),
        )
        optimizer = torch.optim.AdamW(
            [weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE
        )
        for step in range(steps):
            chosen = [texts[(step * BATCH_SIZE + index) % len(texts)] for index in range(BATCH_SIZE)]
            batch = tokenizer(chosen, return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    return directory
